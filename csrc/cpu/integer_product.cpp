// The products of `product.hpp` that sum in integers.
#include "integer_product.hpp"

#include <algorithm>

#include "isa.hpp"
#include "product.hpp"
#include "workspace.hpp"

namespace lowbit {

// The columns of a segment share their scales. Integer sums of a segment are scaled when they are
// complete: at the end if one segment covers the row, so that the sums wait in `out`, else segment
// by segment.
void code_gram(size_t batch, size_t rows, size_t columns, int bits, uintptr_t levels,
               uintptr_t packed, size_t row_bytes, uintptr_t scales, size_t block_size,
               uintptr_t out, int threads) {
    if (batch == 0 || rows == 0) {
        return;
    }
    float* const results = pointer<float>(out, "out");
    if (columns == 0) {
        std::fill_n(results, batch * rows * rows, 0.0f);
        return;
    }
    const bool whole_rows = block_size >= columns;
    const ProductKernels* const with_tiles = &product_kernels();
    const size_t tile_codes = with_tiles->tile_steps * codes_per_word(with_tiles->code_type);
    const bool tiles = tile_codes != 0 && (whole_rows || block_size % tile_codes == 0);
    const ProductKernels& kernels = tiles ? *with_tiles : vector_kernels();
    expect(whole_rows || (block_size > 0 && block_size % 4 == 0 &&
                          (kPanelColumns % block_size == 0 || block_size % kPanelColumns == 0)),
           "block_size: expected all columns, or a multiple of 4 that divides ", kPanelColumns,
           " or is a multiple of it, got ", block_size);
    const PackCodesArgs codes = code_operand(rows, columns, bits, levels, packed, row_bytes);
    const float* const block_scales = pointer<const float>(scales, "scales");
    const size_t block = std::min(block_size, columns);
    const size_t blocks = ceil_divide(columns, block);
    const size_t segment = whole_rows ? columns : std::min(block, kPanelColumns);
    const size_t segments = ceil_divide(columns, segment);

    const Threads split = split_threads(threads, batch, rows * rows * columns / 8);
    const size_t per_word = codes_per_word(kernels.code_type);
    const size_t strips = ceil_divide(rows, kStrip);
    const size_t width = kernels.group_columns;
    const size_t groups = ceil_divide(rows, width);
    // Whole panels that are packed at once; for tiles twice, the second time turned.
    const size_t most_words = tiles ? kPackedWords / 2 : kPackedWords;
    const size_t fitting = most_words * per_word / (strips * kStrip) / kPanelColumns;
    const size_t chunk_columns =
        std::min(std::max<size_t>(fitting, 1), ceil_divide(columns, kPanelColumns)) * kPanelColumns;
    const size_t packed_words = strips * kStrip * chunk_columns / per_word;
    const Buffer<uint32_t> words(packed_words, split.matrices);
    const Buffer<uint32_t> turned(tiles ? packed_words : 0, split.matrices);
    const Buffer<int32_t> segment_sums(whole_rows ? 0 : rows * width, split.all());
    const Buffer<float> segment_scales(segments * rows, split.matrices);  // [segments, rows]
    // [rows, segments], once packed; empty if there is nothing to correct
    const Buffer<int32_t> row_sums(kernels.offset ? rows * segments : 0, split.matrices);
    static_assert(sizeof(float) == sizeof(int32_t), "sums turn into floats in place");

    const auto run_group = [&](float* result, size_t group, size_t panel, size_t count,
                               size_t worker, size_t part) {
        const size_t first = group * width;
        const uint32_t* const right = words.get(worker);
        const uint32_t* const left = tiles ? turned.get(worker) : right;
        const int32_t* const corrections = kernels.offset ? row_sums.get(worker) : nullptr;
        MultiplyArgs args = {};
        args.type = kernels.code_type;
        args.a_steps = args.b_steps = code_steps(kernels, count);
        args.rows = rows;
        args.columns = std::min(width, rows - first);
        args.upper = true;
        args.first_column = first;
        int32_t* const sums = whole_rows ? reinterpret_cast<int32_t*>(result) + first
                                         : segment_sums.get(worker + part);
        args.sums = sums;
        args.stride = whole_rows ? rows : width;
        args.add = whole_rows && panel != 0;
        for (size_t column = panel; column < panel + count;) {
            const size_t index = column / segment;
            const size_t end = std::min(panel + count, (index + 1) * segment);
            const size_t step = (column - panel) / per_word;
            args.a = left + step * kStrip;
            args.b = right + step * kStrip + first * args.b_steps;
            args.steps = ceil_divide(end - panel, per_word) - step;
            kernels.multiply(args);
            const bool complete = !whole_rows || end == columns;
            const float* const scale = segment_scales.get(worker) + index * rows;
            for (size_t row = 0; complete && row < std::min(rows, first + width); ++row) {
                const uint32_t correction =
                    corrections != nullptr
                        ? 128 * static_cast<uint32_t>(corrections[row * segments + index])
                        : 0;
                kernels.scale_sums(sums + row * args.stride, correction, scale[row], scale + first,
                                   args.columns, !whole_rows && column != 0,
                                   result + row * rows + first);
            }
            column = end;
        }
        if (panel + count == columns) {  // while the group is in this thread's cache
            kernels.mirror(result, rows, first, first + args.columns);
        }
    };
    parallel_for(split.matrices, batch, [&](size_t matrix, size_t worker) {
        float* const result = results + matrix * rows * rows;
        for (size_t index = 0; index < segments; ++index) {
            const float* const from =
                block_scales + matrix * rows * blocks + index * segment / block;
            float* const to = segment_scales.get(worker) + index * rows;
            for (size_t row = 0; row < rows; ++row) {
                to[row] = from[row * blocks];
            }
        }
        PackCodesArgs own = codes;
        own.packed += matrix * rows * row_bytes;
        own.sums_per_row = segments;
        own.sum_block = segment;
        if (kernels.offset) {
            own.row_sums = row_sums.get(worker);
            std::fill_n(own.row_sums, rows * segments, 0);
        }
        for (size_t chunk = 0; chunk < columns; chunk += chunk_columns) {
            const size_t count = std::min(chunk_columns, columns - chunk);
            const size_t steps = code_steps(kernels, count);
            parallel_for(split.within, strips, [&](size_t strip, size_t) {
                uint32_t* const packed = words.get(worker) + strip * steps * kStrip;
                const size_t whole = count / kPanelColumns * kPanelColumns / per_word;
                if (tiles) {  // what follows the last code
                    std::fill(packed + whole * kStrip, packed + steps * kStrip, 0u);
                }
                PackCodesArgs args = own;
                for (size_t c = 0; c < count; c += kPanelColumns) {
                    args.panel = chunk + c;
                    args.count = std::min(kPanelColumns, count - c);
                    args.to = packed + c / per_word * kStrip;
                    kernels.pack_code_rows(args, strip * kStrip);
                }
                if (tiles) {
                    uint32_t* const to = turned.get(worker) + strip * steps * kStrip;
                    std::copy_n(packed, steps * kStrip, to);
                    kernels.turn_strip(to, steps);
                }
            });
            // From the right, where a group of columns has the most rows.
            parallel_in_turn(split.within, groups, [&](size_t group, size_t part) {
                run_group(result, groups - 1 - group, chunk, count, worker, part);
            });
        }
    });
}

void code_product(size_t batch, size_t out_rows, size_t rows, size_t columns, int bits,
                  uintptr_t levels, uintptr_t packed, size_t row_bytes, uintptr_t scales,
                  const Matrices& a, uintptr_t out, float beta, int threads) {
    if (batch == 0 || out_rows == 0 || columns == 0) {
        return;
    }
    float* const results = pointer<float>(out, "out");
    const ProductKernels& kernels = product_kernels();
    const PackCodesArgs codes = code_operand(rows, columns, bits, levels, packed, row_bytes);
    if (out_rows <= kNarrowRows) {
        const float* const factors = pointer<const float>(scales, "scales");
        narrow_code_product(batch, out_rows, codes, factors, a, results, beta, threads);
        return;
    }
    const auto [a_data, a_batch_stride, a_row_stride, a_column_stride] = a;
    PackLimbsArgs limbs = {};
    limbs.a = pointer<const float>(a_data, "a");
    limbs.row_stride = a_row_stride;
    limbs.k_stride = a_column_stride;
    limbs.rows = out_rows;
    limbs.depth = rows;
    limbs.factors = pointer<const float>(scales, "scales");
    limbs.steps = code_steps(kernels, rows);

    const Threads split = split_threads(threads, batch, out_rows * rows * columns / 4);
    const size_t strip_words = limbs.steps * kStrip;
    const size_t strips = ceil_divide(out_rows, kStrip);
    const Buffer<uint32_t> high(strips * strip_words, split.matrices);
    const Buffer<uint32_t> low(strips * strip_words, split.matrices);
    const Buffer<float> limb_scales(out_rows, split.matrices);
    const Buffer<int32_t> high_sums(out_rows, split.matrices);
    const Buffer<int32_t> low_sums(out_rows, split.matrices);
    const size_t width = kernels.group_columns;
    const bool tiles = kernels.tile_steps != 0;
    const size_t packed_steps =
        tiles ? limbs.steps : ceil_divide(rows, codes_per_word(kernels.code_type));
    const Buffer<uint32_t> words(kPanelColumns * packed_steps, split.matrices);
    // The sums of both limbs of a group of columns.
    const Buffer<int32_t> sums(2 * out_rows * width, split.all());
    const Buffer<float> scratch(rows, split.all());
    const uint32_t offset = kernels.offset ? 128 : 0;

    const auto run_group = [&](float* result, size_t panel, size_t count, size_t group,
                               size_t worker, size_t part) {
        int32_t* const upper = sums.get(worker + part);
        int32_t* const lower = upper + out_rows * width;
        const size_t first = group * width;
        MultiplyArgs args = {};
        args.type = kernels.code_type;
        args.a_steps = limbs.steps;
        args.b = words.get(worker) + first * packed_steps;
        args.b_steps = args.steps = packed_steps;
        args.rows = out_rows;
        args.columns = std::min(width, count - first);
        args.stride = width;
        args.a = high.get(worker);
        args.sums = upper;
        kernels.multiply(args);
        args.a = low.get(worker);
        args.sums = lower;
        kernels.multiply(args);
        for (size_t row = 0; row < out_rows; ++row) {
            kernels.join_limbs(upper + row * width, lower + row * width,
                               offset * static_cast<uint32_t>(high_sums.get(worker)[row]),
                               offset * static_cast<uint32_t>(low_sums.get(worker)[row]),
                               limb_scales.get(worker)[row], beta, args.columns,
                               result + row * columns + panel + first);
        }
    };
    parallel_for(split.matrices, batch, [&](size_t matrix, size_t worker) {
        float* const result = results + matrix * out_rows * columns;
        parallel_for(split.within, strips, [&](size_t strip, size_t part) {
            PackLimbsArgs args = limbs;
            args.a += static_cast<ptrdiff_t>(matrix) * a_batch_stride;
            args.factors += matrix * rows;
            args.high = high.get(worker) + strip * strip_words;
            args.low = low.get(worker) + strip * strip_words;
            args.scales = limb_scales.get(worker);
            args.high_sums = high_sums.get(worker);
            args.low_sums = low_sums.get(worker);
            args.scratch = scratch.get(worker + part);
            const size_t filled = rows / kPanelColumns * kPanelColumns / 4 * kStrip;
            if (tiles) {  // what follows the last row of the codes
                std::fill(args.high + filled, args.high + strip_words, 0u);
                std::fill(args.low + filled, args.low + strip_words, 0u);
            }
            kernels.pack_limbs(args, strip * kStrip);
            if (tiles) {
                kernels.turn_strip(args.high, limbs.steps);
                kernels.turn_strip(args.low, limbs.steps);
            }
        });
        PackCodesArgs own = codes;
        own.packed += matrix * rows * row_bytes;
        own.to = words.get(worker);
        own.steps = packed_steps;
        for (size_t panel = 0; panel < columns; panel += kPanelColumns) {
            own.panel = panel;
            own.count = std::min(kPanelColumns, columns - panel);
            parallel_for(split.within, packed_steps,
                         [&](size_t step, size_t) { kernels.pack_code_columns(own, step); });
            parallel_for(split.within, ceil_divide(own.count, width),
                         [&](size_t group, size_t part) {
                             run_group(result, panel, own.count, group, worker, part);
                         });
        }
    });
}

}  // namespace lowbit
