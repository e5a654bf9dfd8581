// Dense matrices, element by element: scaling of a batch, and the update of a weight.
//
// What is meant to make it fast (no GPU was at hand: none of it has been measured):
//   - Factors are read from device memory, so that the host need not wait for them.
//   - A weight and its update may lie transposed to each other. The update passes through a tile in
//     shared memory: each is read along its own contiguous side, in whole sectors. The odd pitch
//     keeps both ways through the tile free of bank conflicts.
//   - Random bits are a hash of the element's number: no state, and no memory for noise.
#include "rows.cuh"

namespace lowbit {
namespace {

// ---- scaled ----

constexpr int kQuadsPerThread = 4;
constexpr int kBlockElements = kMaxThreads * kQuadsPerThread * kQuad;

__global__ void __launch_bounds__(kMaxThreads)
    scale_matrices(const float* x /* [batch, size] */, const float* factors /* [batch] */,
                   uint8_t* out /* [batch, size] */, int out_type, int64_t size, int64_t blocks) {
    const int64_t matrix = blockIdx.x / blocks;
    const int64_t first = blockIdx.x % blocks * kBlockElements;
    const float factor = factors[matrix];
    for (int i = 0; i < kQuadsPerThread; ++i) {
        const int64_t element =
            first + (static_cast<int64_t>(i) * kMaxThreads + threadIdx.x) * kQuad;
        if (element >= size) {
            return;
        }
        const int count = size - element < kQuad ? static_cast<int>(size - element) : kQuad;
        const int64_t place = matrix * size + element;
        Quad quad = {};  // zeros where the factor is, whatever x is
        if (factor != 0.0f) {
            quad = load_numbers(reinterpret_cast<const uint8_t*>(x + place), kFloat32, count);
            for (int k = 0; k < kQuad; ++k) {
                quad.v[k] = __fmul_rn(quad.v[k], factor);
            }
        }
        store_numbers(out + place * (out_type == kFloat32 ? 4 : 2), out_type, count, quad);
    }
}

// ---- update_weight ----

constexpr int kTile = 32;
constexpr int kTilePitch = kTile + 1;
constexpr int kTileThreads = 256;

struct Strided {
    uint8_t* data;
    int type;  // NumberType
    int64_t row_stride, column_stride;

    __device__ __forceinline__ uint8_t* at(int64_t row, int64_t column) const {
        return data + (row * row_stride + column * column_stride) * (type == kFloat32 ? 4 : 2);
    }
    __device__ __forceinline__ float load(int64_t row, int64_t column) const {
        const uint8_t* const from = at(row, column);
        return type == kFloat32 ? *reinterpret_cast<const float*>(from)
                                : narrow_to_float(type, *reinterpret_cast<const uint16_t*>(from));
    }
    __device__ __forceinline__ void store(int64_t row, int64_t column, float value) const {
        uint8_t* const to = at(row, column);
        if (type == kFloat32) {
            *reinterpret_cast<float*>(to) = value;
        } else {
            *reinterpret_cast<uint16_t*>(to) = float_to_narrow(type, value);
        }
    }
    // Calls run(row, column) for a thread's share of a tile, lanes along the contiguous side.
    template <typename Run>
    __device__ __forceinline__ void for_each(const Run& run) const {
        const bool down = row_stride < column_stride;
        const int lane = threadIdx.x % kTile;
        for (int line = threadIdx.x / kTile; line < kTile; line += kTileThreads / kTile) {
            run(down ? lane : line, down ? line : lane);
        }
    }
};

struct WeightUpdate {
    Strided weight, update;  // [rows, columns]
    int64_t rows, columns;
    const float* decay;
    const float* step_size;
    const int32_t* seed;  // null: round to nearest
    bool cautious;        // decay only where weight * update >= 0
};

// The finaliser of MurmurHash3 (https://github.com/aappleby/smhasher).
__device__ __forceinline__ uint32_t mix(uint32_t h) {
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return h ^ h >> 16;
}

// Rounded up as often as the lower half of the bits is large; what is not finite stays as it is.
__device__ __forceinline__ float round_stochastically(float value, uint32_t random) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7f800000) == 0x7f800000) {
        return value;
    }
    return __uint_as_float((bits + (random & 0xffff)) & 0xffff0000);
}

