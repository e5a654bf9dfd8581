// What integer_product.cpp and narrow_product.cpp share.
#pragma once

#include <algorithm>

#include "arguments.hpp"
#include "kernels/interface.hpp"
#include "workspace.hpp"

namespace lowbit {

// Codes [batch, rows, row_bytes] that are packed; checks what they have in common.
inline PackCodesArgs code_operand(size_t rows, size_t columns, int bits, uintptr_t levels,
                                  uintptr_t packed, size_t row_bytes) {
    expect_bits(bits);
    PackCodesArgs args = {};
    args.packed = pointer<const uint8_t>(packed, "packed");
    args.row_bytes = row_bytes;
    args.rows = rows;
    args.columns = columns;
    args.bits = bits;
    args.levels = pointer<const int8_t>(levels, "levels");
    // Linear codebooks need no table; it is padded with the last level.
    const int first = args.levels[0];
    const int last_code = args.levels[kMaxLevels - 1] - first;
    args.shifted = last_code >= 0;
    args.last_code = static_cast<uint8_t>(last_code);
    for (int code = 0; code < static_cast<int>(kMaxLevels); ++code) {
        const int level = first + std::min(code, last_code);
        args.shifted = args.shifted && args.levels[code] == level;
    }
    return args;
}

inline size_t codes_per_word(WordType type) {
    return type == WordType::int8 ? 4 : 2;
}

// Words of `codes` codes along k, in whole groups of four or whole tiles.
inline size_t code_steps(const ProductKernels& kernels, size_t codes) {
    const size_t group = std::max<size_t>(4, kernels.tile_steps);
    return ceil_divide(ceil_divide(codes, codes_per_word(kernels.code_type)), group) * group;
}

// Up to so many rows `code_product` decodes codes where it multiplies them: with more, packing them
// first is as fast or faster (AVX-512 VNNI; on AVX2 only beyond 64).
constexpr size_t kNarrowRows = 12;

// `code_product` for few rows, with the same bits.
void narrow_code_product(size_t batch, size_t out_rows, const PackCodesArgs& codes,
                         const float* scales,  // [batch, rows of the codes]
                         const Matrices& a, float* results, float beta, int threads);

}  // namespace lowbit
