// Words of 32 bits along k by their type: sixteen lanes of sums, and the instruction that
// multiplies and adds to them. Included after the level's lanes, by product.inl and
// bench/csrc/peaks.cpp.

template <WordType TYPE>
struct Words;

template <>
struct Words<WordType::float32> {
    using Lanes = F32x16;
    using Strip = F32x16;
    using Element = float;
    static Lanes zero() { return broadcast(0.0f); }
    static Strip load_strip(const uint32_t* b) { return load(reinterpret_cast<const float*>(b)); }
    static Lanes multiply(Lanes sum, const uint32_t* a, Strip b) {
        return multiply_add(sum, *reinterpret_cast<const float*>(a), b);
    }
};
template <>
struct Words<WordType::int16> {
    using Lanes = I32x16;
    using Strip = I32x16;
    using Element = int32_t;
    static Lanes zero() { return zero_codes(); }
    static Strip load_strip(const uint32_t* b) { return load_words(b); }
    static Lanes multiply(Lanes sum, const uint32_t* a, Strip b) { return add_dot_2(sum, *a, b); }
};
#if defined(LOWBIT_HAS_DOT_4)
template <>
struct Words<WordType::int8> {
    using Lanes = I32x16;
    using Strip = I32x16;
    using Element = int32_t;
    static Lanes zero() { return zero_codes(); }
    static Strip load_strip(const uint32_t* b) { return load_unsigned(b); }
    static Lanes multiply(Lanes sum, const uint32_t* a, Strip b) { return add_dot_4(sum, *a, b); }
};
#endif
#if defined(LOWBIT_HAS_BF16)
template <>
struct Words<WordType::bfloat16> {
    using Lanes = F32x16;
    using Strip = I32x16;
    using Element = float;
    static Lanes zero() { return broadcast(0.0f); }
    static Strip load_strip(const uint32_t* b) { return load_words(b); }
    static Lanes multiply(Lanes sum, const uint32_t* a, Strip b) {
        return add_dot_bf16(sum, *a, b);
    }
};
#endif
