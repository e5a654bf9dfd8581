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

// ---- Matrix products ----
//
// Operands are packed in strips of 16 rows (of the left operand) or columns (of the right one): for
// each step of k the 16 words of a strip lie side by side. A word is 32 bits along k: one float,
// two int16, four int8 or two bfloat16.
constexpr size_t kStrip = 16;

enum class WordType { float32, int16, int8, bfloat16 };

// Rows [0, rows) and k [0, depth) of a float matrix, element (i, k) at i * row_stride + k *
// k_stride.
struct PackFloatsArgs {
    const float* from;
    ptrdiff_t row_stride;
    ptrdiff_t k_stride;
    size_t rows;  // 1..16; the rest of the strip is zero
    size_t depth;
    uint32_t* to;  // [words of depth][16]
};

// Codes as whole levels. For the left operand and for a Gram matrix the strip is 16 rows of codes
// and k runs along them; otherwise it is 16 columns and k runs over the rows.
struct PackCodesArgs {
    const uint8_t* packed;  // [rows, row_bytes]
    size_t row_bytes;
    size_t rows;
    size_t columns;
    int bits;
    const int8_t* levels;  // [256]
    bool shifted;          // levels[code] = levels[0] + min(code, last_code)
    uint8_t last_code;
    size_t panel;  // first column, a multiple of kPanelColumns
    size_t count;  // columns, at most kPanelColumns
    uint32_t* to;  // [strips][steps][16]
    size_t steps;  // of a strip of columns
    // [rows, sums_per_row]: the sum of the levels of each `sum_block` columns is added to it; null:
    // not needed.
    int32_t* row_sums;
    size_t sums_per_row;
    size_t sum_block;
};

// Rows of a * diag(factors), each in two limbs of int8 and one scale: scale * (256 * high + low),
// |256 * high + low| <= kLimbLimit. A row that is not finite gets the scale NaN.
constexpr int kLimbLimit = 32639;  // the largest with both limbs in [-128, 127]
struct PackLimbsArgs {
    const float* a;  // element (i, k) at i * row_stride + k * k_stride
    ptrdiff_t row_stride;
    ptrdiff_t k_stride;
    size_t rows;
    size_t depth;
    const float* factors;  // [depth]
    uint32_t* high;        // [strips][steps][16]
    uint32_t* low;
    size_t steps;        // of a strip: words of `depth`, up to a group of four
    float* scales;       // [rows]
    int32_t* high_sums;  // [rows], overwritten
    int32_t* low_sums;
    float* scratch;  // [depth]
};

// One row of the same, its words side by side.
struct RoundLimbsArgs {
    const float* a;  // element k at k * k_stride
    ptrdiff_t k_stride;
    size_t depth;
    const float* factors;  // [depth], or null
    uint32_t* high;        // [words], zero past the end
    uint32_t* low;
    size_t words;
    float* scale;
    int32_t* high_sum;
    int32_t* low_sum;
    float* scratch;  // [depth]
};

// A few rows in limbs times coded X, or coded X times a few columns in limbs.
struct NarrowArgs {
    PackCodesArgs codes;   // all rows and columns; no panel
    const uint32_t* high;  // [out_rows][words]
    const uint32_t* low;
    size_t words;  // a multiple of 16
    size_t out_rows;
    int32_t* high_sums;  // [out_rows][stride]
    int32_t* low_sums;
    size_t stride;      // a multiple of 16
    uint32_t* scratch;  // [kNarrowScratch][words]; coded X times columns
};
constexpr int kNarrowScratch = 4;

// Larger inverses are made of products.
constexpr size_t kSmallInverse = 64;

// sums (+)= strips of rows times strips of columns.
struct MultiplyArgs {
    WordType type;
    const uint32_t* a;        // [row strips][a_steps][16], from the first step wanted
    const uint32_t* b;        // [column strips][b_steps][16]
    size_t a_steps, b_steps;  // between strips
    size_t steps;             // to multiply
    size_t rows, columns;
    void* sums;  // float or int32 [rows, columns]
    size_t stride;
    bool add;  // to the sums; with floats otherwise to beta * addend
    float alpha, beta;
    const float*
        addend;  // [rows, columns], may be the sums; read if beta is not 0 and add is false
    size_t addend_stride;
    bool
        upper;  // only what lies on or right of the diagonal is needed; a is the whole left operand
    size_t first_column;  // of b, counted from the diagonal
};

struct TileKernels {
    size_t steps;
    void (*turn_strip)(uint32_t* words, size_t steps);
    void (*multiply)(const MultiplyArgs& args);  // codes, bfloat16
};

struct ProductKernels {
    WordType code_type;  // how this level packs codes
    bool offset;         // int8 sums have 128 * (sum of the left row) too much
    // Where codes and bfloat16 are multiplied in tiles: of so many steps, so that zeros follow a
    // strip's last one, and with the left operand's strips turned. Else 0 and null.
    size_t tile_steps;
    void (*turn_strip)(uint32_t* words, size_t steps);
    size_t group_columns;  // columns that one pass over the rows takes
    void (*pack_floats)(const PackFloatsArgs& args);
    // rounded to bfloat16, ties to even, subnormals to zero; null where the level has no products
    // of them
    void (*pack_bfloat16)(const PackFloatsArgs& args);
    void (*pack_code_rows)(const PackCodesArgs& args, size_t first_row);  // one strip
    void (*pack_code_columns)(const PackCodesArgs& args, size_t step);    // all strips
    void (*pack_limbs)(const PackLimbsArgs& args, size_t first_row);      // one strip
    void (*round_limbs)(const RoundLimbsArgs& args);
    // rows of limbs times rows [begin, end) of X, added to the sums; begin is a multiple of 4
    void (*add_code_columns)(const NarrowArgs& args, size_t begin, size_t end);
    // rows [begin, end) of X times rows of limbs
    void (*dot_code_rows)(const NarrowArgs& args, size_t begin, size_t end);
    void (*multiply)(const MultiplyArgs& args);
    // Corrections are unsigned, since they may pass the range of int32 on their way.
    // out[i] (+)= (sums[i] - correction) * (row_scale * scales[i]); without adding, out may be the
    // sums
    void (*scale_sums)(const int32_t* sums, uint32_t correction, float row_scale,
                       const float* scales, size_t count, bool add, float* out);
    // out[i] = beta * out[i] + scale * (256 * (high[i] - high_correction) + low[i] -
    // low_correction)
    void (*join_limbs)(const int32_t* high, const int32_t* low, uint32_t high_correction,
                       uint32_t low_correction, float scale, float beta, size_t count, float* out);
    // to[i] += factor * factors[i] * x[i * x_stride]; factors are one where they are null
    void (*add_scaled)(float* to, const float* x, ptrdiff_t x_stride, float factor,
                       const float* factors, size_t count);
    // the part below the diagonal of rows [begin, end), from that above it
    void (*mirror)(float* matrix, size_t stride, size_t begin, size_t end);
    // x [size, size] <- L^-1 of x = L L^T, zeros above the diagonal; size <= kSmallInverse
    void (*factor_small)(float* x, size_t stride, size_t size);
    // x <- x^T x of a lower triangle
    void (*square_small)(float* x, size_t stride, size_t size);
};

}  // namespace lowbit
