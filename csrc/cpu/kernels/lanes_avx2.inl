// Sixteen lanes in pairs of AVX2 registers (AVX2, FMA, F16C).

struct F32x16 {
    __m256 low, high;
};
struct I32x16 {
    __m256i low, high;
};
struct F64x16 {
    __m256d v[4];
};

inline F32x16 broadcast(float value) {
    const __m256 v = _mm256_set1_ps(value);
    return {v, v};
}
inline F32x16 load(const float* from) {
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
inline __m256i first_lanes(size_t count, int first) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count) - first), lane);
}
inline F32x16 load_first(const float* from, size_t count) {
    return {_mm256_maskload_ps(from, first_lanes(count, 0)),
            _mm256_maskload_ps(from + 8, first_lanes(count, 8))};
}
inline void store(float* to, F32x16 x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
inline void store_first(float* to, F32x16 x, size_t count) {
    _mm256_maskstore_ps(to, first_lanes(count, 0), x.low);
    _mm256_maskstore_ps(to + 8, first_lanes(count, 8), x.high);
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline F32x16 operator+(F32x16 a, F32x16 b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
// sum + a * b, rounded once.
inline F32x16 multiply_add(F32x16 sum, float a, F32x16 b) {
    const __m256 factor = _mm256_set1_ps(a);
    return {_mm256_fmadd_ps(factor, b.low, sum.low), _mm256_fmadd_ps(factor, b.high, sum.high)};
}
inline __m128i load_8_words(const uint16_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
inline __m256 expand_bfloat16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline F32x16 load_bfloat16(const uint16_t* from) {
    return {expand_bfloat16(load_8_words(from)), expand_bfloat16(load_8_words(from + 8))};
}
inline F32x16 load_float16(const uint16_t* from) {
    return {_mm256_cvtph_ps(load_8_words(from)), _mm256_cvtph_ps(load_8_words(from + 8))};
}

inline I32x16 zero_codes() {
    return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
inline I32x16 load_codes(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
inline void store_codes(uint8_t* to, I32x16 codes) {
    const __m256i words = _mm256_packus_epi32(codes.low, codes.high);  // 0-3 8-11 | 4-7 12-15
    const __m256i ordered = _mm256_permute4x64_epi64(words, _MM_SHUFFLE(3, 1, 2, 0));
    const __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}

template <int LOG2>
inline __m256 lookup_8(const float* table, __m256i index) {
    if constexpr (LOG2 <= 3) {
        return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    } else if constexpr (LOG2 <= 5) {
        const __m256 low = lookup_8<LOG2 - 1>(table, index);
        const __m256 high = lookup_8<LOG2 - 1>(table + (1 << (LOG2 - 1)), index);
        // blendv looks at the sign bit: move the topmost index bit there.
        const __m256i upper = _mm256_slli_epi32(index, 32 - LOG2);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(upper));
    } else {
        return _mm256_i32gather_ps(table, index, sizeof(float));
    }
}
// table[index] for index < 2^LOG2; the table is readable up to 16 entries.
template <int LOG2>
inline F32x16 lookup(const float* table, I32x16 index) {
    if constexpr (LOG2 == 0) {
        return broadcast(table[0]);
    } else {
        return {lookup_8<LOG2>(table, index.low), lookup_8<LOG2>(table, index.high)};
    }
}

inline I32x16 twice(I32x16 x) {
    return {_mm256_add_epi32(x.low, x.low), _mm256_add_epi32(x.high, x.high)};
}
inline __m256i add_greater_8(__m256i base, __m256 z, __m256 threshold) {
    const __m256i greater = _mm256_castps_si256(_mm256_cmp_ps(z, threshold, _CMP_GT_OQ));
    return _mm256_sub_epi32(base, greater);  // true is -1
}
// base + (z > threshold)
inline I32x16 add_greater(I32x16 base, F32x16 z, F32x16 threshold) {
    return {add_greater_8(base.low, z.low, threshold.low),
            add_greater_8(base.high, z.high, threshold.high)};
}

constexpr int kCountedBits = 0;
// A lookup among 32 cells takes more operations than the tree for up to 4 bits.
template <int BITS>
constexpr bool kHasCells = BITS == 8;

inline __m256i cell_of_8(const CodebookTables& codebook, __m256 z) {
    const __m256 place = _mm256_fmadd_ps(z, _mm256_set1_ps(codebook.cell_scale),
                                         _mm256_set1_ps(codebook.cell_offset));
    const __m256 clamped = _mm256_min_ps(_mm256_max_ps(place, _mm256_setzero_ps()),
                                         _mm256_set1_ps(codebook.cell_last));
    return _mm256_cvtps_epi32(clamped);
}
template <int BITS>
inline I32x16 search_cells(const CodebookTables& codebook, F32x16 z) {
    const I32x16 base = {cell_of_8(codebook, z.low), cell_of_8(codebook, z.high)};
    return add_greater(base, z, lookup<BITS>(codebook.thresholds, base));
}

inline __m256i max_magnitude_8(__m256i largest, __m256 x) {
    const __m256i magnitude =
        _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_max_epi32(largest, magnitude);
}
// Magnitudes compare like their bit patterns, and so a NaN is the largest of all.
inline I32x16 max_magnitude(I32x16 largest, F32x16 x) {
    return {max_magnitude_8(largest.low, x.low), max_magnitude_8(largest.high, x.high)};
}
inline void store_bits(uint32_t* to, I32x16 bits) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), bits.high);
}

inline F64x16 zero_sums() {
    const __m256d zero = _mm256_setzero_pd();
    return {{zero, zero, zero, zero}};
}
// A float squared is exact in double, so fused and separate rounding agree.
inline F64x16 add_squares(F64x16 sums, const float* x) {
    for (int i = 0; i < 4; ++i) {
        const __m256d wide = _mm256_cvtps_pd(_mm_loadu_ps(x + 4 * i));
        sums.v[i] = _mm256_fmadd_pd(wide, wide, sums.v[i]);
    }
    return sums;
}
inline F64x16 operator+(F64x16 a, F64x16 b) {
    for (int i = 0; i < 4; ++i) {
        a.v[i] = _mm256_add_pd(a.v[i], b.v[i]);
    }
    return a;
}
inline void store_sums(double* to, F64x16 sums) {
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_pd(to + 4 * i, sums.v[i]);
    }
}

// ---- Products of integers, 32 bits ("words") of k at a time ----

inline I32x16 load_words(const void* from) {
    const __m256i* const at = static_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
inline void store_words(void* to, I32x16 x) {
    __m256i* const at = static_cast<__m256i*>(to);
    _mm256_storeu_si256(at, x.low);
    _mm256_storeu_si256(at + 1, x.high);
}
inline I32x16 operator+(I32x16 a, I32x16 b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
// sum + a0 * b0 + a1 * b1 of two int16 in each word.
inline I32x16 add_dot_2(I32x16 sum, I32x16 a, I32x16 b) {
    return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(b.low, a.low)),
            _mm256_add_epi32(sum.high, _mm256_madd_epi16(b.high, a.high))};
}
// With one word for all lanes.
inline I32x16 add_dot_2(I32x16 sum, uint32_t a, I32x16 b) {
    const __m256i word = _mm256_set1_epi32(static_cast<int>(a));
    return add_dot_2(sum, I32x16{word, word}, b);
}

// Levels of 16 codes or fewer: to[i] = table[codes[i]] for 64 codes.
inline void lookup_bytes(const int8_t* table, const uint8_t* codes, int8_t* to) {
    const __m256i entries =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    for (int i = 0; i < 64; i += 32) {
        const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm256_shuffle_epi8(entries, index));
    }
}

// Sums that stay in registers: 4 x 16 takes 8 of 16.
constexpr int kRegisterRows = 4;
constexpr int kRegisterStrips = 1;
