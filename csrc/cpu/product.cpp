#include "product.hpp"

#include <algorithm>

#include "isa.hpp"
#include "workspace.hpp"

namespace lowbit {

namespace {

// Steps of k that a strip of floats is packed for at once: three strips of columns (36 KiB) stay in
// an L1 cache of 48 KiB beside the rows that pass by.
constexpr size_t kFloatSteps = 192;
// Columns (or rows) of the streamed operand that a thread packs at once, for its L2 cache.
constexpr size_t kStreamBlock = 192;

// A float operand as its strips see it: `rows` are what a strip has sixteen of.
struct Operand {
    const float* data;
    ptrdiff_t batch_stride;
    ptrdiff_t row_stride;
    ptrdiff_t k_stride;
    size_t rows;

    size_t strips() const { return ceil_divide(rows, kStrip); }

    void pack(const ProductKernels& kernels, size_t matrix, size_t strip, size_t k, size_t depth,
              float* to) const {
        PackFloatsArgs args = {};
        args.from = data + static_cast<ptrdiff_t>(matrix) * batch_stride +
                    static_cast<ptrdiff_t>(strip * kStrip) * row_stride +
                    static_cast<ptrdiff_t>(k) * k_stride;
        args.row_stride = row_stride;
        args.k_stride = k_stride;
        args.rows = std::min(kStrip, rows - strip * kStrip);
        args.depth = depth;
        args.to = to;
        kernels.pack_floats(args);
    }
};

// Of [rows, depth].
Operand left_operand(const Matrices& a, size_t rows, size_t depth) {
    const auto [data, batch_stride, row_stride, column_stride] = a;
    return {depth ? pointer<const float>(data, "a") : nullptr, batch_stride, row_stride,
            column_stride, rows};
}

// Of [depth, columns].
Operand right_operand(const Matrices& b, size_t columns, size_t depth) {
    const auto [data, batch_stride, row_stride, column_stride] = b;
    return {depth ? pointer<const float>(data, "b") : nullptr, batch_stride, column_stride,
            row_stride, columns};
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

MultiplyArgs float_multiply(const float* a, size_t a_steps, const float* b, size_t b_steps) {
    MultiplyArgs args = {};
    args.type = WordType::float32;
    args.a = reinterpret_cast<const uint32_t*>(a);
    args.b = reinterpret_cast<const uint32_t*>(b);
    args.a_steps = a_steps;
    args.b_steps = b_steps;
    return args;
}

}  // namespace

size_t take_most_workspace() {
    return most_buffer_bytes.exchange(buffer_bytes);
}

void product(size_t batch, size_t rows, size_t columns, size_t depth, const Matrices& a,
             const Matrices& b, const Matrices& c, uintptr_t alphas, float alpha, float beta,
             int threads) {
    if (batch == 0 || rows == 0 || columns == 0) {
        return;
    }
    const ProductKernels& kernels = product_kernels();
    const Operand left = left_operand(a, rows, depth);
    const Operand right = right_operand(b, columns, depth);
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
    const size_t chunks = std::max<size_t>(1, ceil_divide(depth, kFloatSteps));
    const Buffer<float> resident_words(resident.strips() * kStrip * std::max<size_t>(depth, 1),
                                       split.matrices);
    const Buffer<float> streamed_words(block * kFloatSteps, split.all());

    const auto run_block = [&](size_t matrix, size_t index, const float* resident_at,
                               float* words) {
        const size_t first = index * block;
        const size_t count = std::min(block, streamed.rows - first);
        for (size_t chunk = 0; chunk < chunks; ++chunk) {
            const size_t k = chunk * kFloatSteps;
            const size_t steps = std::min(kFloatSteps, depth - k);
            for (size_t s = 0; s < ceil_divide(count, kStrip); ++s) {
                streamed.pack(kernels, matrix, first / kStrip + s, k, steps,
                              words + s * steps * kStrip);
            }
            const float* const fixed = resident_at + k * kStrip;
            MultiplyArgs args = left_resident ? float_multiply(fixed, depth, words, steps)
                                              : float_multiply(words, steps, fixed, depth);
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
    };
    parallel_for(split.matrices, batch, [&](size_t matrix, size_t worker) {
        float* const fixed = resident_words.get(worker);
        parallel_for(split.within, depth != 0 ? resident.strips() : 0, [&](size_t s, size_t) {
            resident.pack(kernels, matrix, s, 0, depth, fixed + s * depth * kStrip);
        });
        parallel_for(split.within, blocks, [&](size_t index, size_t part) {
            run_block(matrix, index, fixed, streamed_words.get(worker + part));
        });
    });
}

void symmetric_product(size_t batch, size_t size, size_t depth, const Matrices& a,
                       const Matrices& b, const Matrices& addend, const Matrices& out, float alpha,
                       float beta, int threads) {
    if (batch == 0 || size == 0) {
        return;
    }
    const ProductKernels& kernels = product_kernels();
    const bool given = std::get<0>(b) != 0;
    const Operand left = left_operand(a, size, depth);
    const Operand right = given ? right_operand(b, size, depth) : left;
    const Rows<float> sums = rows_of<float>(out, "out");
    const Rows<const float> added =
        beta != 0.0f ? rows_of<const float>(addend, "addend") : Rows<const float>{};

    const Threads split =
        split_threads(threads, batch, size * size * std::max<size_t>(depth, 1) / 2);
    const size_t strips = left.strips();
    const size_t width = kernels.group_columns;
    const size_t groups = ceil_divide(size, width);
    const size_t operands = given ? 2 : 1;
    const size_t most_steps = std::max(kFloatSteps, kPackedWords / (operands * strips * kStrip));
    const size_t chunks = std::max<size_t>(1, ceil_divide(depth, most_steps));
    const size_t chunk_steps = ceil_divide(depth, chunks);
    const size_t words = strips * kStrip * chunk_steps;
    const Buffer<float> left_words(words, split.matrices);
    const Buffer<float> right_words(given ? words : 0, split.matrices);

    const auto run_group = [&](size_t matrix, size_t group, size_t chunk, size_t steps,
                               const float* rows, const float* columns) {
        const size_t first = group * width;
        MultiplyArgs args = float_multiply(rows, steps, columns + first * steps, steps);
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
            kernels.mirror(sums.at(matrix, 0), sums.stride, first, first + args.columns);
        }
    };
    parallel_for(split.matrices, batch, [&](size_t matrix, size_t worker) {
        float* const rows = left_words.get(worker);
        float* const columns = given ? right_words.get(worker) : rows;
        for (size_t chunk = 0; chunk < chunks; ++chunk) {
            const size_t k = chunk * chunk_steps;
            const size_t steps = std::min(chunk_steps, depth - k);
            parallel_for(split.within, strips, [&](size_t s, size_t) {
                left.pack(kernels, matrix, s, k, steps, rows + s * steps * kStrip);
                if (given) {
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
