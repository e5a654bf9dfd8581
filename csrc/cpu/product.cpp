#include "product.hpp"

#include <algorithm>

#include "isa.hpp"
#include "workspace.hpp"

namespace lowbit {

namespace {

// Words along k that a strip is packed for at once: three strips of columns (36 KiB) stay in an L1
// cache of 48 KiB beside the rows that pass by.
constexpr size_t kWordSteps = 192;
// Columns (or rows) of the streamed operand that a thread packs at once, for its L2 cache.
constexpr size_t kStreamBlock = 192;

size_t factors_per_word(WordType type) {
    return type == WordType::bfloat16 ? 2 : 1;
}

bool in_tiles(const ProductKernels& kernels, WordType type) {
    return type == WordType::bfloat16 && kernels.tile_steps != 0;
}

// Words along k, of whole tiles if there are any.
size_t packed_steps(const ProductKernels& kernels, WordType type, size_t depth) {
    const size_t steps = ceil_divide(depth, factors_per_word(type));
    return in_tiles(kernels, type) ? ceil_divide(steps, kernels.tile_steps) * kernels.tile_steps
                                   : steps;
}

// A float operand as its strips see it: `rows` are what a strip has sixteen of.
struct Operand {
    const float* data;
    ptrdiff_t batch_stride;
    ptrdiff_t row_stride;
    ptrdiff_t k_stride;
    size_t rows;
    size_t depth;
    WordType type;
    // The elements (k + *diagonal, k) are packed as zeros.
    std::optional<ptrdiff_t> diagonal = std::nullopt;
    bool turned = false;  // for tiles

    size_t strips() const { return ceil_divide(rows, kStrip); }

    const float* at(size_t matrix, size_t row, size_t k) const {
        return data + static_cast<ptrdiff_t>(matrix) * batch_stride +
               static_cast<ptrdiff_t>(row) * row_stride + static_cast<ptrdiff_t>(k) * k_stride;
    }

    // `steps` words from the word `step` on, with zeros past the end.
    void pack(const ProductKernels& kernels, size_t matrix, size_t strip, size_t step, size_t steps,
              uint32_t* to) const {
        const size_t each = factors_per_word(type);
        const size_t first = strip * kStrip, k = step * each;
        PackFloatsArgs args = {};
        args.from = at(matrix, first, k);
        args.row_stride = row_stride;
        args.k_stride = k_stride;
        args.rows = std::min(kStrip, rows - first);
        args.depth = std::min(steps * each, depth - k);
        args.to = to;
        (type == WordType::bfloat16 ? kernels.pack_bfloat16 : kernels.pack_floats)(args);
        const size_t words = ceil_divide(args.depth, each) * kStrip;
        std::fill(to + words, to + steps * kStrip, 0u);
        if (diagonal) {
            for (size_t i = 0; i < args.rows; ++i) {
                const ptrdiff_t place =
                    static_cast<ptrdiff_t>(first + i) - *diagonal - static_cast<ptrdiff_t>(k);
                if (place >= 0 && place < static_cast<ptrdiff_t>(args.depth)) {
                    const size_t word = static_cast<size_t>(place) / each * kStrip + i;
                    const size_t part = static_cast<size_t>(place) % each;
                    to[word] &= each == 1 ? 0 : (part == 0 ? 0xffff0000u : 0x0000ffffu);
                }
            }
        }
        if (turned) {
            kernels.turn_strip(to, steps);
        }
    }
};

// Of [rows, depth].
Operand left_operand(const Matrices& a, size_t rows, size_t depth, WordType type) {
    const auto [data, batch_stride, row_stride, column_stride] = a;
    return {depth ? pointer<const float>(data, "a") : nullptr,
            batch_stride,
            row_stride,
            column_stride,
            rows,
            depth,
            type};
}

// Of [depth, columns].
Operand right_operand(const Matrices& b, size_t columns, size_t depth, WordType type) {
    const auto [data, batch_stride, row_stride, column_stride] = b;
    return {depth ? pointer<const float>(data, "b") : nullptr,
            batch_stride,
            column_stride,
            row_stride,
            columns,
            depth,
            type};
}

// Throws unless the level in use multiplies what was asked for.
WordType word_type(const ProductKernels& kernels, bool rounded) {
    expect(!rounded || kernels.pack_bfloat16 != nullptr,
           "rounded: expected an ISA level with products of bfloat16, got '", current_isa(), "'");
    return rounded ? WordType::bfloat16 : WordType::float32;
}

// A batch of results, or of what is added to them, with contiguous rows.
template <typename Float>
struct Rows {
    Float* data;
    size_t batch_stride;
    size_t stride;

