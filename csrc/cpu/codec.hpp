// Codec entry points: check the arguments, split the rows over threads, call the ISA's kernel.
//
// Matrices are row-major with the short side as rows, a batch is one matrix of all its rows, and
// strides count elements. Pointers arrive as
// integers, and the caller vouches for the memory behind them. Throws std::invalid_argument.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "arguments.hpp"

namespace lowbit {

// Scales (unless statistic is "given") and codes of x.
void quantize(size_t rows, size_t columns,
              uintptr_t x,  // float32 [rows, columns]
              size_t x_stride,
              const std::string& statistic,  // "given", "absmax" or "rms"
              float clip, int bits, size_t block_size,
              uintptr_t thresholds,  // float32 [threshold_count], ascending
              size_t threshold_count,
              uintptr_t packed,  // uint8 [rows, row_bytes]
              size_t row_bytes,
              uintptr_t scales,  // float32 [rows, ceil(columns / block_size)]
              int threads);

// buffer <- buffer_weight * buffer + code_weight * levels[code] * scale + grad_weight * grad, and
// row_sums <- the sum of squares of each row of the result. A weight of 0 leaves the buffer unread;
// packed or grad may be 0 (absent).
void accumulate(size_t batch, size_t rows, size_t columns,
                uintptr_t buffer,      // float32 [batch, rows, columns]
                size_t buffer_stride,  // between rows, also from one matrix to the next
                float buffer_weight, int bits, size_t block_size,
                uintptr_t levels,  // float32 [level_count], ascending
                size_t level_count,
                uintptr_t packed,  // uint8 [batch, rows, row_bytes]
                size_t row_bytes,
                uintptr_t scales,  // float32 [batch, rows, ceil(columns / block_size)]
                float code_weight,
                const Matrices& grad,          // [batch, rows, columns]
                const std::string& grad_type,  // "float32", "bfloat16" or "float16"
                float grad_weight,
                uintptr_t row_sums,  // float64 [batch, rows]
                int threads);

// Rows of x, in place, by the orthogonal matrix of `Backend.rotate` or its inverse.
void rotate(size_t rows, size_t columns,
            uintptr_t x,  // float32 [rows, columns]
            size_t x_stride,
            uintptr_t first_signs,   // float32 [columns]
            uintptr_t second_signs,  // float32 [columns]
            bool inverse, int threads);

}  // namespace lowbit
