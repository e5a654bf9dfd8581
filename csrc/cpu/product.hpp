// Matrix product entry points: check the arguments, choose blocks, split them over threads.
//
// Everything is a batch of matrices, each by itself; small ones share the threads, large ones take
// them all in turn. Pointers arrive as integers, and the caller vouches for the memory behind them.
// Results depend neither on the batch that a matrix is in nor on the number of threads. Throws
// std::invalid_argument.
//
// `rounded`: the factors are rounded to bfloat16 and summed in float32, on levels that have
// products of bfloat16; where a factor's diagonal is named, its elements are kept in float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "arguments.hpp"

namespace lowbit {

// The most bytes that the functions below have held at once since the last call.
size_t take_most_workspace();

// Whether the level in use takes `rounded`.
bool has_rounded_products();

// c <- alpha * a b + beta * c; c is not read if beta is 0.
void product(size_t batch, size_t rows, size_t columns, size_t depth,
             const Matrices& a,  // float32 [batch, rows, depth]
             const Matrices& b,  // [batch, depth, columns]
             const Matrices& c,  // [batch, rows, columns], rows contiguous
             uintptr_t alphas,   // float32 [batch], or 0: alpha for all
             float alpha, float beta, bool rounded,
             std::optional<ptrdiff_t> a_diagonal,  // where rounded: of the elements (k + this, k)
             std::optional<ptrdiff_t> b_diagonal,  // of (k, k + this); at most one of the two
             int threads);

// out <- alpha * a b + beta * addend, where the caller knows a b to be symmetric: half is computed.
void symmetric_product(size_t batch, size_t size, size_t depth,
                       const Matrices& a,       // [batch, size, depth]
                       const Matrices& b,       // [batch, depth, size]; 0: the transpose of a
                       const Matrices& addend,  // [batch, size, size], rows contiguous; may be out;
                                                // not read if beta is 0
                       const Matrices& out,     // [batch, size, size], rows contiguous
                       float alpha, float beta,
                       bool rounded,  // with b given and depth = size both diagonals are kept
                       int threads);

// out <- out + sum of weights[i] * (x + shifts[i] I)^-1, where all of these are symmetric positive
// definite. `together` inverses are taken side by side, a thread each, or one with all threads.
void add_inverses(size_t batch, size_t size,
                  const Matrices& x,  // [batch, size, size], rows contiguous
                  size_t count,
                  uintptr_t shifts,     // float32 [count]
                  uintptr_t weights,    // float32 [count]
                  const Matrices& out,  // [batch, size, size], rows contiguous; not x
                  size_t together,
                  uintptr_t workspace,  // float32 [together, inverse_floats(size)]
                  int threads);
size_t inverse_floats(size_t size);

// out <- X X^T of X = levels[code] * scale of its block of columns, summed in exact integers.
void code_gram(size_t batch, size_t rows, size_t columns, int bits,
               uintptr_t levels,  // int8 [256]
               uintptr_t packed,  // uint8 [batch, rows, row_bytes]
               size_t row_bytes,
               uintptr_t scales,   // float32 [batch, rows, ceil(columns / block_size)]
               size_t block_size,  // all columns, or a multiple of 4 that goes with 512
               uintptr_t out,      // float32 [batch, rows, rows]
               int threads);

// out <- a X + beta * out with a * diag(scales) rounded to 16 bits, in two limbs of int8.
void code_product(size_t batch, size_t out_rows, size_t rows, size_t columns, int bits,
                  uintptr_t levels,  // int8 [256]
                  uintptr_t packed,  // uint8 [batch, rows, row_bytes]
                  size_t row_bytes,
                  uintptr_t scales,   // float32 [batch, rows]
                  const Matrices& a,  // [batch, out_rows, rows]
                  uintptr_t out,      // float32 [batch, out_rows, columns]
                  float beta, int threads);

// out <- X v with the columns of v rounded to 16 bits, in two limbs of int8.
void code_times(size_t batch, size_t out_columns, size_t rows, size_t columns, int bits,
                uintptr_t levels,  // int8 [256]
                uintptr_t packed,  // uint8 [batch, rows, row_bytes]
                size_t row_bytes,
                uintptr_t scales,   // float32 [batch, rows]
                const Matrices& v,  // [batch, columns, out_columns]
                uintptr_t out,      // float32 [batch, rows, out_columns]
                int threads);

}  // namespace lowbit
