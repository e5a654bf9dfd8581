// A sum of terms of one row: a buffer, decoded codes and a gradient, each with its weight.
//
// Codebooks travel as kernel arguments (constant memory: no copy to the device, nothing to cache,
// safe in a CUDA graph) and are copied to shared memory, where each lane looks up its own entry.
#pragma once

#include "rows.cuh"

namespace lowbit {

struct Codebook {
    float levels[kMaxLevels];
    float thresholds[kMaxLevels];  // ascending; filled up with infinity
    int last_code;
};

struct CodeTerm {
    const uint8_t* packed;  // [rows, row_bytes]; null: absent
    const float* scales;    // [rows, blocks]
    float weight;
};

// What a sum of terms is read from.
struct Terms {
    OutputRows buffer;  // float32, only in `accumulate_rows`
    float buffer_weight;
    CodeTerm codes;
    InputRows grad;
    float grad_weight;
    int64_t rows;
    int columns;
    int block;  // columns that share a scale

    __device__ __forceinline__ RowScales scales_of(const float* scales, int64_t row) const {
        const int blocks = ceil_divide(columns, block);
        return {scales + row * blocks, block, blocks == 1};
    }
};

struct Shared {
    double sums[kMaxWarps];
    uint32_t largest[kMaxWarps];
    float levels[kMaxLevels];
    float thresholds[kMaxLevels];

    // The values of a row, where they are kept.
    __device__ __forceinline__ float* values() { return reinterpret_cast<float*>(this + 1); }
};
static_assert(sizeof(Shared) % 16 == 0, "values are read by quads");

__device__ __forceinline__ Shared& shared_tables() {
    return *reinterpret_cast<Shared*>(dynamic_shared());
}

template <int BITS>
__device__ __forceinline__ void load_tables(Shared& shared, const Codebook& book) {
    for (int i = threadIdx.x; i < 1 << BITS; i += blockDim.x) {
        shared.levels[i] = book.levels[i];
        shared.thresholds[i] = book.thresholds[i];
    }
    __syncthreads();
}

// The terms that are present, added up in the reference's order. BITS 0: no codes.
template <int BITS>
__device__ __forceinline__ Quad sum_of_terms(const Terms& terms, const float* levels, int64_t row,
                                             int column, int count) {
    Quad sum = {};
    if (terms.buffer.data != nullptr && terms.buffer_weight != 0.0f) {
        sum = load_numbers(terms.buffer.at(row, column), kFloat32, count);
        for (int i = 0; i < kQuad; ++i) {
            sum.v[i] = __fmul_rn(sum.v[i], terms.buffer_weight);
        }
    }
    if constexpr (BITS != 0) {
        if (terms.codes.packed != nullptr) {
            const uint8_t* const packed = terms.codes.packed + row * row_bytes(BITS, terms.columns);
            const uint32_t codes = load_quad<BITS>(packed, column, terms.columns);
            const Quad scale = terms.scales_of(terms.codes.scales, row).quad(column, terms.columns);
            for (int i = 0; i < kQuad; ++i) {
                const float value = __fmul_rn(levels[codes >> 8 * i & 0xff], scale.v[i]);
                sum.v[i] = __fadd_rn(sum.v[i], __fmul_rn(value, terms.codes.weight));
            }
        }
    }
    if (terms.grad.data != nullptr) {
        const Quad grad = load_numbers(terms.grad.at(row, column), terms.grad.type, count);
        for (int i = 0; i < kQuad; ++i) {
            sum.v[i] = __fadd_rn(sum.v[i], __fmul_rn(grad.v[i], terms.grad_weight));
        }
    }
    return sum;
}

// ---- Host: arguments ----

// Levels past the end repeat the last one.
inline Codebook make_book(const float* levels, const float* thresholds, int level_count) {
    Codebook book = {};
    for (int i = 0; i < kMaxLevels; ++i) {
        book.levels[i] = level_count ? levels[min_int(i, level_count - 1)] : 0.0f;
        const bool inside = thresholds != nullptr && i < level_count - 1;
        book.thresholds[i] = inside ? thresholds[i] : __builtin_inff();
    }
    book.last_code = level_count - 1;
    return book;
}

// Columns are counted in ints, which must not overflow at the end of the last stride.
constexpr int kMaxColumns = 1 << 30;

inline bool is_valid(const Terms& terms, int bits, int level_count) {
    const bool known_bits = bits == 2 || bits == 3 || bits == 4 || bits == 8;
    return terms.rows > 0 && terms.rows < int64_t{1} << 31 && terms.columns > 0 &&
           terms.columns <= kMaxColumns &&
           (bits == 0 ||
            (known_bits && terms.block > 0 && level_count > 0 && level_count <= 1 << bits));
}

// Calls `run` with the bits as a constant.
template <typename Run>
int with_bits(int bits, const Run& run) {
    switch (bits) {
        case 2:
            return run(std::integral_constant<int, 2>());
        case 3:
            return run(std::integral_constant<int, 3>());
        case 4:
            return run(std::integral_constant<int, 4>());
        default:
            return run(std::integral_constant<int, 8>());
    }
}

}  // namespace lowbit
