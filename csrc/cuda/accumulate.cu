// buffer <- weighted sum of the buffer, decoded codes and a gradient, with each row's sum of
// squares.
//
// What is meant to make it fast (no GPU was at hand: none of it has been measured):
//   - A block for each row: no sum crosses blocks, and results do not depend on the launch.
//   - Quads: a thread takes four neighbouring columns, one access for each stream. The layout puts
//     neighbours into the same field of neighbouring bytes, so one shift and mask of a word
//     unpacks four codes.
//   - Squares in float64 as in the reference: fused multiply-adds whose products are exact.
//     Consumer GPUs have few such units, and there they may be the limit.
#include "terms.cuh"

namespace lowbit {
namespace {

template <int BITS>
__global__ void __launch_bounds__(kMaxThreads)
    accumulate_rows(Terms terms, Codebook book, double* squares /* [rows] */) {
    Shared& shared = shared_tables();
    if constexpr (BITS != 0) {
        load_tables<BITS>(shared, book);
    }
    const int64_t row = blockIdx.x;
    double sum = 0.0;
    for (int column = kQuad * threadIdx.x; column < terms.columns; column += kQuad * blockDim.x) {
        const int count = min_int(kQuad, terms.columns - column);
        const Quad value = sum_of_terms<BITS>(terms, shared.levels, row, column, count);
        store_numbers(terms.buffer.at(row, column), kFloat32, count, value);
        for (int i = 0; i < count; ++i) {
            sum = fused_square(value.v[i], sum);
        }
    }
    sum = reduce_threads(sum, shared.sums, Add());
    if (threadIdx.x == 0) {
        squares[row] = sum;
    }
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

// buffer <- buffer_weight * buffer + code_weight * levels[code] * scale + grad_weight * grad.
extern "C" int lowbit_accumulate_rows(int64_t rows, int columns,
                                      float* buffer,  // [rows, columns]
                                      int64_t buffer_stride, float buffer_weight,
                                      int bits,  // 0: no codes
                                      int block,
                                      const float* levels,  // [level_count], on the host
                                      int level_count,
                                      const uint8_t* packed,  // [rows, row_bytes]
                                      const float* scales,    // [rows, ceil(columns / block)]
                                      float code_weight,
                                      const void* grad,  // [rows, columns], or null
                                      int grad_type, int64_t grad_stride, float grad_weight,
                                      double* squares,  // [rows]
                                      void* stream) {
    const Terms terms = {
        {reinterpret_cast<uint8_t*>(buffer), kFloat32, buffer_stride},
        buffer_weight,
        {packed, scales, code_weight},
        {static_cast<const uint8_t*>(grad), grad_type, grad_stride},
        grad_weight,
        rows,
        columns,
        block,
    };
    if (!is_valid(terms, bits, level_count)) {
        return kBadArgument;
    }
    const Codebook book = make_book(levels, nullptr, bits == 0 ? 0 : level_count);
    const Grid grid = {dim3(static_cast<unsigned>(rows)), threads_for_row(columns), sizeof(Shared)};
    if (bits == 0) {
        return launch(accumulate_rows<0>, grid, stream, terms, book, squares);
    }
    return with_bits(bits, [&](auto constant) {
        return launch(accumulate_rows<constant.value>, grid, stream, terms, book, squares);
    });
}
