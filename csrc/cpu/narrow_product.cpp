// Products of codes with a few rows or columns (kernels/narrow.inl).
#include <algorithm>

#include "integer_product.hpp"
#include "isa.hpp"
#include "product.hpp"

namespace lowbit {

namespace {

// The limbs of a few rows, side by side, for each of several workers.
class Limbs {
  public:
    Limbs(const ProductKernels& kernels, size_t rows, size_t depth, size_t workers)
        : kernels_(kernels),
          rows_(rows),
          depth_(depth),
          words_(ceil_divide(ceil_divide(depth, codes_per_word(kernels.code_type)), kStrip) *
                 kStrip),
          high_(rows * words_, workers),
          low_(rows * words_, workers),
          scales_(rows, workers),
          high_sums_(rows, workers),
          low_sums_(rows, workers),
          scratch_(depth, workers) {}

    // Of rows at `a`, element (i, k) at i * row_stride + k * k_stride; factors [depth] or null.
    void round(size_t worker, const float* a, ptrdiff_t row_stride, ptrdiff_t k_stride,
               const float* factors) const {
        RoundLimbsArgs args = {};
        args.k_stride = k_stride;
        args.depth = depth_;
        args.factors = factors;
        args.words = words_;
        args.scratch = scratch_.get(worker);
        for (size_t row = 0; row < rows_; ++row) {
            args.a = a + static_cast<ptrdiff_t>(row) * row_stride;
            args.high = high_.get(worker) + row * words_;
            args.low = low_.get(worker) + row * words_;
            args.scale = scales_.get(worker) + row;
            args.high_sum = high_sums_.get(worker) + row;
            args.low_sum = low_sums_.get(worker) + row;
            kernels_.round_limbs(args);
        }
    }

    // What multiplies them with codes; sums [2, rows, stride], of high limbs first.
    NarrowArgs multiply(size_t worker, const PackCodesArgs& codes, int32_t* sums,
                        size_t stride) const {
        NarrowArgs args = {};
        args.codes = codes;
        args.high = high_.get(worker);
        args.low = low_.get(worker);
        args.words = words_;
        args.out_rows = rows_;
        args.high_sums = sums;
        args.low_sums = sums + rows_ * stride;
        args.stride = stride;
        return args;
    }

    // out <- beta * out + the value of `count` sums of a row; out may be the sums.
    void join(size_t worker, size_t row, const int32_t* high, const int32_t* low, float beta,
              size_t count, float* out) const {
        const uint32_t offset = kernels_.offset ? 128 : 0;
        kernels_.join_limbs(high, low, offset * static_cast<uint32_t>(high_sums_.get(worker)[row]),
                            offset * static_cast<uint32_t>(low_sums_.get(worker)[row]),
                            scales_.get(worker)[row], beta, count, out);
    }

    size_t words() const { return words_; }

