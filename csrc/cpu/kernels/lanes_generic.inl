// Sixteen lanes for any processor, in the vector extensions of gcc and clang.

typedef float F32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef double F64x16 __attribute__((vector_size(128)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));
typedef uint8_t U8x16 __attribute__((vector_size(16)));

inline F32x16 broadcast(float value) {
    return value - F32x16{};
}
inline F32x16 load(const float* from) {
    F32x16 x;
    memcpy(&x, from, sizeof x);
    return x;
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
inline U32x16 load_words(const uint16_t* from) {
    U16x16 words;
    memcpy(&words, from, sizeof words);
    return __builtin_convertvector(words, U32x16);
}
inline F32x16 load_bfloat16(const uint16_t* from) {
    return (F32x16)(load_words(from) << 16);
}
inline F32x16 load_float16(const uint16_t* from) {
    const U32x16 half = load_words(from);
    const U32x16 magnitude = (half & 0x7fff) << 13;
    // The exponent bias grows from 15 to 127. Multiplying, not adding to the exponent, normalises
    // subnormal halves as well; infinities and NaNs get an exponent of all ones.
    const U32x16 finite = (U32x16)((F32x16)magnitude * 0x1p112f);
    const U32x16 special = (U32x16)(magnitude >= 0x7c00u << 13) & 0x7f800000u;
    return (F32x16)((half & 0x8000) << 16 | finite | special);
}

inline I32x16 zero_codes() {
    return I32x16{};
}
inline I32x16 load_codes(const uint8_t* from) {
    U8x16 codes;
    memcpy(&codes, from, sizeof codes);
    return __builtin_convertvector(codes, I32x16);
}
inline void store_codes(uint8_t* to, I32x16 codes) {
    const U8x16 bytes = __builtin_convertvector(codes, U8x16);
    memcpy(to, &bytes, sizeof bytes);
}

// table[index] for index < 2^LOG2.
template <int LOG2>
inline F32x16 lookup(const float* table, I32x16 index) {
    F32x16 out;
    for (int lane = 0; lane < 16; ++lane) {
        out[lane] = table[index[lane]];
    }
    return out;
}

// 2 * node + (z > threshold)
inline I32x16 descend(I32x16 node, F32x16 z, F32x16 threshold) {
    return node + node - (z > threshold);  // true is -1
}

// Magnitudes compare like their bit patterns, and so a NaN is the largest of all.
inline I32x16 max_magnitude(I32x16 largest, F32x16 x) {
    const I32x16 magnitude = (I32x16)x & 0x7fffffff;
    return magnitude > largest ? magnitude : largest;
}
inline void store_bits(uint32_t* to, I32x16 bits) {
    memcpy(to, &bits, sizeof bits);
}

inline F64x16 zero_sums() {
    return F64x16{};
}
// A float squared is exact in double, so fused and separate rounding agree.
inline F64x16 add_squares(F64x16 sums, F32x16 x) {
    const F64x16 wide = __builtin_convertvector(x, F64x16);
    return sums + wide * wide;
}
inline void store_sums(double* to, F64x16 sums) {
    memcpy(to, &sums, sizeof sums);
}
