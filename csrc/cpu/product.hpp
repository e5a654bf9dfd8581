// Matrix product entry points: check the arguments, choose blocks, split them over threads.
//
// Element (i, j) of a float operand lies at i * row_stride + j * column_stride. Pointers arrive as
// integers, and the caller vouches for the memory behind them. Results do not depend on the number
// of threads. Throws std::invalid_argument.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

// The most bytes that the functions below have held at once since the last call.
size_t take_most_workspace();

// c <- alpha * a b + beta * c; c is not read if beta is 0.
void product(size_t rows, size_t columns, size_t depth,
             uintptr_t a,  // float32 [rows, depth]
             ptrdiff_t a_row_stride, ptrdiff_t a_column_stride,
             uintptr_t b,  // float32 [depth, columns]
             ptrdiff_t b_row_stride, ptrdiff_t b_column_stride,
             uintptr_t c,  // float32 [rows, columns], rows contiguous
             size_t c_stride, float alpha, float beta, int threads);

// out <- alpha * a b + beta * addend, where the caller knows a b to be symmetric: half is computed.
void symmetric_product(size_t size, size_t depth,
                       uintptr_t a,  // float32 [size, depth]
                       ptrdiff_t a_row_stride, ptrdiff_t a_column_stride,
                       uintptr_t b,  // float32 [depth, size]; 0: the transpose of a
                       ptrdiff_t b_row_stride, ptrdiff_t b_column_stride,
                       uintptr_t addend,  // float32 [size, size], may be out; read if beta is not 0
                       size_t addend_stride,
                       uintptr_t out,  // float32 [size, size], rows contiguous
                       size_t out_stride, float alpha, float beta, int threads);

// out <- X X^T of X = levels[code] * scale of its block of columns, summed in exact integers.
void code_gram(size_t rows, size_t columns, int bits,
               uintptr_t levels,  // int8 [256]
               uintptr_t packed,  // uint8 [rows, row_bytes]
               size_t row_bytes,
               uintptr_t scales,   // float32 [rows, ceil(columns / block_size)]
               size_t block_size,  // all columns, or a multiple of 4 that goes with 512
               uintptr_t out,      // float32 [rows, rows]
               int threads);

// out <- X X^T of X rounded, row by row, to whole multiples of a 2896th of the row's largest
// magnitude; every 256 columns are summed in exact integers.
void rounded_gram(size_t rows, size_t columns,
                  uintptr_t x,  // float32 [rows, columns]
                  ptrdiff_t row_stride, ptrdiff_t column_stride,
                  uintptr_t out,  // float32 [rows, rows]
                  int threads);

// out <- a X + beta * out with a * diag(scales) rounded to 16 bits, in two limbs of int8.
void code_product(size_t out_rows, size_t rows, size_t columns, int bits,
                  uintptr_t levels,  // int8 [256]
                  uintptr_t packed,  // uint8 [rows, row_bytes]
                  size_t row_bytes,
                  uintptr_t scales,  // float32 [rows]
                  uintptr_t a,       // float32 [out_rows, rows]
                  ptrdiff_t a_row_stride, ptrdiff_t a_column_stride,
                  uintptr_t out,  // float32 [out_rows, columns], rows contiguous
                  size_t out_stride, float beta, int threads);

}  // namespace lowbit
