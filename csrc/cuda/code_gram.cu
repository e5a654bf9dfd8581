// X X^T of coded rows on the integer tensor cores, in exact sums.
//
// What is meant to make it fast (no GPU was at hand: none of it has been measured):
//   - int8 levels: mma.m16n8k32 does twice the work of a float16 mma, and sums are exact, so the
//     result depends on neither tiles nor order.
//   - One triangle: a block computes a tile on or above the diagonal and stores it twice. Both
//     stores fill whole sectors of 32 bytes. On the diagonal both factors are the same rows.
//   - Codes are decoded once for a block into shared memory, not once for each warp: with tiles of
//     128 a level is used 128 times. prmt looks up four levels at once in registers; 4 bits take
//     8 prmt and 7 other instructions for 8 codes. Only 8 bits need a table in memory.
//   - The order of columns within a step is free, as long as it is the same for both factors:
//     steps of 32 bytes of a chunk keep 2 and 3 bits within the shared memory of 4.
//   - Packed bytes arrive by cp.async while two steps before them are decoded and multiplied.
//   - ldmatrix reads fragments; padded rows keep it free of bank conflicts.
//   - With one scale a row, scales come at the end; with blocks, after each segment, in registers.
// Known to be missing: splitting long rows over blocks where the matrix has few tiles, and the
// warp-group products of sm_90 and sm_100 (mma.sync reaches about two thirds of their rate).
#include "code_steps.cuh"

namespace lowbit {
namespace {

// As `INTEGER_SEGMENT` of lowbit_muon/backends/base.py.
constexpr int kIntegerSegment = 512;

struct Gram {
    const uint8_t* packed;  // [batch, rows, row_bytes]
    const float* scales;    // [batch, rows, blocks]
    float* out;             // [batch, rows, rows]
    int rows, columns;
    int bits;
    int block;      // columns that share a scale
    int blocks;     // scales of a row
    int alignment;  // 16 or 4: of all chunks; 1: none
};

// Steps whose packed bytes are under way or there.
constexpr int kStages = 3;

// A block's tile: WARP_ROWS x WARP_COLUMNS warps, each with ROW_TILES x COLUMN_TILES of 16 x 8.
template <int TILE_SIZE, bool HAS_SEGMENTS>
struct Tile {
    static constexpr int kSize = TILE_SIZE;
    static constexpr bool kSegments = HAS_SEGMENTS;
    static constexpr int kWarpRows = 2;
    static constexpr int kWarpColumns = TILE_SIZE / 32;
    static constexpr int kThreads = kWarpRows * kWarpColumns * kWarpThreads;
    // On a multiprocessor, as far as registers go.
    static constexpr int kBlocks = TILE_SIZE == 128 ? 1 : 2;
    static constexpr int kRowTiles = TILE_SIZE / kWarpRows / 16;
    static constexpr int kColumnTiles = 4;
    // Segments begin and end between slices only if the columns of a step are in order.
    static constexpr int kNarrowBytes = HAS_SEGMENTS ? 64 : 32;  // 2 and 3 bits
    static constexpr int kMaxColumns = HAS_SEGMENTS ? 256 : 128;
    static constexpr int kPitch = kMaxColumns + kRowPadding;
    static constexpr int kStageBytes = 2 * kNarrowBytes;  // most bytes of a row: 3 bits
    static constexpr int kSides = 2;                      // rows and columns of the tile

    struct Shared {
        alignas(16) uint8_t levels[kSides * TILE_SIZE * kPitch];
        alignas(16) uint8_t packed[kStages][kSides * TILE_SIZE * kStageBytes];
        LevelTable table;
    };
    static_assert(sizeof(Shared) <= 99 << 10, "what a block may ask for on sm_86 and sm_89");
};

// The sums of a warp.
template <typename Tile>
struct Sums {
    int whole[Tile::kRowTiles][Tile::kColumnTiles][4];

    __device__ __forceinline__ void clear() {
        for (auto& row : whole) {
            for (auto& tile : row) {
                for (int& sum : tile) {
                    sum = 0;
                }
            }
        }
    }

