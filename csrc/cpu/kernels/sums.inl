// Where a strip of finished sums goes: product.inl and amx.cpp.

// What becomes of a strip of sums; `count` of its columns are wanted.
inline void finish_strip(const MultiplyArgs& args, F32x16 sum, size_t row, size_t column,
                         size_t count) {
    float* const to = static_cast<float*>(args.sums) + row * args.stride + column;
    const float* from = nullptr;
    float weight = 1.0f;
    if (args.add) {
        from = to;
    } else if (args.beta != 0.0f) {
        from = args.addend + row * args.addend_stride + column;
        weight = args.beta;
    }
    F32x16 value = broadcast(args.alpha) * sum;
    if (count >= kStrip) {
        if (from != nullptr) {
            value = value + broadcast(weight) * load(from);
        }
        store(to, value);
    } else {
        if (from != nullptr) {
            value = value + broadcast(weight) * load_first(from, count);
        }
        store_first(to, value, count);
    }
}

inline void finish_strip(const MultiplyArgs& args, I32x16 sum, size_t row, size_t column,
                         size_t count) {
    int32_t* const to = static_cast<int32_t*>(args.sums) + row * args.stride + column;
    if (count >= kStrip) {
        store_words(to, args.add ? load_words(to) + sum : sum);
        return;
    }
    int32_t lanes[kStrip];
    store_words(lanes, sum);
    for (size_t i = 0; i < count; ++i) {
        const uint32_t before = args.add ? static_cast<uint32_t>(to[i]) : 0;
        to[i] = static_cast<int32_t>(before + static_cast<uint32_t>(lanes[i]));
    }
}
