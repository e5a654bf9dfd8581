// Sixteen lanes in AVX-512 registers (F, BW, DQ, VL).

struct F32x16 {
    __m512 v;
};
struct I32x16 {
    __m512i v;
};
struct F64x16 {
    __m512d low, high;
};

inline __mmask16 first_lanes(size_t count) {
    return static_cast<__mmask16>((1u << count) - 1);
}

inline F32x16 broadcast(float value) {
    return {_mm512_set1_ps(value)};
}
inline F32x16 load(const float* from) {
    return {_mm512_loadu_ps(from)};
}
inline F32x16 load_first(const float* from, size_t count) {
    return {_mm512_maskz_loadu_ps(first_lanes(count), from)};
}
inline void store(float* to, F32x16 x) {
    _mm512_storeu_ps(to, x.v);
}
inline void store_first(float* to, F32x16 x, size_t count) {
    _mm512_mask_storeu_ps(to, first_lanes(count), x.v);
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
    return {_mm512_mul_ps(a.v, b.v)};
}
inline F32x16 operator+(F32x16 a, F32x16 b) {
    return {_mm512_add_ps(a.v, b.v)};
}
// sum + a * b, rounded once.
inline F32x16 multiply_add(F32x16 sum, float a, F32x16 b) {
    return {_mm512_fmadd_ps(_mm512_set1_ps(a), b.v, sum.v)};
}
inline F32x16 load_bfloat16(const uint16_t* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline F32x16 load_float16(const uint16_t* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}

inline I32x16 zero_codes() {
    return {_mm512_setzero_si512()};
}
inline I32x16 load_codes(const uint8_t* from) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
inline void store_codes(uint8_t* to, I32x16 codes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(codes.v));
}

// table[index] for index < 2^LOG2; the table is readable up to 16 entries.
template <int LOG2>
inline F32x16 lookup(const float* table, I32x16 index) {
    if constexpr (LOG2 == 0) {
        return broadcast(table[0]);
    } else if constexpr (LOG2 <= 4) {
        return {_mm512_permutexvar_ps(index.v, _mm512_loadu_ps(table))};
    } else if constexpr (LOG2 == 5) {
        return {
            _mm512_permutex2var_ps(_mm512_loadu_ps(table), index.v, _mm512_loadu_ps(table + 16))};
    } else {
        constexpr int half = 1 << (LOG2 - 1);
        const __mmask16 upper = _mm512_test_epi32_mask(index.v, _mm512_set1_epi32(half));
        const F32x16 low = lookup<LOG2 - 1>(table, index);
        const F32x16 high = lookup<LOG2 - 1>(table + half, index);
        return {_mm512_mask_blend_ps(upper, low.v, high.v)};
    }
}

inline I32x16 twice(I32x16 x) {
    return {_mm512_add_epi32(x.v, x.v)};
}
// base + (z > threshold)
inline I32x16 add_greater(I32x16 base, F32x16 z, F32x16 threshold) {
    const __mmask16 greater = _mm512_cmp_ps_mask(z.v, threshold.v, _CMP_GT_OQ);
    return {_mm512_mask_add_epi32(base.v, greater, base.v, _mm512_set1_epi32(1))};
}

constexpr int kCountedBits = 0;
template <int BITS>
constexpr bool kHasCells = true;

template <int BITS>
inline I32x16 search_cells(const CodebookTables& codebook, F32x16 z) {
    const __m512 place = _mm512_fmadd_ps(z.v, _mm512_set1_ps(codebook.cell_scale),
                                         _mm512_set1_ps(codebook.cell_offset));
    const __m512 clamped = _mm512_min_ps(_mm512_max_ps(place, _mm512_setzero_ps()),
                                         _mm512_set1_ps(codebook.cell_last));
    I32x16 base = {_mm512_cvtps_epi32(clamped)};
    if constexpr (BITS <= 4) {
        base.v = _mm512_permutex2var_epi32(_mm512_load_si512(codebook.cell_bases), base.v,
                                           _mm512_load_si512(codebook.cell_bases + 16));
    }
    return add_greater(base, z, lookup<BITS>(codebook.thresholds, base));
}

// Magnitudes compare like their bit patterns, and so a NaN is the largest of all.
inline I32x16 max_magnitude(I32x16 largest, F32x16 x) {
    const __m512i magnitude =
        _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff));
    return {_mm512_max_epi32(largest.v, magnitude)};
}
inline void store_bits(uint32_t* to, I32x16 bits) {
    _mm512_storeu_si512(to, bits.v);
}

