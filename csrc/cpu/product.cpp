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
    ptrdiff_t row_stride;
    ptrdiff_t k_stride;
    size_t rows;

    size_t strips() const { return ceil_divide(rows, kStrip); }

    void pack(const ProductKernels& kernels, size_t strip, size_t k, size_t depth,
              float* to) const {
        PackFloatsArgs args = {};
        args.from = data + static_cast<ptrdiff_t>(strip * kStrip) * row_stride +
                    static_cast<ptrdiff_t>(k) * k_stride;
        args.row_stride = row_stride;
        args.k_stride = k_stride;
        args.rows = std::min(kStrip, rows - strip * kStrip);
        args.depth = depth;
        args.to = to;
        kernels.pack_floats(args);
    }
};

// Equal parts of at most kStreamBlock rows, as many for each thread, in whole groups.
size_t stream_block(size_t length, int threads, size_t group) {
    const size_t rounds = ceil_divide(length, kStreamBlock * static_cast<size_t>(threads));
    const size_t even = ceil_divide(length, rounds * static_cast<size_t>(threads));
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

void product(size_t rows, size_t columns, size_t depth, uintptr_t a, ptrdiff_t a_row_stride,
             ptrdiff_t a_column_stride, uintptr_t b, ptrdiff_t b_row_stride,
             ptrdiff_t b_column_stride, uintptr_t c, size_t c_stride, float alpha, float beta,
             int threads) {
    if (rows == 0 || columns == 0) {
        return;
    }
    const ProductKernels& kernels = product_kernels();
    const Operand left = {depth ? pointer<const float>(a, "a") : nullptr, a_row_stride,
                          a_column_stride, rows};
    const Operand right = {depth ? pointer<const float>(b, "b") : nullptr, b_column_stride,
                           b_row_stride, columns};
    float* const out = pointer<float>(c, "c");

    // The smaller operand is packed once; the other streams past it in blocks.
    const bool left_resident = rows <= columns;
    const Operand& resident = left_resident ? left : right;
    const Operand& streamed = left_resident ? right : left;
    const int parts = useful_threads(threads, rows * columns * std::max<size_t>(depth, 1));
    const size_t group = left_resident ? kernels.group_columns : kStrip;
    const size_t block = stream_block(streamed.rows, parts, group);
    const size_t blocks = ceil_divide(streamed.rows, block);
    const Buffer<float> resident_words(resident.strips() * kStrip * std::max<size_t>(depth, 1));
    const size_t chunks = std::max<size_t>(1, ceil_divide(depth, kFloatSteps));
    const Buffer<float> streamed_words(static_cast<size_t>(parts) * block * kFloatSteps);

    const auto run_block = [&](size_t index, float* words) {
        const size_t first = index * block;
        const size_t count = std::min(block, streamed.rows - first);
        for (size_t chunk = 0; chunk < chunks; ++chunk) {
            const size_t k = chunk * kFloatSteps;
            const size_t steps = std::min(kFloatSteps, depth - k);
            for (size_t s = 0; s < ceil_divide(count, kStrip); ++s) {
                streamed.pack(kernels, first / kStrip + s, k, steps, words + s * steps * kStrip);
            }
            const float* const fixed = resident_words.get() + k * kStrip;
            MultiplyArgs args = left_resident ? float_multiply(fixed, depth, words, steps)
                                              : float_multiply(words, steps, fixed, depth);
            args.steps = steps;
            args.rows = left_resident ? rows : count;
            args.columns = left_resident ? count : columns;
            float* const at = out + (left_resident ? first : first * c_stride);
            args.sums = at;
            args.stride = c_stride;
            args.add = chunk != 0;
            args.alpha = alpha;
            args.beta = beta;
            args.addend = at;
            args.addend_stride = c_stride;
            kernels.multiply(args);
        }
    };
#pragma omp parallel num_threads(parts)
    {
#pragma omp for schedule(static)
        for (size_t s = 0; s < resident.strips(); ++s) {
            if (depth != 0) {
                resident.pack(kernels, s, 0, depth, resident_words.get() + s * depth * kStrip);
            }
        }
#pragma omp for schedule(static)
        for (size_t part = 0; part < static_cast<size_t>(parts); ++part) {
            float* const words = streamed_words.get() + part * block * kFloatSteps;
            for (size_t index = part; index < blocks; index += static_cast<size_t>(parts)) {
                run_block(index, words);
            }
        }
    }
}

void symmetric_product(size_t size, size_t depth, uintptr_t a, ptrdiff_t a_row_stride,
                       ptrdiff_t a_column_stride, uintptr_t b, ptrdiff_t b_row_stride,
                       ptrdiff_t b_column_stride, uintptr_t addend, size_t addend_stride,
                       uintptr_t out, size_t out_stride, float alpha, float beta, int threads) {
    if (size == 0) {
        return;
    }
    const ProductKernels& kernels = product_kernels();
    const Operand left = {depth ? pointer<const float>(a, "a") : nullptr, a_row_stride,
                          a_column_stride, size};
    Operand right = left;
    if (b != 0) {
        right = {pointer<const float>(b, "b"), b_column_stride, b_row_stride, size};
    }
    float* const sums = pointer<float>(out, "out");
    const float* const added = beta != 0.0f ? pointer<const float>(addend, "addend") : nullptr;

    const int parts = useful_threads(threads, size * size * std::max<size_t>(depth, 1) / 2);
    const size_t strips = left.strips();
    const size_t width = kernels.group_columns;
    const size_t groups = ceil_divide(size, width);
    const size_t operands = b != 0 ? 2 : 1;
    const size_t most_steps = std::max(kFloatSteps, kPackedWords / (operands * strips * kStrip));
    const size_t chunks = std::max<size_t>(1, ceil_divide(depth, most_steps));
    const size_t chunk_steps = ceil_divide(depth, chunks);
    const Buffer<float> left_words(strips * kStrip * chunk_steps);
    const Buffer<float> right_words(b != 0 ? strips * kStrip * chunk_steps : 0);
    const float* const columns = b != 0 ? right_words.get() : left_words.get();

    const auto run_group = [&](size_t group, size_t chunk, size_t steps) {
        const size_t first = group * width;
        MultiplyArgs args = float_multiply(left_words.get(), steps, columns + first * steps, steps);
        args.steps = steps;
        args.rows = size;
        args.columns = std::min(width, size - first);
        args.sums = sums + first;
        args.stride = out_stride;
        args.add = chunk != 0;
        args.alpha = alpha;
        args.beta = beta;
        args.addend = added + (added ? first : 0);
        args.addend_stride = addend_stride;
        args.upper = true;
        args.first_column = first;
        kernels.multiply(args);
        if (chunk + 1 == chunks) {  // while the group is in this thread's cache
            kernels.mirror(sums, out_stride, first, first + args.columns);
        }
    };
#pragma omp parallel num_threads(parts)
    {
        for (size_t chunk = 0; chunk < chunks; ++chunk) {
            const size_t k = chunk * chunk_steps;
            const size_t steps = std::min(chunk_steps, depth - k);
#pragma omp for schedule(static)
            for (size_t s = 0; s < strips; ++s) {
                left.pack(kernels, s, k, steps, left_words.get() + s * steps * kStrip);
                if (b != 0) {
                    right.pack(kernels, s, k, steps, right_words.get() + s * steps * kStrip);
                }
            }
            // From the right, where a group of columns has the most rows.
#pragma omp for schedule(dynamic, 1)
            for (size_t group = 0; group < groups; ++group) {
                run_group(groups - 1 - group, chunk, steps);
            }
        }
    }
}

}  // namespace lowbit