__global__ void __launch_bounds__(kTileThreads) update_weight(WeightUpdate args) {
    float (*const tile)[kTilePitch] = reinterpret_cast<float (*)[kTilePitch]>(dynamic_shared());
    const int64_t across = (args.columns + kTile - 1) / kTile;
    const int64_t first_row = blockIdx.x / across * kTile;
    const int64_t first_column = blockIdx.x % across * kTile;
    const auto inside = [&](int row, int column) {
        return first_row + row < args.rows && first_column + column < args.columns;
    };
    args.update.for_each([&](int row, int column) {
        if (inside(row, column)) {
            tile[row][column] = args.update.load(first_row + row, first_column + column);
        }
    });
    __syncthreads();
    const float decay = *args.decay;
    const float step_size = *args.step_size;
    if (decay == 1.0f && step_size == 0.0f) {
        // Nothing to round either: weights hold their own type's numbers.
        return;
    }
    const uint32_t seed = args.seed == nullptr ? 0 : mix(static_cast<uint32_t>(*args.seed));
    args.weight.for_each([&](int row, int column) {
        if (!inside(row, column)) {
            return;
        }
        const int64_t r = first_row + row;
        const int64_t c = first_column + column;
        const float change = tile[row][column];
        float value = args.weight.load(r, c);
        const bool decays = !args.cautious || __fmul_rn(value, change) >= 0.0f;
        value = __fsub_rn(__fmul_rn(value, decays ? decay : 1.0f), __fmul_rn(change, step_size));
        if (args.seed != nullptr) {
            const uint32_t index = static_cast<uint32_t>(r * args.columns + c);
            value = round_stochastically(value, mix(mix(index) + seed));
        }
        args.weight.store(r, c, value);
    });
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

// out <- factor * x for each matrix, and zeros where the factor is zero.
int lowbit_scaled(int64_t batch, int64_t size,
                  const float* x,       // [batch, size]
                  const float* factor,  // [batch]
                  void* out,            // [batch, size]
                  int out_type, void* stream) {
    const int64_t blocks = size / kBlockElements + (size % kBlockElements != 0);
    if (batch <= 0 || size <= 0 || blocks >= (int64_t{1} << 31) / batch) {
        return kBadArgument;
    }
    const Grid grid = {dim3(static_cast<unsigned>(batch * blocks)), kMaxThreads, 0};
    return launch(scale_matrices, grid, stream, x, factor, static_cast<uint8_t*>(out), out_type,
                  size, blocks);
}

// weight <- decay * weight - step_size * update, one rounding at the end; if cautious, it decays
// only where weight * update >= 0.
int lowbit_update_weight(int64_t rows, int64_t columns,
                         void* weight,  // [rows, columns]
                         int weight_type, int64_t weight_row_stride, int64_t weight_column_stride,
                         const void* update,  // [rows, columns]
                         int update_type, int64_t update_row_stride, int64_t update_column_stride,
                         const float* decay,      // [1]
                         const float* step_size,  // [1]
                         const int32_t* seed,     // [1], or null
                         int cautious, void* stream) {
    const int64_t down = (rows + kTile - 1) / kTile;
    const int64_t across = (columns + kTile - 1) / kTile;
    if (rows <= 0 || columns <= 0 || down >= (int64_t{1} << 31) / across) {
        return kBadArgument;
    }
    WeightUpdate args = {};
    args.weight = {static_cast<uint8_t*>(weight), weight_type, weight_row_stride,
                   weight_column_stride};
    // Only read; a Strided of what is written shares the code.
    args.update = {const_cast<uint8_t*>(static_cast<const uint8_t*>(update)), update_type,
                   update_row_stride, update_column_stride};
    args.rows = rows;
    args.columns = columns;
    args.decay = decay;
    args.step_size = step_size;
    args.seed = seed;
    args.cautious = cautious != 0;
    const Grid grid = {dim3(static_cast<unsigned>(down * across)), kTileThreads,
                       sizeof(float) * kTile * kTilePitch};
    return launch(update_weight, grid, stream, args);
}

}  // extern "C"
