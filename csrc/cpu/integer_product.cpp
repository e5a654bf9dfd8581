// The products of `product.hpp` that sum in integers.
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "isa.hpp"
#include "product.hpp"
#include "workspace.hpp"

namespace lowbit {

namespace {

// Codes that are packed; checks what they have in common.
PackCodesArgs code_operand(size_t rows, size_t columns, int bits, uintptr_t levels,
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

size_t codes_per_word(WordType type) {
    return type == WordType::int8 ? 4 : 2;
}

// Words of `codes` codes along k, in whole groups of four.
size_t code_steps(WordType type, size_t codes) {
    return ceil_divide(ceil_divide(codes, codes_per_word(type)), 4) * 4;
}

// What a Gram matrix in integers is made of.
struct IntegerRows {
    WordType type;
    size_t rows, columns;
    size_t segment;           // columns whose products share their scales; a multiple of a word
    const float* scales;      // [segments][rows]
    const int32_t* row_sums;  // [rows, segments], once packed; null: nothing to correct

    size_t segments() const { return ceil_divide(columns, segment); }
    size_t per_word() const { return codes_per_word(type); }
};

// out <- X X^T. Integer sums of a segment are scaled when they are complete: at the end if one
// segment covers the row, so that the sums wait in `out`, else segment by segment.
// pack(strip, panel, count, to) fills a strip of the columns [panel, panel + count).
template <typename Pack>
void integer_gram(const IntegerRows& x, float* out, int threads, const Pack& pack) {
    const ProductKernels& kernels = product_kernels();
    const size_t rows = x.rows;
    const int parts = useful_threads(threads, rows * rows * x.columns / 8);
    const size_t strips = ceil_divide(rows, kStrip);
    const size_t width = kernels.group_columns;
    const size_t groups = ceil_divide(rows, width);
    const bool whole_rows = x.segments() == 1;
    // Whole panels that are packed at once.
    const size_t fitting = kPackedWords * x.per_word() / (strips * kStrip) / kPanelColumns;
    const size_t chunk_columns =
        std::min(std::max<size_t>(fitting, 1), ceil_divide(x.columns, kPanelColumns)) *
        kPanelColumns;
    const Buffer<uint32_t> words(strips * kStrip * chunk_columns / x.per_word());
    const Buffer<int32_t> segment_sums(whole_rows ? 0 : static_cast<size_t>(parts) * rows * width);
    static_assert(sizeof(float) == sizeof(int32_t), "sums turn into floats in place");

    const auto scale_row = [&](size_t row, size_t first, size_t count, size_t segment,
                               const int32_t* sums, bool add) {
        const uint32_t correction =
            x.row_sums != nullptr
                ? 128 * static_cast<uint32_t>(x.row_sums[row * x.segments() + segment])
                : 0;
        const float* const scales = x.scales + segment * rows;
        kernels.scale_sums(sums, correction, scales[row], scales + first, count, add,
                           out + row * rows + first);
    };
    const auto run_group = [&](size_t group, size_t panel, size_t count, size_t strip_steps,
                               int32_t* own_sums) {
        const size_t first = group * width;
        MultiplyArgs args = {};
        args.type = x.type;
        args.a_steps = args.b_steps = strip_steps;
        args.rows = rows;
        args.columns = std::min(width, rows - first);
        args.upper = true;
        args.first_column = first;
        args.sums = whole_rows ? reinterpret_cast<int32_t*>(out) + first : own_sums;
        args.stride = whole_rows ? rows : width;
        args.add = whole_rows && panel != 0;
        for (size_t column = panel; column < panel + count;) {
            const size_t segment = column / x.segment;
            const size_t end = std::min(panel + count, (segment + 1) * x.segment);
            const size_t step = (column - panel) / x.per_word();
            args.a = words.get() + step * kStrip;
            args.b = args.a + first * strip_steps;
            args.steps = ceil_divide(end - panel, x.per_word()) - step;
            kernels.multiply(args);
            const int32_t* const sums = static_cast<const int32_t*>(args.sums);
            const bool complete = !whole_rows || end == x.columns;
            for (size_t row = 0; complete && row < std::min(rows, first + width); ++row) {
                scale_row(row, first, args.columns, segment, sums + row * args.stride,
                          !whole_rows && column != 0);
            }
            column = end;
        }
        if (panel + count == x.columns) {  // while the group is in this thread's cache
            kernels.mirror(out, rows, first, first + args.columns);
        }
    };
#pragma omp parallel num_threads(parts)
    {
        for (size_t chunk = 0; chunk < x.columns; chunk += chunk_columns) {
            const size_t count = std::min(chunk_columns, x.columns - chunk);
            const size_t steps = code_steps(x.type, count);
#pragma omp for schedule(static)
            for (size_t s = 0; s < strips; ++s) {
                for (size_t c = 0; c < count; c += kPanelColumns) {
                    pack(s, chunk + c, std::min(kPanelColumns, count - c),
                         words.get() + (s * steps + c / x.per_word()) * kStrip);
                }
            }
#pragma omp for schedule(static)
            for (size_t part = 0; part < static_cast<size_t>(parts); ++part) {
                int32_t* const own = segment_sums.get() + (whole_rows ? 0 : part * rows * width);
                // From the right, where a group of columns has the most rows, in turn.
                for (size_t g = part; g < groups; g += static_cast<size_t>(parts)) {
                    run_group(groups - 1 - g, chunk, count, steps, own);
                }
            }
        }
    }
}

// Scales [rows, blocks] -> [segments][rows], where segment s lies in block s * segment /
// block_size.
std::vector<float> segment_scales(const float* scales, const IntegerRows& x, size_t block_size) {
    const size_t blocks = ceil_divide(x.columns, block_size);
    std::vector<float> result(x.segments() * x.rows);
    for (size_t segment = 0; segment < x.segments(); ++segment) {
        const size_t block = segment * x.segment / block_size;
        for (size_t row = 0; row < x.rows; ++row) {
            result[segment * x.rows + row] = scales[row * blocks + block];
        }
    }
    return result;
}

// Whether there is nothing to sum; `out` is zero then.
bool is_empty_gram(size_t rows, size_t columns, uintptr_t out) {
    if (rows != 0 && columns == 0) {
        std::fill_n(pointer<float>(out, "out"), rows * rows, 0.0f);
    }
    return rows == 0 || columns == 0;
}

// Columns whose products of whole numbers up to kWholeLimit fit an int32 sum.
constexpr size_t kWholeSegment = 256;

}  // namespace

void code_gram(size_t rows, size_t columns, int bits, uintptr_t levels, uintptr_t packed,
               size_t row_bytes, uintptr_t scales, size_t block_size, uintptr_t out, int threads) {
    if (is_empty_gram(rows, columns, out)) {
        return;
    }
    float* const result = pointer<float>(out, "out");
    const ProductKernels& kernels = product_kernels();
    const bool whole_rows = block_size >= columns;
    expect(whole_rows || (block_size > 0 && block_size % 4 == 0 &&
                          (kPanelColumns % block_size == 0 || block_size % kPanelColumns == 0)),
           "block_size: expected all columns, or a multiple of 4 that divides " +
               std::to_string(kPanelColumns) + " or is a multiple of it, got " +
               std::to_string(block_size));
    PackCodesArgs codes = code_operand(rows, columns, bits, levels, packed, row_bytes);
    IntegerRows x = {};
    x.type = kernels.code_type;
    x.rows = rows;
    x.columns = columns;
    x.segment = whole_rows ? columns : std::min(block_size, kPanelColumns);
    const std::vector<float> by_segment =
        segment_scales(pointer<const float>(scales, "scales"), x, std::min(block_size, columns));
    x.scales = by_segment.data();
    std::vector<int32_t> row_sums(kernels.offset ? rows * x.segments() : 0, 0);
    x.row_sums = kernels.offset ? row_sums.data() : nullptr;
    codes.row_sums = kernels.offset ? row_sums.data() : nullptr;
    codes.sums_per_row = x.segments();
    codes.sum_block = x.segment;
    integer_gram(x, result, threads, [&](size_t strip, size_t panel, size_t count, uint32_t* to) {
        PackCodesArgs args = codes;
        args.panel = panel;
        args.count = count;
        args.to = to;
        kernels.pack_code_rows(args, strip * kStrip);
    });
}

void rounded_gram(size_t rows, size_t columns, uintptr_t x, ptrdiff_t row_stride,
                  ptrdiff_t column_stride, uintptr_t out, int threads) {
    if (is_empty_gram(rows, columns, out)) {
        return;
    }
    float* const result = pointer<float>(out, "out");
    const ProductKernels& kernels = product_kernels();
    PackWholeArgs floats = {};
    floats.x = pointer<const float>(x, "x");
    floats.row_stride = row_stride;
    floats.column_stride = column_stride;
    floats.rows = rows;
    std::vector<float> inverses(rows);
    floats.inverses = inverses.data();
    IntegerRows whole = {};
    whole.type = WordType::int16;
    whole.rows = rows;
    whole.columns = columns;
    whole.segment = kWholeSegment;
    std::vector<float> scales(rows * whole.segments());
    for (size_t row = 0; row < rows; ++row) {
        const float largest = kernels.largest_of_row(
            floats.x + static_cast<ptrdiff_t>(row) * row_stride, column_stride, columns);
        const bool finite = largest - largest == 0.0f;
        const float scale =
            finite ? largest / kWholeLimit : std::numeric_limits<float>::quiet_NaN();
        const bool usable = finite && scale >= std::numeric_limits<float>::min();
        inverses[row] = usable ? kWholeLimit / largest : 0.0f;
        for (size_t segment = 0; segment < whole.segments(); ++segment) {
            scales[segment * rows + row] = scale;
        }
    }
    whole.scales = scales.data();
    integer_gram(whole, result, threads,
                 [&](size_t strip, size_t panel, size_t count, uint32_t* to) {
                     PackWholeArgs args = floats;
                     args.panel = panel;
                     args.count = count;
                     args.to = to;
                     kernels.pack_whole(args, strip * kStrip);
                 });
}

void code_product(size_t out_rows, size_t rows, size_t columns, int bits, uintptr_t levels,
                  uintptr_t packed, size_t row_bytes, uintptr_t scales, uintptr_t a,
                  ptrdiff_t a_row_stride, ptrdiff_t a_column_stride, uintptr_t out,
                  size_t out_stride, float beta, int threads) {
    if (out_rows == 0 || columns == 0) {
        return;
    }
    float* const result = pointer<float>(out, "out");
    const ProductKernels& kernels = product_kernels();
    PackCodesArgs codes = code_operand(rows, columns, bits, levels, packed, row_bytes);
    const size_t steps = code_steps(kernels.code_type, rows);
    const size_t strips = ceil_divide(out_rows, kStrip);
    const Buffer<uint32_t> high(strips * steps * kStrip);
    const Buffer<uint32_t> low(strips * steps * kStrip);
    std::vector<float> limb_scales(out_rows);
    std::vector<int32_t> high_sums(out_rows), low_sums(out_rows);
    PackLimbsArgs limbs = {};
    limbs.a = pointer<const float>(a, "a");
    limbs.row_stride = a_row_stride;
    limbs.k_stride = a_column_stride;
    limbs.rows = out_rows;
    limbs.depth = rows;
    limbs.factors = pointer<const float>(scales, "scales");
    limbs.steps = steps;
    limbs.scales = limb_scales.data();
    limbs.high_sums = high_sums.data();
    limbs.low_sums = low_sums.data();

    const int parts = useful_threads(threads, out_rows * rows * columns / 4);
    const size_t width = kernels.group_columns;
    const size_t packed_steps = ceil_divide(rows, codes_per_word(kernels.code_type));
    const Buffer<uint32_t> words(kPanelColumns * packed_steps);
    // The sums of both limbs of a group of columns, for one thread.
    const Buffer<int32_t> sums(static_cast<size_t>(parts) * 2 * out_rows * width);
    const Buffer<float> scratch(static_cast<size_t>(parts) * rows);
    const uint32_t offset = kernels.offset ? 128 : 0;

    const auto run_group = [&](size_t panel, size_t count, size_t group, int32_t* upper) {
        int32_t* const lower = upper + out_rows * width;
        const size_t first = group * width;
        MultiplyArgs args = {};
        args.type = kernels.code_type;
        args.a_steps = steps;
        args.b = words.get() + first * packed_steps;
        args.b_steps = args.steps = packed_steps;
        args.rows = out_rows;
        args.columns = std::min(width, count - first);
        args.stride = width;
        args.a = high.get();
        args.sums = upper;
        kernels.multiply(args);
        args.a = low.get();
        args.sums = lower;
        kernels.multiply(args);
        for (size_t row = 0; row < out_rows; ++row) {
            kernels.join_limbs(upper + row * width, lower + row * width,
                               offset * static_cast<uint32_t>(high_sums[row]),
                               offset * static_cast<uint32_t>(low_sums[row]), limb_scales[row],
                               beta, args.columns, result + row * out_stride + panel + first);
        }
    };
#pragma omp parallel num_threads(parts) firstprivate(codes, limbs)
    {
#pragma omp for schedule(static)
        for (size_t part = 0; part < static_cast<size_t>(parts); ++part) {
            limbs.scratch = scratch.get() + part * rows;
            for (size_t s = part; s < strips; s += static_cast<size_t>(parts)) {
                limbs.high = high.get() + s * steps * kStrip;
                limbs.low = low.get() + s * steps * kStrip;
                kernels.pack_limbs(limbs, s * kStrip);
            }
        }
        for (size_t panel = 0; panel < columns; panel += kPanelColumns) {
            codes.panel = panel;
            codes.count = std::min(kPanelColumns, columns - panel);
            codes.to = words.get();
#pragma omp for schedule(static)
            for (size_t step = 0; step < packed_steps; ++step) {
                kernels.pack_code_columns(codes, step);
            }
            const size_t groups = ceil_divide(codes.count, width);
#pragma omp for schedule(static)
            for (size_t part = 0; part < static_cast<size_t>(parts); ++part) {
                int32_t* const upper = sums.get() + part * 2 * out_rows * width;
                for (size_t group = part; group < groups; group += static_cast<size_t>(parts)) {
                    run_group(panel, codes.count, group, upper);
                }
            }
        }
    }
}

}  // namespace lowbit
