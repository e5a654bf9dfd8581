// What the dispatcher hands to a kernel, and the table of kernels each ISA level provides.
//
// Plain data only: this header is compiled with different instruction sets, and an inline function
// in it could be linked from the AVX-512 object into code that must run without AVX-512.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace lowbit {

constexpr int kMaxBits = 8;
constexpr size_t kMaxLevels = size_t{1} << kMaxBits;

// Codes are packed in chunks of 64 bytes, and a 1-bit plane packs 512 of them in a chunk: a panel
// of 512 columns starts on a chunk boundary in every plane.
constexpr size_t kPanelColumns = 512;

constexpr int kCells = 32;

struct CodebookTables {
    // levels[code], padded to 256 with the last level; thresholds, padded with +inf.
    alignas(64) float levels[kMaxLevels];
    alignas(64) float thresholds[kMaxLevels];
    // Thresholds as a search tree: node i of step s (i < 2^s) splits the codes that share the
    // leading bits i.
    alignas(64) float steps[kMaxBits][kMaxLevels / 2];

    // Cells: equal parts of the z axis,
    //   cell(z) = round(clamp(fma(z, cell_scale, cell_offset), 0, cell_last)).
    // It never decreases with z. So where no two thresholds share a cell,
    //   code(z) = base + (z > thresholds[base]), base = number of thresholds in cells before z's.
    // Up to 4 bits there are 32 cells and base = cell_bases[cell]. With 8 bits there are as many
    // cells as codes and base = cell, as equally spaced thresholds allow.
    bool has_cells;
    float cell_scale, cell_offset, cell_last;
    alignas(64) int32_t cell_bases[kCells];
};

enum class Statistic { given, absmax, rms };

struct QuantizeArgs {
    const float* x;  // [rows, columns]
    size_t x_stride;
    size_t columns;
    int bits;           // 2, 3, 4 or 8
    size_t block_size;  // 1..columns
    Statistic statistic;
    float clip;
    const CodebookTables* codebook;
    uint8_t* packed;  // [rows, row_bytes]
    size_t row_bytes;
    float* scales;  // [rows, blocks]; read if statistic is given, else written
    size_t blocks;
};

enum class GradType { none, float32, bfloat16, float16 };

struct AccumulateArgs {
    float* buffer;  // [rows, columns]
    size_t buffer_stride;
    float buffer_weight;  // 0: the buffer is not read
    size_t columns;

    const uint8_t* packed;  // [rows, row_bytes], or null
    size_t row_bytes;
    const float* scales;  // [rows, blocks]
    size_t blocks;
    int bits;
    size_t block_size;
    const CodebookTables* codebook;
    float code_weight;

    const void* grad;  // [rows, columns]; strides in elements, possibly negative or zero
    GradType grad_type;
    ptrdiff_t grad_row_stride;
    ptrdiff_t grad_column_stride;
    float grad_weight;

    double* row_sums;  // [rows]: sum of squares of each row of the result
};

struct RotateArgs {
    float* x;  // [rows, columns], changed in place
    size_t x_stride;
    size_t columns;
    size_t size;                // of each transform: the largest power of two <= columns
    float scale;                // 1 / sqrt(size)
    const float* first_signs;   // [columns], +1 or -1, before the transform of the first columns
    const float* second_signs;  // [columns], before that of the last columns
    bool inverse;
};

// Kernels work on rows [begin, end) in one thread; rows are independent of each other.
struct CodecKernels {
    void (*quantize)(const QuantizeArgs& args, size_t begin, size_t end);
    void (*accumulate)(const AccumulateArgs& args, size_t begin, size_t end);
};
using RotationKernel = void (*)(const RotateArgs& args, size_t begin, size_t end);

}  // namespace lowbit
