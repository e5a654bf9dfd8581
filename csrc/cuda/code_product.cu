// A X for coded X in two integer products (`Backend.code_product`): A is split into limbs first.
//
// What is meant to make it fast (no GPU was at hand: none of it has been measured):
//   - Two int8 products on tensor cores stand for one of about 16 bits, and their sums are exact.
//   - Levels are decoded once for both limbs of 64 rows of A. The tensor cores want the factors
//     along k, codes lie across it: four rows of four codes are transposed in registers, 8 prmt for
//     16 codes.
//   - The codes of the next step are read into registers and its limbs copied by cp.async while
//     this step is multiplied; two buffers, one barrier a step.
//   - Lanes write levels of neighbouring k, so that no two of them meet in a bank.
// Known to be missing: reading codes by cp.async, and tiles of 128 rows of A, which would decode
// half as often.
#include "levels.cuh"

namespace lowbit {
namespace {

// As LIMB_LIMIT of lowbit_muon/backends/base.py.
constexpr int kLimbLimit = 127 * 256 + 127;
constexpr int kTileRows = 64;      // of A
constexpr int kTileColumns = 128;  // of X
constexpr int kDepth = 64;         // rows of X in a step; limbs are padded to a multiple
constexpr int kPitch = kDepth + kRowPadding;
constexpr int kThreads = 256;
constexpr int kWarpColumns = 4;  // warps across a tile, two down
constexpr int kRowTiles = 2;     // of a warp: 32 x 32
constexpr int kColumnTiles = 4;

// ---- Limbs ----

struct Split {
    const float* a;  // [batch, out_rows, rows], any strides
    int64_t batch_stride, row_stride, column_stride;
    const float* factors;  // [batch, rows]: the scales of X
    int8_t* limbs;         // [batch, 2, out_rows, padded(rows)]: high ones, then low ones
    float* scales;         // [batch, out_rows]
    int out_rows, rows;
};

constexpr int padded_depth(int rows) {
    return ceil_divide(rows, kDepth) * kDepth;
}

__global__ void __launch_bounds__(kMaxThreads) split_limbs(Split split) {
    uint32_t* const partial = reinterpret_cast<uint32_t*>(dynamic_shared());
    const int64_t matrix = blockIdx.x / split.out_rows;
    const int64_t row = blockIdx.x % split.out_rows;
    const float* const a = split.a + matrix * split.batch_stride + row * split.row_stride;
    const float* const factors = split.factors + matrix * split.rows;
    const auto value = [&](int k) { return __fmul_rn(a[k * split.column_stride], factors[k]); };
    uint32_t bits = 0;
    for (int k = threadIdx.x; k < split.rows; k += blockDim.x) {
        bits = Larger()(bits, magnitude_bits(value(k)));
    }
    const float largest = __uint_as_float(reduce_threads(bits, partial, Larger()));
    const bool finite = __fsub_rn(largest, largest) == 0.0f;
    const float limit = static_cast<float>(kLimbLimit);
    const float scale = __fdiv_rn(largest, limit);
    // Too small to divide by: below the smallest normal float.
    const bool usable = finite && scale >= 1.17549435e-38f;
    const float inverse = usable ? __fdiv_rn(limit, largest) : 0.0f;
    const int depth = padded_depth(split.rows);
    int8_t* const high = split.limbs + (matrix * 2 * split.out_rows + row) * depth;
    int8_t* const low = high + static_cast<int64_t>(split.out_rows) * depth;
    for (int k = threadIdx.x; k < depth; k += blockDim.x) {
        const bool present = usable && k < split.rows;
        const int whole = present ? __float2int_rn(__fmul_rn(value(k), inverse)) : 0;
        const int rest = ((whole + 128) & 255) - 128;
        high[k] = static_cast<int8_t>((whole - rest) / 256);
        low[k] = static_cast<int8_t>(rest);
    }
    if (threadIdx.x == 0) {
        split.scales[matrix * split.out_rows + row] = finite ? scale : __uint_as_float(0x7fc00000);
    }
}

// ---- Products ----

struct Product {
    const int8_t* limbs;    // [batch, 2, out_rows, depth]
    const float* scales;    // [batch, out_rows]
    const uint8_t* packed;  // [batch, rows, row_bytes]
    float* out;             // [batch, out_rows, columns]
    float beta;
    int out_rows, rows, columns;
    int bits;
};

struct Shared {
    alignas(16) uint8_t limbs[2][2][kTileRows * kPitch];  // [buffer][high, low]
    alignas(16) uint8_t levels[2][kTileColumns * kPitch];
    LevelTable table;
};
static_assert(sizeof(Shared) <= 48 << 10, "what every block gets unasked");

// Where a block works.
struct Place {
    const int8_t* limbs;
    const uint8_t* packed;
    int64_t row_bytes;
    int first_row, first_column;
};

// A thread's share of the codes of a step: kUnits times four rows of four neighbours.
constexpr int kGroups = kDepth / kQuad;  // of four rows
constexpr int kUnits = kGroups * (kTileColumns / kQuad) / kThreads;
struct StepCodes {
    uint32_t quads[kUnits][kQuad];
};

__device__ __forceinline__ int unit_group(int unit) {
    return (unit * kThreads + static_cast<int>(threadIdx.x)) % kGroups;
}
__device__ __forceinline__ int unit_column(int unit) {
    return (unit * kThreads + static_cast<int>(threadIdx.x)) / kGroups * kQuad;
}

// Rows past the end repeat the last one: their limbs are zero.
template <int BITS>
__device__ __forceinline__ void load_codes(StepCodes& codes, const Product& product,
                                           const Place& place, int step) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
        const int column = place.first_column + unit_column(unit);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
            const int row = step * kDepth + unit_group(unit) * kQuad + i;
            const uint8_t* const from =
                place.packed + min_int(row, product.rows - 1) * place.row_bytes;
            codes.quads[unit][i] =
                column < product.columns ? load_quad<BITS>(from, column, product.columns) : 0;
        }
    }
}