    // Adds the products of a slice. left, right: this warp's rows and columns in the tile.
    __device__ __forceinline__ void multiply(const uint8_t* left, const uint8_t* right) {
        uint32_t b[Tile::kColumnTiles][2];
#pragma unroll
        for (int j = 0; j < Tile::kColumnTiles; j += 2) {
            load_right(b[j], b[j + 1], right + 8 * j * Tile::kPitch, Tile::kPitch);
        }
#pragma unroll
        for (int i = 0; i < Tile::kRowTiles; ++i) {
            uint32_t a[4];
            load_left(a, left + 16 * i * Tile::kPitch, Tile::kPitch);
#pragma unroll
            for (int j = 0; j < Tile::kColumnTiles; ++j) {
                mma_s8(whole[i][j], a, b[j]);
            }
        }
    }
};

// Calls run(i, j, k, row, column) for each sum of the lane that lies in the matrix.
template <typename Tile, typename Run>
__device__ __forceinline__ void for_each_sum(const Factors& factors, int warp_row, int warp_column,
                                             const Run& run) {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int row = factors.first_row + warp_row + 16 * i + sum_row(k);
                const int column = factors.first_column + warp_column + 8 * j + sum_column(k);
                if (row < factors.rows && column < factors.rows) {
                    run(i, j, k, row, column);
                }
            }
        }
    }
}

template <typename Tile>
__device__ __forceinline__ void run_tile(const Gram& gram, const Factors& factors,
                                         const float* scales, float* out) {
    auto& shared = *reinterpret_cast<typename Tile::Shared*>(dynamic_shared());
    const Steps steps(gram.bits, Tile::kNarrowBytes, gram.columns);
    const int warp = threadIdx.x / kWarpThreads;
    const int warp_row = warp / Tile::kWarpColumns * (16 * Tile::kRowTiles);
    const int warp_column = warp % Tile::kWarpColumns * (8 * Tile::kColumnTiles);
    const uint8_t* const left = shared.levels + warp_row * Tile::kPitch;
    const uint8_t* const right =
        shared.levels + (warp_column + (factors.sides - 1) * Tile::kSize) * Tile::kPitch;

    Sums<Tile> sums;
    sums.clear();
    float total[Tile::kSegments ? Tile::kRowTiles : 1][Tile::kColumnTiles][4] = {};
    const int segment = min_int(gram.block, kIntegerSegment);
    const auto term = [&](int i, int j, int k, int row, int column, int block) {
        const float outer = __fmul_rn(scales[static_cast<int64_t>(row) * gram.blocks + block],
                                      scales[static_cast<int64_t>(column) * gram.blocks + block]);
        return __fmul_rn(__int2float_rn(sums.whole[i][j][k]), outer);
    };

    for (int step = 0; step < kStages - 1; ++step) {
        fetch<Tile>(shared.packed[step], factors, steps, step, gram.alignment);
    }
    for (int step = 0; step < steps.count; ++step) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // all copies of the step are there; the levels before are read
        const int ahead = step + kStages - 1;
        fetch<Tile>(shared.packed[ahead % kStages], factors, steps, ahead, gram.alignment);
        const uint8_t* const packed = shared.packed[step % kStages];
        const auto decode_bits = [&](auto bits) {
            decode<Tile, bits.value>(shared.levels, packed, shared.table, factors, steps, step,
                                     gram.columns);
        };
        switch (gram.bits) {
            case 2:
                decode_bits(std::integral_constant<int, 2>());
                break;
            case 3:
                decode_bits(std::integral_constant<int, 3>());
                break;
            case 4:
                decode_bits(std::integral_constant<int, 4>());
                break;
            default:
                decode_bits(std::integral_constant<int, 8>());
        }
        __syncthreads();  // the levels are there
        const int first = step * steps.columns;
        const int slices = ceil_divide(min_int(steps.columns, gram.columns - first), kSlice);
        for (int slice = 0; slice < slices; ++slice) {
            sums.multiply(left + slice * kSlice, right + slice * kSlice);
            if constexpr (Tile::kSegments) {
                const int end = first + (slice + 1) * kSlice;
                if (end % segment == 0 || end >= gram.columns) {
                    const int block = (end - 1) / segment * segment / gram.block;
                    for_each_sum<Tile>(factors, warp_row, warp_column,
                                       [&](int i, int j, int k, int row, int column) {
                                           const float value = term(i, j, k, row, column, block);
                                           total[i][j][k] = __fadd_rn(total[i][j][k], value);
                                       });
                    sums.clear();
                }
            }
        }
    }
    const bool mirrors = factors.sides == 2;
    for_each_sum<Tile>(
        factors, warp_row, warp_column, [&](int i, int j, int k, int row, int column) {
            const float value = Tile::kSegments ? total[i][j][k] : term(i, j, k, row, column, 0);
            out[static_cast<int64_t>(row) * gram.rows + column] = value;
            if (mirrors) {
                out[static_cast<int64_t>(column) * gram.rows + row] = value;
            }
        });
}

