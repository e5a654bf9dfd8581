// Matrix products in registers: packing and the tile of sums, one source for floats, int16, int8
// and bfloat16, compiled once for each ISA level into namespace lowbit::LOWBIT_ISA.
//
// One word of the left operand is broadcast against strips of sixteen words of the right one. All
// that differs between the types is the instruction that multiplies and adds a word.
//
// Integer sums are exact, so they are the same on every level and for every number of threads.
// Float sums are fused where the level can; their order over k is fixed by the caller's steps.
//
// No function of the C++ library may be used here: see interface.hpp.

#include "common.inl"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

#include "sums.inl"
#include "words.inl"

#if defined(LOWBIT_HAS_DOT_4)
constexpr WordType kCodeType = WordType::int8;
using LevelBits = uint8_t;
#else
constexpr WordType kCodeType = WordType::int16;
using LevelBits = uint16_t;
#endif
constexpr size_t kCodesPerWord = kCodeType == WordType::int8 ? 4 : 2;

// ---- Packing ----

// to[k][i] = rows[i][k] for `count` rows of `steps` words, in whole groups of four of both.
inline void interleave_rows(const uint32_t* rows, size_t row_stride, size_t count, size_t steps,
                            uint32_t* to) {
    for (size_t k = 0; k < steps; k += 4) {
        for (size_t i = 0; i < count; i += 4) {
            transpose_4x4(rows + i * row_stride + k, row_stride, to + k * kStrip + i, kStrip);
        }
    }
}

void pack_floats(const PackFloatsArgs& args) {
    float* const to = reinterpret_cast<float*>(args.to);
    if (args.row_stride == 1) {
        for (size_t k = 0; k < args.depth; ++k) {
            const float* const from = args.from + static_cast<ptrdiff_t>(k) * args.k_stride;
            store(to + k * kStrip, args.rows == kStrip ? load(from) : load_first(from, args.rows));
        }
        return;
    }
    if (args.rows < kStrip) {
        memset(args.to, 0, args.depth * kStrip * sizeof *args.to);
    }
    // Four rows by four steps at a time, then what is left of both.
    const size_t whole_rows = args.k_stride == 1 ? args.rows / 4 * 4 : 0;
    const size_t whole_steps = args.depth / 4 * 4;
    interleave_rows(reinterpret_cast<const uint32_t*>(args.from),
                    static_cast<size_t>(args.row_stride), whole_rows, whole_steps, args.to);
    for (size_t i = 0; i < args.rows; ++i) {
        const float* const from = args.from + static_cast<ptrdiff_t>(i) * args.row_stride;
        for (size_t k = i < whole_rows ? whole_steps : 0; k < args.depth; ++k) {
            to[k * kStrip + i] = from[static_cast<ptrdiff_t>(k) * args.k_stride];
        }
    }
}

#if defined(LOWBIT_HAS_BF16)
// A strip's floats at one step of k.
inline F32x16 gather_strip(const PackFloatsArgs& args, size_t k) {
    const float* const from = args.from + static_cast<ptrdiff_t>(k) * args.k_stride;
    if (args.row_stride == 1) {
        return args.rows == kStrip ? load(from) : load_first(from, args.rows);
    }
    float lanes[kStrip] = {};
    for (size_t i = 0; i < args.rows; ++i) {
        lanes[i] = from[static_cast<ptrdiff_t>(i) * args.row_stride];
    }
    return load(lanes);
}

void pack_bfloat16(const PackFloatsArgs& args) {
    constexpr size_t run = 64;  // floats of each row that are turned at a time
    constexpr size_t stride = run / 2 + 4;
    const size_t whole = args.k_stride == 1 && args.rows == kStrip ? args.depth / run * run : 0;
    for (size_t k = 0; k < whole; k += run) {
        alignas(64) uint32_t words[kStrip * stride];
        for (size_t i = 0; i < kStrip; ++i) {
            const float* const from = args.from + static_cast<ptrdiff_t>(i) * args.row_stride + k;
            for (size_t c = 0; c < run; c += 2 * kStrip) {
                store_words(words + i * stride + c / 2,
                            row_to_bfloat16(load(from + c), load(from + c + kStrip)));
            }
        }
        interleave_rows(words, stride, kStrip, run / 2, args.to + k / 2 * kStrip);
    }
    for (size_t k = whole; k < args.depth; k += 2) {
        const F32x16 second = k + 1 < args.depth ? gather_strip(args, k + 1) : broadcast(0.0f);
        store_words(args.to + k / 2 * kStrip, pairs_to_bfloat16(gather_strip(args, k), second));
    }
}
#endif