// Codes to levels, transposed: word `group` of a column holds its levels of four rows.
__device__ __forceinline__ void store_levels(uint8_t* levels, const StepCodes& codes,
                                             const LevelTable& table, bool is_byte) {
    const uint32_t registers[4] = {table.words[0], table.words[1], table.words[2], table.words[3]};
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
        uint32_t rows[kQuad];
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
            if (is_byte) {
                rows[i] = look_up_bytes(codes.quads[unit][i],
                                        reinterpret_cast<const uint8_t*>(table.words));
            } else {
                uint32_t unused;
                look_up_nibbles<4>(codes.quads[unit][i], registers, rows[i], unused);
            }
        }
        const uint32_t first_01 = permute_bytes(rows[0], rows[1], 0x5140);
        const uint32_t first_23 = permute_bytes(rows[2], rows[3], 0x5140);
        const uint32_t last_01 = permute_bytes(rows[0], rows[1], 0x7362);
        const uint32_t last_23 = permute_bytes(rows[2], rows[3], 0x7362);
        const uint32_t columns[kQuad] = {
            permute_bytes(first_01, first_23, 0x5410), permute_bytes(first_01, first_23, 0x7632),
            permute_bytes(last_01, last_23, 0x5410), permute_bytes(last_01, last_23, 0x7632)};
        uint8_t* const to = levels + unit_column(unit) * kPitch + unit_group(unit) * kQuad;
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
            *reinterpret_cast<uint32_t*>(to + i * kPitch) = columns[i];
        }
    }
}

__device__ __forceinline__ void fetch_limbs(uint8_t (&limbs)[2][kTileRows * kPitch],
                                            const Product& product, const Place& place, int step) {
    constexpr int pieces = kDepth / 16;
    const int depth = padded_depth(product.rows);
    for (int i = threadIdx.x; i < 2 * kTileRows * pieces; i += kThreads) {
        const int limb = i / (kTileRows * pieces);
        const int row = i / pieces % kTileRows;
        const int byte = i % pieces * 16;
        const int64_t from = min_int(place.first_row + row, product.out_rows - 1) +
                             static_cast<int64_t>(limb) * product.out_rows;
        copy_async<16>(limbs[limb] + row * kPitch + byte,
                       place.limbs + from * depth + step * kDepth + byte);
    }
    close_copies();
}

