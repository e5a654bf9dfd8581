// Products of bfloat16 and int8 in AMX's tiles of 16 x 16 sums. A strip's sixteen words at sixteen
// steps of k are a tile of the right operand as they are packed, and of the left one once they are
// transposed. All else, products of floats too, is avx512bf16's.
//
// One instruction multiplies 16 x 16 words by 16 x 16, in the time of a few AVX-512 ones that
// multiply 16 x 1 by 1 x 16. Integer sums are exact; those of bfloat16 are in float32, as theirs,
// but with another order within a step.
#define LOWBIT_ISA amx
#define LOWBIT_LANES_FILE "lanes_avx512.inl"
#include "common.inl"

namespace lowbit {
namespace avx512bf16 {
extern const ProductKernels product_kernels;
}
namespace amx {
namespace {

#include "sums.inl"

constexpr size_t kTileSteps = 16;
constexpr size_t kTileWords = kTileSteps * kStrip;
constexpr size_t kTileBytes = kStrip * sizeof(uint32_t);  // of each of its rows
constexpr int kTileStrips = 3;  // tiles 0 to 2: sums; 3: rows; 4 to 6: columns

// The layout that LDTILECFG reads.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// In place: row i, step k of a strip becomes step k of row i, in each group of sixteen steps.
void turn_strip(uint32_t* words, size_t steps) {
    uint32_t turned[kTileWords];
    for (size_t step = 0; step < steps; step += kTileSteps, words += kTileWords) {
        for (size_t k = 0; k < kTileSteps; k += 4) {
            for (size_t i = 0; i < kStrip; i += 4) {
                transpose_4x4(words + k * kStrip + i, kStrip, turned + i * kTileSteps + k,
                              kTileSteps);
            }
        }
        memcpy(words, turned, sizeof turned);
    }
}

// The intrinsics take the numbers of tiles literally.
#define LOWBIT_ADD_PRODUCT(tile, columns)       \
    if constexpr (TYPE == WordType::bfloat16) { \
        _tile_dpbf16ps(tile, 3, columns);       \
    } else {                                    \
        _tile_dpbssd(tile, 3, columns);         \
    }

template <WordType TYPE, int STRIPS>
inline void multiply_tiles(const MultiplyArgs& args, size_t row, size_t column) {
    const uint32_t* const a = args.a + row * args.a_steps;
    const uint32_t* const b = args.b + column * args.b_steps;
    const size_t b_stride = args.b_steps * kStrip;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (size_t k = 0; k < args.steps * kStrip; k += kTileWords) {
        _tile_loadd(3, a + k, kTileBytes);
        _tile_loadd(4, b + k, kTileBytes);
        LOWBIT_ADD_PRODUCT(0, 4)
        if constexpr (STRIPS > 1) {
            _tile_loadd(5, b + b_stride + k, kTileBytes);
            LOWBIT_ADD_PRODUCT(1, 5)
        }
        if constexpr (STRIPS > 2) {
            _tile_loadd(6, b + 2 * b_stride + k, kTileBytes);
            LOWBIT_ADD_PRODUCT(2, 6)
        }
    }
    alignas(64) uint32_t sums[kTileStrips][kTileWords];
    _tile_stored(0, sums[0], kTileBytes);
    if constexpr (STRIPS > 1) {
        _tile_stored(1, sums[1], kTileBytes);
    }
    if constexpr (STRIPS > 2) {
        _tile_stored(2, sums[2], kTileBytes);
    }
    const size_t rows = min_size(kStrip, args.rows - row);
    for (size_t s = 0; s < STRIPS; ++s) {
        const size_t first = column + s * kStrip;
        for (size_t r = 0; r < rows; ++r) {
            const uint32_t* const from = sums[s] + r * kStrip;
            if constexpr (TYPE == WordType::bfloat16) {
                const F32x16 sum = load(reinterpret_cast<const float*>(from));
                finish_strip(args, sum, row + r, first, args.columns - first);
            } else {
                finish_strip(args, load_words(from), row + r, first, args.columns - first);
            }
        }
    }
}

template <WordType TYPE, int STRIPS = kTileStrips>
inline void multiply_columns(const MultiplyArgs& args, size_t column) {
    for (; column + (STRIPS - 1) * kStrip < args.columns; column += STRIPS * kStrip) {
        const size_t beyond = args.first_column + column + STRIPS * kStrip;
        const size_t rows = args.upper ? min_size(args.rows, beyond) : args.rows;
        for (size_t row = 0; row < rows; row += kStrip) {
            multiply_tiles<TYPE, STRIPS>(args, row, column);
        }
    }
    if constexpr (STRIPS > 1) {
        multiply_columns<TYPE, STRIPS - 1>(args, column);
    }
}

void multiply(const MultiplyArgs& args) {
    if (args.type != WordType::bfloat16 && args.type != WordType::int8) {
        return avx512bf16::product_kernels.multiply(args);
    }
    TileShapes shapes;
    for (int tile = 0; tile < 2 * kTileStrips + 1; ++tile) {
        shapes.row_bytes[tile] = kTileBytes;
        shapes.rows[tile] = kStrip;
    }
    _tile_loadconfig(&shapes);
    if (args.type == WordType::bfloat16) {
        multiply_columns<WordType::bfloat16>(args, 0);
    } else {
        multiply_columns<WordType::int8>(args, 0);
    }
    _tile_release();  // tiles in use make threads slower to switch
}

}  // namespace

extern const TileKernels tile_kernels;
const TileKernels tile_kernels = {kTileSteps, turn_strip, multiply};

}  // namespace amx
}  // namespace lowbit