// Levels of the codes of a panel of one row. Loops over a WHOLE one are unrolled.
template <int BITS, bool WHOLE>
inline void decode_panel(const PackCodesArgs& args, size_t row, int8_t* to) {
    const size_t count = WHOLE ? kPanelColumns : args.count;
    PanelCodes codes;
    unpack<BITS>(args.packed + row * args.row_bytes, args.panel, count, args.columns, codes);
    if constexpr (BITS <= 4) {
        int8_t table[16];  // which `to` does not alias
        memcpy(table, args.levels, sizeof table);
        if constexpr (!WHOLE) {  // whatever is looked up is in the table
            memset(codes.code + count, 0, ceil_divide(count, 64) * 64 - count);
        }
        for (size_t c = 0; c < count; c += 64) {
            lookup_bytes(table, codes.code + c, to + c);
        }
    } else if (args.shifted) {
        const uint8_t first = static_cast<uint8_t>(args.levels[0]);
        const uint8_t last = args.last_code;
        for (size_t c = 0; c < count; ++c) {
            const uint8_t code = codes.code[c] < last ? codes.code[c] : last;
            to[c] = static_cast<int8_t>(static_cast<uint8_t>(code + first));
        }
    } else {
        for (size_t c = 0; c < count; ++c) {
            to[c] = args.levels[codes.code[c]];
        }
    }
}

template <int BITS>
inline void decode_levels(const PackCodesArgs& args, size_t row, int8_t* to) {
    if (args.count == kPanelColumns) {
        decode_panel<BITS, true>(args, row, to);
    } else {
        decode_panel<BITS, false>(args, row, to);
    }
}

inline void decode_levels(const PackCodesArgs& args, size_t row, int8_t* to) {
    switch (args.bits) {
        case 2:
            return decode_levels<2>(args, row, to);
        case 3:
            return decode_levels<3>(args, row, to);
        case 4:
            return decode_levels<4>(args, row, to);
        default:
            return decode_levels<8>(args, row, to);
    }
}

// As words of the level's type; columns past `count` up to a whole group of four words are zero.
inline void levels_to_words(int8_t* levels, size_t count, uint32_t* words) {
    memset(levels + count, 0, 16);
    const size_t padded = ceil_divide(count, 16) * 16;
    if constexpr (kCodeType == WordType::int8) {
        memcpy(words, levels, padded);
    } else {
        int16_t* const wide = reinterpret_cast<int16_t*>(words);
        for (size_t c = 0; c < padded; ++c) {
            wide[c] = levels[c];
        }
    }
}

constexpr size_t kPanelWords = kPanelColumns / kCodesPerWord;

// Adds the levels of a panel of one row to the sums of its blocks.
inline void add_level_sums(const PackCodesArgs& args, const int8_t* levels, int32_t* sums) {
    for (size_t c = 0; c < args.count;) {
        const size_t block = (args.panel + c) / args.sum_block;
        const size_t end = min_size(args.count, (block + 1) * args.sum_block - args.panel);
        int32_t sum = 0;
        for (; c < end; ++c) {
            sum += levels[c];
        }
        sums[block] += sum;
    }
}

void pack_code_rows(const PackCodesArgs& args, size_t first_row) {
    // Off a power of two, or the rows of a column would compete for the same set of the cache.
    constexpr size_t stride = kPanelWords + 16;
    alignas(64) uint32_t words[kStrip * stride];
    alignas(64) int8_t levels[kPanelColumns + 64];
    const size_t rows = min_size(kStrip, args.rows - first_row);
    const size_t steps = ceil_divide(args.count, kCodesPerWord);
    for (size_t i = 0; i < kStrip; ++i) {
        if (i < rows) {
            decode_levels(args, first_row + i, levels);
        } else {
            memset(levels, 0, args.count);
        }
        levels_to_words(levels, args.count, words + i * stride);
        if (args.row_sums != nullptr && i < rows) {
            add_level_sums(args, levels, args.row_sums + (first_row + i) * args.sums_per_row);
        }
    }
    interleave_rows(words, stride, kStrip, ceil_divide(steps, 4) * 4, args.to);
}