__global__ void __launch_bounds__(kThreads, 1) code_product(Product product, LevelTable table) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    for (int i = threadIdx.x; i < kMaxLevels / 4; i += kThreads) {
        shared.table.words[i] = table.words[i];
    }
    const int64_t across = ceil_divide(product.columns, kTileColumns);
    const int64_t down = ceil_divide(product.out_rows, kTileRows);
    const int64_t matrix = blockIdx.x / (across * down);
    Place place;
    // Blocks beside each other read the same codes.
    place.first_row = static_cast<int>(blockIdx.x % down) * kTileRows;
    place.first_column = static_cast<int>(blockIdx.x / down % across) * kTileColumns;
    place.row_bytes = row_bytes(product.bits, product.columns);
    place.packed = product.packed + matrix * product.rows * place.row_bytes;
    place.limbs = product.limbs + matrix * 2 * product.out_rows * padded_depth(product.rows);

    StepCodes codes;
    const auto prefetch = [&](int step) {
        fetch_limbs(shared.limbs[step % 2], product, place, step);
        switch (product.bits) {
            case 2:
                return load_codes<2>(codes, product, place, step);
            case 3:
                return load_codes<3>(codes, product, place, step);
            case 4:
                return load_codes<4>(codes, product, place, step);
            default:
                return load_codes<8>(codes, product, place, step);
        }
    };
    const int warp = threadIdx.x / kWarpThreads;
    const int warp_row = warp / kWarpColumns * (16 * kRowTiles);
    const int warp_column = warp % kWarpColumns * (8 * kColumnTiles);
    int sums[2][kRowTiles][kColumnTiles][4] = {};
    const int steps = ceil_divide(product.rows, kDepth);
    prefetch(0);
    __syncthreads();  // the table is there
    for (int step = 0; step < steps; ++step) {
        uint8_t* const levels = shared.levels[step % 2];
        store_levels(levels, codes, shared.table, product.bits == 8);
        wait_for_copies<0>();
        __syncthreads();  // limbs and levels are there; the buffers before are read
        const auto& limbs = shared.limbs[step % 2];
        if (step + 1 < steps) {
            prefetch(step + 1);
        }
#pragma unroll
        for (int slice = 0; slice < kDepth; slice += kSlice) {
            uint32_t b[kColumnTiles][2];
#pragma unroll
            for (int j = 0; j < kColumnTiles; j += 2) {
                load_right(b[j], b[j + 1], levels + (warp_column + 8 * j) * kPitch + slice, kPitch);
            }
#pragma unroll
            for (int limb = 0; limb < 2; ++limb) {
#pragma unroll
                for (int i = 0; i < kRowTiles; ++i) {
                    uint32_t a[4];
                    load_left(a, limbs[limb] + (warp_row + 16 * i) * kPitch + slice, kPitch);
#pragma unroll
                    for (int j = 0; j < kColumnTiles; ++j) {
                        mma_s8(sums[limb][i][j], a, b[j]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int row = place.first_row + warp_row + 16 * i + sum_row(k);
                const int column = place.first_column + warp_column + 8 * j + sum_column(k);
                if (row >= product.out_rows || column >= product.columns) {
                    continue;
                }
                const int64_t line = matrix * product.out_rows + row;
                float& out = product.out[line * product.columns + column];
                const float high = __fmul_rn(256.0f, __int2float_rn(sums[0][i][j][k]));
                const float low = __int2float_rn(sums[1][i][j][k]);
                const float value = __fmul_rn(product.scales[line], __fadd_rn(high, low));
                out = product.beta == 0.0f ? value : __fadd_rn(__fmul_rn(product.beta, out), value);
            }
        }
    }
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

// out <- A X + beta * out with X = levels[code] * scale, one scale a row.
extern "C" int lowbit_code_product(
    int64_t batch, int out_rows, int rows, int columns, int bits,
    const int8_t* levels,   // [256], on the host
    const uint8_t* packed,  // [batch, rows, row_bytes]
    const float* scales,    // [batch, rows]
    const float* a,         // [batch, out_rows, rows]
    int64_t a_batch_stride, int64_t a_row_stride, int64_t a_column_stride,
    int8_t* limbs,       // [batch, 2, out_rows, rows up to a multiple of 64], work space
    float* limb_scales,  // [batch, out_rows], work space
    float* out,          // [batch, out_rows, columns]
    float beta, void* stream) {
    if (batch <= 0 || out_rows <= 0 || rows <= 0 || columns <= 0) {
        return kBadArgument;
    }
    const int64_t tiles =
        static_cast<int64_t>(ceil_divide(out_rows, kTileRows)) * ceil_divide(columns, kTileColumns);
    if (batch >= (int64_t{1} << 31) / tiles || batch >= (int64_t{1} << 31) / out_rows) {
        return kBadArgument;
    }
    const Split split = {a,           a_batch_stride, a_row_stride, a_column_stride, scales, limbs,
                         limb_scales, out_rows,       rows};
    const Grid rows_grid = {dim3(static_cast<unsigned>(batch * out_rows)), threads_for_row(rows),
                            kMaxWarps * sizeof(uint32_t)};
    if (const int error = launch(split_limbs, rows_grid, stream, split)) {
        return error;
    }
    const Product product = {limbs, limb_scales, packed, out, beta, out_rows, rows, columns, bits};
    LevelTable table;
    __builtin_memcpy(&table, levels, sizeof table);
    const Grid grid = {dim3(static_cast<unsigned>(batch * tiles)), kThreads, sizeof(Shared)};
    return launch(code_product, grid, stream, product, table);
}