    Float* at(size_t matrix, size_t offset) const {
        return data == nullptr ? nullptr : data + matrix * batch_stride + offset;
    }
};

template <typename Float>
Rows<Float> rows_of(const Matrices& x, const char* name) {
    return {pointer<Float>(std::get<0>(x), name), static_cast<size_t>(std::get<1>(x)),
            static_cast<size_t>(std::get<2>(x))};
}

// Equal parts of at most kStreamBlock rows, as many for each thread, in whole groups.
size_t stream_block(size_t length, size_t threads, size_t group) {
    const size_t rounds = ceil_divide(length, kStreamBlock * threads);
    const size_t even = ceil_divide(length, rounds * threads);
    return ceil_divide(even, group) * group;
}

// Adds to rows and columns of the result what the factors' diagonals, which were left out of the
// words, multiply. upper: only on and right of the diagonal is needed.
void add_diagonals(const ProductKernels& kernels, const Operand& left, const Operand& right,
                   size_t matrix, size_t first_row, size_t row_end, size_t first_column,
                   size_t column_end, float alpha, const Rows<float>& out, bool upper = false) {
    if (left.depth == 0 || !(left.diagonal || right.diagonal)) {
        return;
    }
    const ptrdiff_t depth = static_cast<ptrdiff_t>(left.depth);
    // Of the right factor: what multiplies columns [begin, end).
    float diagonal[kStreamBlock];
    for (size_t begin = first_column; begin < column_end; begin += kStreamBlock) {
        const size_t end = std::min(begin + kStreamBlock, column_end);
        size_t from = end, to = begin;  // where there is a diagonal
        for (size_t j = begin; right.diagonal && j < end; ++j) {
            const ptrdiff_t k = static_cast<ptrdiff_t>(j) - *right.diagonal;
            if (k >= 0 && k < depth) {
                from = std::min(from, j);
                to = j + 1;
                diagonal[j - begin] = *right.at(matrix, j, static_cast<size_t>(k));
            }
        }
        for (size_t i = first_row; i < row_end; ++i) {
            const size_t start = upper ? std::max(begin, i) : begin;
            if (start >= end) {
                break;
            }
            const ptrdiff_t k = left.diagonal ? static_cast<ptrdiff_t>(i) - *left.diagonal : -1;
            if (k >= 0 && k < depth) {
                kernels.add_scaled(
                    out.at(matrix, i * out.stride + start),
                    right.at(matrix, start, static_cast<size_t>(k)), right.row_stride,
                    alpha * *left.at(matrix, i, static_cast<size_t>(k)), nullptr, end - start);
            }
            // Where both have a diagonal its own products are added once, above.
            const size_t after = left.diagonal && upper ? std::max(start, i + 1) : start;
            const size_t first = std::max(after, from);
            if (first < to) {
                const size_t place =
                    static_cast<size_t>(static_cast<ptrdiff_t>(first) - *right.diagonal);
                kernels.add_scaled(out.at(matrix, i * out.stride + first),
                                   left.at(matrix, i, place), left.k_stride, alpha,
                                   diagonal + (first - begin), to - first);
            }
        }
    }
}

MultiplyArgs float_multiply(WordType type, const uint32_t* a, size_t a_steps, const uint32_t* b,
                            size_t b_steps) {
    MultiplyArgs args = {};
    args.type = type;
    args.a = a;
    args.b = b;
    args.a_steps = a_steps;
    args.b_steps = b_steps;
    return args;
}

}  // namespace

size_t take_most_workspace() {
    return most_buffer_bytes.exchange(buffer_bytes);
}

bool has_rounded_products() {
    return product_kernels().pack_bfloat16 != nullptr;
}

void product(size_t batch, size_t rows, size_t columns, size_t depth, const Matrices& a,
             const Matrices& b, const Matrices& c, uintptr_t alphas, float alpha, float beta,
             bool rounded, std::optional<ptrdiff_t> a_diagonal, std::optional<ptrdiff_t> b_diagonal,
             int threads) {
    if (batch == 0 || rows == 0 || columns == 0) {
        return;
    }
    const ProductKernels& kernels = product_kernels();
    const WordType type = word_type(kernels, rounded);
    Operand left = left_operand(a, rows, depth, type);
    Operand right = right_operand(b, columns, depth, type);
    left.diagonal = a_diagonal;
    right.diagonal = b_diagonal;
    left.turned = in_tiles(kernels, type);
    const Rows<float> out = rows_of<float>(c, "c");
    const float* const alpha_of = reinterpret_cast<const float*>(alphas);

    // The smaller operand is packed once; the other streams past it in blocks.
    const bool left_resident = rows <= columns;
    const Operand& resident = left_resident ? left : right;
    const Operand& streamed = left_resident ? right : left;
    const Threads split =
        split_threads(threads, batch, rows * columns * std::max<size_t>(depth, 1));
    const size_t group = left_resident ? kernels.group_columns : kStrip;
    const size_t block = stream_block(streamed.rows, split.within, group);
    const size_t blocks = ceil_divide(streamed.rows, block);
    const size_t all_steps = packed_steps(kernels, type, depth);
    const size_t chunks = std::max<size_t>(1, ceil_divide(all_steps, kWordSteps));
    const Buffer<uint32_t> resident_words(
        resident.strips() * kStrip * std::max<size_t>(all_steps, 1), split.matrices);
    const Buffer<uint32_t> streamed_words(block * kWordSteps, split.all());

    const auto run_block = [&](size_t matrix, size_t index, const uint32_t* resident_at,
                               uint32_t* words) {
        const size_t first = index * block;
        const size_t count = std::min(block, streamed.rows - first);
        for (size_t chunk = 0; chunk < chunks; ++chunk) {
            const size_t step = chunk * kWordSteps;
            const size_t steps = std::min(kWordSteps, all_steps - step);
            for (size_t s = 0; s < ceil_divide(count, kStrip); ++s) {
                streamed.pack(kernels, matrix, first / kStrip + s, step, steps,
                              words + s * steps * kStrip);
            }
            const uint32_t* const fixed = resident_at + step * kStrip;
            MultiplyArgs args = left_resident
                                    ? float_multiply(type, fixed, all_steps, words, steps)
                                    : float_multiply(type, words, steps, fixed, all_steps);
            args.steps = steps;
            args.rows = left_resident ? rows : count;
            args.columns = left_resident ? count : columns;
            float* const at = out.at(matrix, left_resident ? first : first * out.stride);
            args.sums = at;
            args.stride = out.stride;
            args.add = chunk != 0;
            args.alpha = alpha_of != nullptr ? alpha_of[matrix] : alpha;
            args.beta = beta;
            args.addend = at;
            args.addend_stride = out.stride;
            kernels.multiply(args);
        }
        const size_t first_row = left_resident ? 0 : first;
        const size_t first_column = left_resident ? first : 0;
        add_diagonals(kernels, left, right, matrix, first_row, left_resident ? rows : first + count,
                      first_column, left_resident ? first + count : columns,
                      alpha_of != nullptr ? alpha_of[matrix] : alpha, out);
    };
    parallel_for(split.matrices, batch, [&](size_t matrix, size_t worker) {
        uint32_t* const fixed = resident_words.get(worker);
        parallel_for(split.within, depth != 0 ? resident.strips() : 0, [&](size_t s, size_t) {
            resident.pack(kernels, matrix, s, 0, all_steps, fixed + s * all_steps * kStrip);
        });
        parallel_for(split.within, blocks, [&](size_t index, size_t part) {
            run_block(matrix, index, fixed, streamed_words.get(worker + part));
        });
    });
}

void symmetric_product(size_t batch, size_t size, size_t depth, const Matrices& a,
                       const Matrices& b, const Matrices& addend, const Matrices& out, float alpha,
                       float beta, bool rounded, int threads) {
    if (batch == 0 || size == 0) {
        return;
    }
    const ProductKernels& kernels = product_kernels();
    const bool given = std::get<0>(b) != 0;
    const WordType type = word_type(kernels, rounded);
    const bool tiles = in_tiles(kernels, type);
    Operand left = left_operand(a, size, depth, type);
    Operand right = given ? right_operand(b, size, depth, type) : left;
    left.turned = tiles;
    const bool two = given || tiles;  // operands to pack
    const bool apart = rounded && given && size == depth;
    if (apart) {
        left.diagonal = right.diagonal = 0;
    }
    const Rows<float> sums = rows_of<float>(out, "out");
    const Rows<const float> added =
        beta != 0.0f ? rows_of<const float>(addend, "addend") : Rows<const float>{};

    const Threads split =
        split_threads(threads, batch, size * size * std::max<size_t>(depth, 1) / 2);
    const size_t strips = left.strips();
    const size_t width = kernels.group_columns;
    const size_t groups = ceil_divide(size, width);
    const size_t most_steps =
        std::max(kWordSteps, kPackedWords / ((two ? 2 : 1) * strips * kStrip));
    const size_t all_steps = packed_steps(kernels, type, depth);
    // Even ones, in whole tiles.
    const size_t even =
        ceil_divide(all_steps, std::max<size_t>(1, ceil_divide(all_steps, most_steps)));
    const size_t unit = tiles ? kernels.tile_steps : 1;
    const size_t chunk_steps = std::max<size_t>(1, ceil_divide(even, unit)) * unit;
    const size_t chunks = std::max<size_t>(1, ceil_divide(all_steps, chunk_steps));
    const size_t words = strips * kStrip * chunk_steps;
    const Buffer<uint32_t> left_words(words, split.matrices);
    const Buffer<uint32_t> right_words(two ? words : 0, split.matrices);

    const auto run_group = [&](size_t matrix, size_t group, size_t chunk, size_t steps,
                               const uint32_t* rows, const uint32_t* columns) {
        const size_t first = group * width;
        MultiplyArgs args = float_multiply(type, rows, steps, columns + first * steps, steps);
        args.steps = steps;
        args.rows = size;
        args.columns = std::min(width, size - first);
        args.sums = sums.at(matrix, first);
        args.stride = sums.stride;
        args.add = chunk != 0;
        args.alpha = alpha;
        args.beta = beta;
        args.addend = added.at(matrix, first);
        args.addend_stride = added.stride;
        args.upper = true;
        args.first_column = first;
        kernels.multiply(args);
        if (chunk + 1 == chunks) {  // while the group is in this thread's cache
            if (apart) {
                const size_t end = first + args.columns;
                add_diagonals(kernels, left, right, matrix, 0, end, first, end, alpha, sums, true);
            }
            kernels.mirror(sums.at(matrix, 0), sums.stride, first, first + args.columns);
        }
    };
    parallel_for(split.matrices, batch, [&](size_t matrix, size_t worker) {
        uint32_t* const rows = left_words.get(worker);
        uint32_t* const columns = two ? right_words.get(worker) : rows;
        for (size_t chunk = 0; chunk < chunks; ++chunk) {
            const size_t k = chunk * chunk_steps;
            const size_t steps = std::min(chunk_steps, all_steps - k);
            parallel_for(split.within, strips, [&](size_t s, size_t) {
                left.pack(kernels, matrix, s, k, steps, rows + s * steps * kStrip);
                if (two) {
                    right.pack(kernels, matrix, s, k, steps, columns + s * steps * kStrip);
                }
            });
            // From the right, where a group of columns has the most rows.
            parallel_in_turn(split.within, groups, [&](size_t group, size_t) {
                run_group(matrix, groups - 1 - group, chunk, steps, rows, columns);
            });
        }
    });
}

}  // namespace lowbit
