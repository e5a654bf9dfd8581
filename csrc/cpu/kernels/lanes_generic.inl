// Sixteen lanes as four vectors of four, in the vector extensions of gcc and clang: SSE2, NEON, ...

typedef float F32x4 __attribute__((vector_size(16)));
typedef int32_t I32x4 __attribute__((vector_size(16)));
typedef double F64x4 __attribute__((vector_size(32)));
typedef uint32_t U32x4 __attribute__((vector_size(16)));
typedef uint16_t U16x4 __attribute__((vector_size(8)));
typedef uint8_t U8x4 __attribute__((vector_size(4)));

struct F32x16 {
    F32x4 v[4];
};
struct I32x16 {
    I32x4 v[4];
};
struct F64x16 {
    F64x4 v[4];
};

// `q` is the index of the vector in each of these expressions.
#define LOWBIT_EACH(Result, expression) \
    Result out;                         \
    for (int q = 0; q < 4; ++q) {       \
        out.v[q] = (expression);        \
    }                                   \
    return out

template <typename Vector, typename Element>
inline Vector load_vector(const Element* from) {
    Vector x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline F32x16 broadcast(float value) {
    LOWBIT_EACH(F32x16, (F32x4{value, value, value, value}));
}
inline F32x16 load(const float* from) {
    LOWBIT_EACH(F32x16, load_vector<F32x4>(from + 4 * q));
}
inline F32x16 load_first(const float* from, size_t count) {
    F32x16 x = {};
    memcpy(&x, from, count * sizeof *from);
    return x;
}
inline void store(float* to, F32x16 x) {
    memcpy(to, &x, sizeof x);
}
inline void store_first(float* to, F32x16 x, size_t count) {
    memcpy(to, &x, count * sizeof *to);
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
    LOWBIT_EACH(F32x16, a.v[q] * b.v[q]);
}
inline F32x16 operator+(F32x16 a, F32x16 b) {
    LOWBIT_EACH(F32x16, a.v[q] + b.v[q]);
}
// sum + a * b; fused only where the compiler's target has no other way.
inline F32x16 multiply_add(F32x16 sum, float a, F32x16 b) {
    LOWBIT_EACH(F32x16, sum.v[q] + (F32x4{a, a, a, a} * b.v[q]));
}
inline U32x4 load_halves(const uint16_t* from) {
    return __builtin_convertvector(load_vector<U16x4>(from), U32x4);
}
inline F32x16 load_bfloat16(const uint16_t* from) {
    LOWBIT_EACH(F32x16, (F32x4)(load_halves(from + 4 * q) << 16));
}
inline F32x4 expand_float16(U32x4 half) {
    const U32x4 magnitude = (half & 0x7fff) << 13;
    // The exponent bias grows from 15 to 127. Multiplying, not adding to the exponent, normalises
    // subnormal halves as well; infinities and NaNs get an exponent of all ones.
    const U32x4 finite = (U32x4)((F32x4)magnitude * 0x1p112f);
    const U32x4 special = (U32x4)(magnitude >= 0x7c00u << 13) & 0x7f800000u;
    return (F32x4)((half & 0x8000) << 16 | finite | special);
}
inline F32x16 load_float16(const uint16_t* from) {
    LOWBIT_EACH(F32x16, expand_float16(load_halves(from + 4 * q)));
}

inline I32x16 zero_codes() {
    LOWBIT_EACH(I32x16, I32x4{});
}
inline I32x16 load_codes(const uint8_t* from) {
    LOWBIT_EACH(I32x16, __builtin_convertvector(load_vector<U8x4>(from + 4 * q), I32x4));
}
inline void store_codes(uint8_t* to, I32x16 codes) {
    for (int q = 0; q < 4; ++q) {
        const U8x4 bytes = __builtin_convertvector(codes.v[q], U8x4);
        memcpy(to + 4 * q, &bytes, sizeof bytes);
    }
}

// table[index] for index < 2^LOG2.
template <int LOG2>
inline F32x16 lookup(const float* table, I32x16 index) {
    LOWBIT_EACH(F32x16, (F32x4{table[index.v[q][0]], table[index.v[q][1]], table[index.v[q][2]],
                               table[index.v[q][3]]}));
}

inline I32x16 twice(I32x16 x) {
    LOWBIT_EACH(I32x16, x.v[q] + x.v[q]);
}
// base + (z > threshold)
inline I32x16 add_greater(I32x16 base, F32x16 z, F32x16 threshold) {
    LOWBIT_EACH(I32x16, base.v[q] - (z.v[q] > threshold.v[q]));  // true is -1
}

// Comparing with all of 15 thresholds is faster than four lookups one lane at a time.
constexpr int kCountedBits = 4;
template <int BITS>
constexpr bool kHasCells = false;
template <int BITS>
I32x16 search_cells(const CodebookTables& codebook, F32x16 z);

// Magnitudes compare like their bit patterns, and so a NaN is the largest of all.
inline I32x4 max_magnitude_4(I32x4 largest, F32x4 x) {
    const I32x4 magnitude = (I32x4)x & 0x7fffffff;
    const I32x4 greater = magnitude > largest;
    return (magnitude & greater) | (largest & ~greater);
}
inline I32x16 max_magnitude(I32x16 largest, F32x16 x) {
    LOWBIT_EACH(I32x16, max_magnitude_4(largest.v[q], x.v[q]));
}
inline void store_bits(uint32_t* to, I32x16 bits) {
    memcpy(to, &bits, sizeof bits);
}

inline F64x16 zero_sums() {
    LOWBIT_EACH(F64x16, F64x4{});
}
inline F64x4 add_squares_4(F64x4 sums, const float* x) {
    const F64x4 wide = __builtin_convertvector(load_vector<F32x4>(x), F64x4);
    return sums + wide * wide;
}
// A float squared is exact in double, so fused and separate rounding agree.
inline F64x16 add_squares(F64x16 sums, const float* x) {
    LOWBIT_EACH(F64x16, add_squares_4(sums.v[q], x + 4 * q));
}
inline F64x16 operator+(F64x16 a, F64x16 b) {
    LOWBIT_EACH(F64x16, a.v[q] + b.v[q]);
}
inline void store_sums(double* to, F64x16 sums) {
    memcpy(to, &sums, sizeof sums);
}

// ---- Products of integers, 32 bits ("words") of k at a time ----

inline I32x16 load_words(const void* from) {
    I32x16 x;
    memcpy(&x, from, sizeof x);
    return x;
}
inline void store_words(void* to, I32x16 x) {
    memcpy(to, &x, sizeof x);
}
inline I32x16 operator+(I32x16 a, I32x16 b) {
    LOWBIT_EACH(I32x16, a.v[q] + b.v[q]);
}
// sum + a0 * b0 + a1 * b1 of two int16 in each word; `a` is one word for all lanes.
inline I32x16 add_dot_2(I32x16 sum, uint32_t a, I32x16 b) {
    const int32_t low = static_cast<int16_t>(a & 0xffff);
    const int32_t high = static_cast<int32_t>(a) >> 16;
    LOWBIT_EACH(I32x16,
                sum.v[q] + ((I32x4)((U32x4)b.v[q] << 16) >> 16) * low + (b.v[q] >> 16) * high);
}

// The same with a word for each lane.
inline I32x16 add_dot_2(I32x16 sum, I32x16 a, I32x16 b) {
    LOWBIT_EACH(I32x16,
                sum.v[q] +
                    ((I32x4)((U32x4)b.v[q] << 16) >> 16) * ((I32x4)((U32x4)a.v[q] << 16) >> 16) +
                    (b.v[q] >> 16) * (a.v[q] >> 16));
}

// Levels of 16 codes or fewer: to[i] = table[codes[i]] for 64 codes.
inline void lookup_bytes(const int8_t* table, const uint8_t* codes, int8_t* to) {
    for (int i = 0; i < 64; ++i) {
        to[i] = table[codes[i]];
    }
}

// Sums that stay in registers: 2 x 16 takes 8 of 16 registers of four floats.
constexpr int kRegisterRows = 2;
constexpr int kRegisterStrips = 1;

#undef LOWBIT_EACH