  private:
    const ProductKernels& kernels_;
    size_t rows_, depth_, words_;
    Buffer<uint32_t> high_, low_;
    Buffer<float> scales_;
    Buffer<int32_t> high_sums_, low_sums_;
    Buffer<float> scratch_;
};

size_t whole_strips(size_t count) {
    return ceil_divide(count, kStrip) * kStrip;
}

}  // namespace

// Each thread has a part of the codes' rows, and sums of its own for all columns.
void narrow_code_product(size_t batch, size_t out_rows, const PackCodesArgs& codes,
                         const float* scales, const Matrices& a, float* results, float beta,
                         int threads) {
    constexpr size_t block = 32;  // rows that `add_code_columns` decodes at once
    const ProductKernels& kernels = vector_kernels();
    const auto [a_data, a_batch_stride, a_row_stride, a_column_stride] = a;
    const float* const rows_of_a = pointer<const float>(a_data, "a");
    const size_t rows = codes.rows, columns = codes.columns;
    const Threads split = split_threads(threads, batch, out_rows * rows * columns);
    const Limbs limbs(kernels, out_rows, rows, split.matrices);
    const size_t stride = whole_strips(columns);
    const size_t count = 2 * out_rows * stride;
    const Buffer<int32_t> sums(count, split.all());

    parallel_for(split.matrices, batch, [&](size_t matrix, size_t worker) {
        limbs.round(worker, rows_of_a + static_cast<ptrdiff_t>(matrix) * a_batch_stride,
                    a_row_stride, a_column_stride, scales + matrix * rows);
        PackCodesArgs own = codes;
        own.packed += matrix * rows * codes.row_bytes;
        const size_t blocks = ceil_divide(rows, block);
        parallel_for(split.within, split.within, [&](size_t part, size_t) {
            int32_t* const to = sums.get(worker + part);
            std::fill_n(to, count, 0);
            kernels.add_code_columns(limbs.multiply(worker, own, to, stride),
                                     blocks * part / split.within * block,
                                     std::min(blocks * (part + 1) / split.within * block, rows));
        });
        int32_t* const total = sums.get(worker);
        for (size_t part = 1; part < split.within; ++part) {
            const int32_t* const from = sums.get(part);
            for (size_t i = 0; i < count; ++i) {
                total[i] += from[i];
            }
        }
        for (size_t row = 0; row < out_rows; ++row) {
            limbs.join(worker, row, total + row * stride, total + (out_rows + row) * stride, beta,
                       columns, results + (matrix * out_rows + row) * columns);
        }
    });
}

void code_times(size_t batch, size_t out_columns, size_t rows, size_t columns, int bits,
                uintptr_t levels, uintptr_t packed, size_t row_bytes, uintptr_t scales,
                const Matrices& v, uintptr_t out, int threads) {
    if (batch == 0 || out_columns == 0 || rows == 0) {
        return;
    }
    float* const results = pointer<float>(out, "out");
    const ProductKernels& kernels = vector_kernels();
    const PackCodesArgs codes = code_operand(rows, columns, bits, levels, packed, row_bytes);
    const float* const row_scales = pointer<const float>(scales, "scales");
    const auto [v_data, v_batch_stride, v_row_stride, v_column_stride] = v;
    const float* const rows_of_v = pointer<const float>(v_data, "v");
    const Threads split = split_threads(threads, batch, out_columns * rows * columns);
    const Limbs limbs(kernels, out_columns, columns, split.matrices);
    const size_t stride = whole_strips(rows);
    const Buffer<int32_t> sums(2 * out_columns * stride, split.matrices);
    const Buffer<uint32_t> scratch(kNarrowScratch * limbs.words(), split.all());

    parallel_for(split.matrices, batch, [&](size_t matrix, size_t worker) {
        limbs.round(worker, rows_of_v + static_cast<ptrdiff_t>(matrix) * v_batch_stride,
                    v_column_stride, v_row_stride, nullptr);
        PackCodesArgs own = codes;
        own.packed += matrix * rows * row_bytes;
        const size_t strips = stride / kStrip;
        parallel_for(split.within, split.within, [&](size_t part, size_t) {
            NarrowArgs args = limbs.multiply(worker, own, sums.get(worker), stride);
            args.scratch = scratch.get(worker + part);
            const size_t begin = strips * part / split.within * kStrip;
            const size_t end = std::min(strips * (part + 1) / split.within * kStrip, rows);
            kernels.dot_code_rows(args, begin, end);
            for (size_t c = 0; c < out_columns; ++c) {
                int32_t* const high = args.high_sums + c * stride + begin;
                float* const values = reinterpret_cast<float*>(high);
                limbs.join(worker, c, high, args.low_sums + c * stride + begin, 0.0f, end - begin,
                           values);
                for (size_t row = begin; row < end; ++row) {
                    results[(matrix * rows + row) * out_columns + c] =
                        row_scales[matrix * rows + row] * values[row - begin];
                }
            }
        });
    });
}

}  // namespace lowbit