void pack_code_columns(const PackCodesArgs& args, size_t step) {
    alignas(64) int8_t levels[kCodesPerWord][kPanelColumns + 64];
    for (size_t j = 0; j < kCodesPerWord; ++j) {
        const size_t row = step * kCodesPerWord + j;
        if (row < args.rows) {
            decode_levels(args, row, levels[j]);
            memset(levels[j] + args.count, 0, 16);
        } else {
            memset(levels[j], 0, sizeof levels[j]);
        }
    }
    size_t c = 0;
#if defined(LOWBIT_HAS_DOT_4)
    for (; c + 64 <= args.count; c += 64) {
        interleave_bytes(levels[0] + c, sizeof levels[0],
                         args.to + (c / kStrip * args.steps + step) * kStrip, args.steps * kStrip);
    }
#endif
    for (; c < args.count; c += kStrip) {
        uint32_t* const to = args.to + (c / kStrip * args.steps + step) * kStrip;
        for (size_t i = 0; i < kStrip; ++i) {
            // In arithmetic of words: bytes stored one at a time were six times slower.
            uint32_t word = 0;
            for (size_t j = 0; j < kCodesPerWord; ++j) {
                const auto bits = static_cast<LevelBits>(levels[j][c + i]);
                word |= static_cast<uint32_t>(bits) << (j * 32 / kCodesPerWord);
            }
            to[i] = word;
        }
    }
}

// The nearest whole number to x, |x| < 2^22, ties to even.
inline int32_t round_to_int(float x) {
    const float shifted = x + 12582912.0f;  // 1.5 * 2^23: its unit in the last place is one
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return bits - 0x4b400000;
}

struct LimbScale {
    float scale;    // NaN if a value is not finite
    float inverse;  // zero if there is no finite one
};

inline LimbScale limb_scale(const float* values, size_t count) {
    const float largest = largest_magnitude(values, count);
    const float scale = largest / kLimbLimit;
    const bool finite = largest - largest == 0.0f;
    return {finite ? scale : __builtin_nanf(""),
            finite && scale >= kSmallestScale ? kLimbLimit / largest : 0.0f};
}

// Adds the limbs to their sums.
template <typename Limb>
inline void split_limbs(const float* __restrict values, size_t count, float inverse,
                        Limb* __restrict high, Limb* __restrict low, int32_t* high_sum,
                        int32_t* low_sum) {
    uint32_t upper_sum = 0, lower_sum = 0;
    for (size_t k = 0; k < count; ++k) {
        const int32_t whole = round_to_int(values[k] * inverse);
        const int32_t lower = ((whole + 128) & 255) - 128;
        const int32_t upper = (whole - lower) >> 8;
        low[k] = static_cast<Limb>(lower);
        high[k] = static_cast<Limb>(upper);
        lower_sum += static_cast<uint32_t>(lower);
        upper_sum += static_cast<uint32_t>(upper);
    }
    *high_sum += static_cast<int32_t>(upper_sum);
    *low_sum += static_cast<int32_t>(lower_sum);
}