// Tiles on and above the diagonal.
constexpr int64_t triangle(int64_t tiles) {
    return tiles * (tiles + 1) / 2;
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    code_gram(Gram gram, LevelTable table) {
    auto& shared = *reinterpret_cast<typename Tile::Shared*>(dynamic_shared());
    for (int i = threadIdx.x; i < kMaxLevels / 4; i += Tile::kThreads) {
        shared.table.words[i] = table.words[i];
    }
    const int64_t tiles = triangle(ceil_divide(gram.rows, Tile::kSize));
    const int64_t matrix = blockIdx.x / tiles;
    const int index = static_cast<int>(blockIdx.x % tiles);
    // The last column of tiles that begins at or before the index; the root is but a first guess.
    int column = static_cast<int>(sqrtf(2.0f * static_cast<float>(index)));
    while (triangle(column) > index) {
        --column;
    }
    while (triangle(column + 1) <= index) {
        ++column;
    }
    const int row = index - static_cast<int>(triangle(column));

    Factors factors;
    factors.row_bytes = row_bytes(gram.bits, gram.columns);
    factors.packed = gram.packed + matrix * gram.rows * factors.row_bytes;
    factors.first_row = row * Tile::kSize;
    factors.first_column = column * Tile::kSize;
    factors.rows = gram.rows;
    factors.sides = row == column ? 1 : 2;
    run_tile<Tile>(gram, factors, gram.scales + matrix * gram.rows * gram.blocks,
                   gram.out + matrix * gram.rows * gram.rows);
}

template <typename Tile>
int run(const Gram& gram, const LevelTable& table, int64_t batch, void* stream) {
    const int64_t blocks = batch * triangle(ceil_divide(gram.rows, Tile::kSize));
    if (blocks >= int64_t{1} << 31) {
        return kBadArgument;
    }
    const Grid grid = {dim3(static_cast<unsigned>(blocks)), Tile::kThreads,
                       sizeof(typename Tile::Shared)};
    return launch(code_gram<Tile>, grid, stream, gram, table);
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

// out <- X X^T with X = levels[code] * scale; entries as `Backend.code_gram` defines them.
extern "C" int lowbit_code_gram(int64_t batch, int rows, int columns, int bits,
                                int block,             // columns, or a multiple of 32 (see base.py)
                                const int8_t* levels,  // [256], on the host
                                const uint8_t* packed,  // [batch, rows, row_bytes]
                                const float* scales,    // [batch, rows, ceil(columns / block)]
                                float* out,             // [batch, rows, rows]
                                int tile,               // 64, 128, or 0: chosen here
                                void* stream) {
    const bool has_segments = block < columns;
    const bool fits =
        !has_segments ||
        (block % kSlice == 0 && (kIntegerSegment % block == 0 || block % kIntegerSegment == 0));
    if (batch <= 0 || rows <= 0 || columns <= 0 || block <= 0 || !fits) {
        return kBadArgument;
    }
    const int64_t bytes = row_bytes(bits, columns);
    const uintptr_t places = reinterpret_cast<uintptr_t>(packed) |
                             static_cast<uintptr_t>(rows == 1 && batch == 1 ? 0 : bytes) |
                             static_cast<uintptr_t>(bits == 3 ? plane_bytes(2, columns) : 0);
    Gram gram = {packed, scales, out, rows, columns, bits, block, ceil_divide(columns, block), 1};
    gram.alignment = places % 16 == 0 ? 16 : places % 4 == 0 ? 4 : 1;
    LevelTable table;
    __builtin_memcpy(&table, levels, sizeof table);
    if (has_segments) {
        // Float sums beside the integers: 64 is what the registers of a thread hold.
        return run<Tile<64, true>>(gram, table, batch, stream);
    }
    if (tile == 0) {
        // A tile of 128 decodes half as often for each product, but only pays once there are as
        // many as multiprocessors; until then 64 keeps four times as many of them busy.
        const bool many = batch * triangle(ceil_divide(rows, 128)) >= multiprocessors();
        tile = many ? 128 : 64;
    }
    if (tile == 128) {
        return run<Tile<128, false>>(gram, table, batch, stream);
    }
    return run<Tile<64, false>>(gram, table, batch, stream);
}