inline F64x16 zero_sums() {
    return {_mm512_setzero_pd(), _mm512_setzero_pd()};
}
// A float squared is exact in double, so fused and separate rounding agree.
inline F64x16 add_squares(F64x16 sums, const float* x) {
    const __m512d low = _mm512_cvtps_pd(_mm256_loadu_ps(x));
    const __m512d high = _mm512_cvtps_pd(_mm256_loadu_ps(x + 8));
    return {_mm512_fmadd_pd(low, low, sums.low), _mm512_fmadd_pd(high, high, sums.high)};
}
inline F64x16 operator+(F64x16 a, F64x16 b) {
    return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)};
}
inline void store_sums(double* to, F64x16 sums) {
    _mm512_storeu_pd(to, sums.low);
    _mm512_storeu_pd(to + 8, sums.high);
}

// ---- Products of integers, 32 bits ("words") of k at a time ----

inline I32x16 load_words(const void* from) {
    return {_mm512_loadu_si512(from)};
}
inline void store_words(void* to, I32x16 x) {
    _mm512_storeu_si512(to, x.v);
}
inline I32x16 operator+(I32x16 a, I32x16 b) {
    return {_mm512_add_epi32(a.v, b.v)};
}
// sum + a0 * b0 + a1 * b1 of two int16 in each word.
inline I32x16 add_dot_2(I32x16 sum, I32x16 a, I32x16 b) {
#if defined(__AVX512VNNI__)
    return {_mm512_dpwssd_epi32(sum.v, b.v, a.v)};
#else
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(b.v, a.v))};
#endif
}
// With one word for all lanes.
inline I32x16 add_dot_2(I32x16 sum, uint32_t a, I32x16 b) {
    return add_dot_2(sum, I32x16{_mm512_set1_epi32(static_cast<int>(a))}, b);
}
#if defined(__AVX512VNNI__)
// sum + a0 * (b0 + 128) + ... of four int8 in each word: the instruction takes one factor unsigned,
// and b is loaded with its sign bits flipped.
inline I32x16 load_unsigned(const void* from) {
    return {_mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi8(-128))};
}
inline I32x16 add_dot_4(I32x16 sum, I32x16 a, I32x16 b) {
    return {_mm512_dpbusd_epi32(sum.v, b.v, a.v)};
}
inline I32x16 add_dot_4(I32x16 sum, uint32_t a, I32x16 b) {
    return add_dot_4(sum, I32x16{_mm512_set1_epi32(static_cast<int>(a))}, b);
}
// Words of one byte of each of four rows, 64 columns: strips of sixteen words, `stride` apart.
inline void interleave_bytes(const int8_t* rows, size_t row_stride, uint32_t* to, size_t stride) {
    // The columns of a 128-bit lane, four at a time, where unpacking leaves them in order.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const auto row = [&](size_t i) {
        return _mm512_permutexvar_epi32(order, _mm512_loadu_si512(rows + i * row_stride));
    };
    const __m512i a = row(0), b = row(1), c = row(2), d = row(3);
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(ab_low, cd_low));
    _mm512_storeu_si512(to + stride, _mm512_unpackhi_epi16(ab_low, cd_low));
    _mm512_storeu_si512(to + 2 * stride, _mm512_unpacklo_epi16(ab_high, cd_high));
    _mm512_storeu_si512(to + 3 * stride, _mm512_unpackhi_epi16(ab_high, cd_high));
}
#define LOWBIT_HAS_DOT_4 1
#endif

#if defined(__AVX512BF16__)
// sum + a1 * b1 + a0 * b0 of two bfloat16 in each word.
inline F32x16 add_dot_bf16(F32x16 sum, uint32_t a, I32x16 b) {
    const __m512i word = _mm512_set1_epi32(static_cast<int>(a));
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)word, (__m512bh)b.v)};
}
// 32 floats in a row as 16 words.
inline I32x16 row_to_bfloat16(F32x16 first, F32x16 second) {
    return {(__m512i)_mm512_cvtne2ps_pbh(second.v, first.v)};
}
// A word of each lane of the two.
inline I32x16 pairs_to_bfloat16(F32x16 first, F32x16 second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first.v));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second.v));
    return {_mm512_or_si512(low, _mm512_slli_epi32(high, 16))};
}
#define LOWBIT_HAS_BF16 1
#endif

// Levels of 16 codes or fewer: to[i] = table[codes[i]] for 64 codes.
inline void lookup_bytes(const int8_t* table, const uint8_t* codes, int8_t* to) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    // (without the mask gcc 12 sees an uninitialised register)
    const __m512i lanes = _mm512_maskz_broadcast_i32x4(0xffff, entries);
    _mm512_storeu_si512(to, _mm512_shuffle_epi8(lanes, _mm512_loadu_si512(codes)));
}

// Sums that stay in registers: 8 x 48 takes 24 of 32, and 3 more hold columns.
constexpr int kRegisterRows = 8;
constexpr int kRegisterStrips = 3;