void pack_limbs(const PackLimbsArgs& args, size_t first_row) {
    constexpr size_t stride = kPanelWords + 16;
    alignas(64) uint32_t high_words[kStrip * stride];
    alignas(64) uint32_t low_words[kStrip * stride];
    alignas(64) float values[kPanelColumns];
    alignas(64) int8_t high[kPanelColumns + 64];
    alignas(64) int8_t low[kPanelColumns + 64];
    const size_t rows = min_size(kStrip, args.rows - first_row);
    float inverse[kStrip];
    for (size_t i = 0; i < rows; ++i) {
        const float* const a = args.a + static_cast<ptrdiff_t>(first_row + i) * args.row_stride;
        for (size_t k = 0; k < args.depth; ++k) {
            args.scratch[k] = a[static_cast<ptrdiff_t>(k) * args.k_stride] * args.factors[k];
        }
        const LimbScale scale = limb_scale(args.scratch, args.depth);
        inverse[i] = scale.inverse;
        args.scales[first_row + i] = scale.scale;
        args.high_sums[first_row + i] = args.low_sums[first_row + i] = 0;
    }
    for (size_t panel = 0; panel < args.depth; panel += kPanelColumns) {
        const size_t count = min_size(kPanelColumns, args.depth - panel);
        for (size_t i = 0; i < kStrip; ++i) {
            if (i >= rows) {
                memset(high_words + i * stride, 0, stride * sizeof *high_words);
                memset(low_words + i * stride, 0, stride * sizeof *low_words);
                continue;
            }
            const float* const a = args.a +
                                   static_cast<ptrdiff_t>(first_row + i) * args.row_stride +
                                   static_cast<ptrdiff_t>(panel) * args.k_stride;
            for (size_t k = 0; k < count; ++k) {
                values[k] = a[static_cast<ptrdiff_t>(k) * args.k_stride] * args.factors[panel + k];
            }
            split_limbs(values, count, inverse[i], high, low, args.high_sums + first_row + i,
                        args.low_sums + first_row + i);
            levels_to_words(high, count, high_words + i * stride);
            levels_to_words(low, count, low_words + i * stride);
        }
        const size_t steps = ceil_divide(ceil_divide(count, kCodesPerWord), 4) * 4;
        const size_t at = panel / kCodesPerWord * kStrip;
        interleave_rows(high_words, stride, kStrip, steps, args.high + at);
        interleave_rows(low_words, stride, kStrip, steps, args.low + at);
    }
}

// ---- The tile ----

template <WordType TYPE, int STRIPS>
inline void multiply_tile(const MultiplyArgs& args, size_t row, size_t column) {
    using W = Words<TYPE>;
    const uint32_t* a = args.a + row / kStrip * args.a_steps * kStrip + row % kStrip;
    const uint32_t* const b = args.b + column / kStrip * args.b_steps * kStrip;
    const size_t b_stride = args.b_steps * kStrip;
    typename W::Lanes sums[kRegisterRows][STRIPS];
#pragma GCC unroll 8
    for (int r = 0; r < kRegisterRows; ++r) {
#pragma GCC unroll 4
        for (int s = 0; s < STRIPS; ++s) {
            sums[r][s] = W::zero();
        }
    }
    for (size_t k = 0; k < args.steps * kStrip; k += kStrip) {
        typename W::Strip strip[STRIPS];
#pragma GCC unroll 4
        for (int s = 0; s < STRIPS; ++s) {
            strip[s] = W::load_strip(b + static_cast<size_t>(s) * b_stride + k);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRegisterRows; ++r) {
#pragma GCC unroll 4
            for (int s = 0; s < STRIPS; ++s) {
                sums[r][s] = W::multiply(sums[r][s], a + k + r, strip[s]);
            }
        }
    }
// Unrolled, or the sums would be indexed and live in memory.
#pragma GCC unroll 8
    for (int r = 0; r < kRegisterRows; ++r) {
        if (row + static_cast<size_t>(r) < args.rows) {
#pragma GCC unroll 4
            for (int s = 0; s < STRIPS; ++s) {
                const size_t first = column + static_cast<size_t>(s) * kStrip;
                finish_strip(args, sums[r][s], row + static_cast<size_t>(r), first,
                             args.columns - first);
            }
        }
    }
}

// A group of columns stays in L1 while the rows pass by.
template <WordType TYPE, int STRIPS>
inline void multiply_group(const MultiplyArgs& args, size_t column) {
    const size_t beyond = args.first_column + column + STRIPS * kStrip;
    const size_t rows = args.upper ? min_size(args.rows, beyond) : args.rows;
    for (size_t row = 0; row < rows; row += kRegisterRows) {
        multiply_tile<TYPE, STRIPS>(args, row, column);
    }
}

template <WordType TYPE, int STRIPS = kRegisterStrips>
inline void multiply_columns(const MultiplyArgs& args, size_t column) {
    for (; column + (STRIPS - 1) * kStrip < args.columns; column += STRIPS * kStrip) {
        multiply_group<TYPE, STRIPS>(args, column);
    }
    if constexpr (STRIPS > 1) {
        multiply_columns<TYPE, STRIPS - 1>(args, column);
    }
}

void multiply(const MultiplyArgs& args) {
    switch (args.type) {
        case WordType::float32:
            return multiply_columns<WordType::float32>(args, 0);
        case WordType::int16:
            return multiply_columns<WordType::int16>(args, 0);
        case WordType::int8:
#if defined(LOWBIT_HAS_DOT_4)
            return multiply_columns<WordType::int8>(args, 0);
#else
            return;
#endif
        case WordType::bfloat16:
#if defined(LOWBIT_HAS_BF16)
            return multiply_columns<WordType::bfloat16>(args, 0);
#else
            return;
#endif
    }
}

// ---- After the last step ----

inline float corrected(int32_t sum, uint32_t correction) {
    return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sum) - correction));
}

void scale_sums(const int32_t* sums, uint32_t correction, float row_scale, const float* scales,
                size_t count, bool add, float* out) {
    for (size_t i = 0; i < count; ++i) {
        const float value = corrected(sums[i], correction) * (row_scale * scales[i]);
        out[i] = add ? out[i] + value : value;
    }
}

void join_limbs(const int32_t* high, const int32_t* low, uint32_t high_correction,
                uint32_t low_correction, float scale, float beta, size_t count, float* out) {
    for (size_t i = 0; i < count; ++i) {
        const float upper = corrected(high[i], high_correction);
        const float lower = corrected(low[i], low_correction);
        const float value = scale * (256.0f * upper + lower);
        out[i] = beta == 0.0f ? value : beta * out[i] + value;
    }
}

void add_scaled(float* to, const float* x, ptrdiff_t x_stride, float factor, const float* factors,
                size_t count) {
    if (x_stride == 1 && factors == nullptr) {
        for (size_t i = 0; i < count; ++i) {
            to[i] += factor * x[i];
        }
    } else if (x_stride == 1) {
        for (size_t i = 0; i < count; ++i) {
            to[i] += factor * factors[i] * x[i];
        }
    } else {
        for (size_t i = 0; i < count; ++i) {
            const float scale = factors == nullptr ? factor : factor * factors[i];
            to[i] += scale * x[static_cast<ptrdiff_t>(i) * x_stride];
        }
    }
}

// In blocks of sixteen columns: their rows above the diagonal are whole cache lines.
void mirror(float* matrix, size_t stride, size_t begin, size_t end) {
    const size_t whole = begin / kStrip * kStrip;
    for (size_t block = 0; block < whole; block += kStrip) {
        size_t row = begin;
        for (; row + 4 <= end; row += 4) {
            for (size_t column = block; column < block + kStrip; column += 4) {
                transpose_4x4(matrix + column * stride + row, stride,
                              matrix + row * stride + column, stride);
            }
        }
        for (; row < end; ++row) {
            for (size_t column = block; column < block + kStrip; ++column) {
                matrix[row * stride + column] = matrix[column * stride + row];
            }
        }
    }
    for (size_t row = begin; row < end; ++row) {
        for (size_t column = whole; column < row; ++column) {
            matrix[row * stride + column] = matrix[column * stride + row];
        }
    }
}

#include "inverse.inl"
#include "narrow.inl"

}  // namespace

extern const ProductKernels product_kernels;
const ProductKernels product_kernels = {kCodeType,
                                        kCodeType == WordType::int8,
                                        0,
                                        nullptr,
                                        kRegisterStrips * kStrip,
                                        pack_floats,
#if defined(LOWBIT_HAS_BF16)
                                        pack_bfloat16,
#else
                                        nullptr,
#endif
                                        pack_code_rows,
                                        pack_code_columns,
                                        pack_limbs,
                                        round_limbs,
                                        add_code_columns,
                                        dot_code_rows,
                                        multiply,
                                        scale_sums,
                                        join_limbs,
                                        add_scaled,
                                        mirror,
                                        factor_small,
                                        square_small};

}  // namespace LOWBIT_ISA
}  // namespace lowbit
