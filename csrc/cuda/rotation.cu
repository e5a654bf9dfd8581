// Rotation of rows by two overlapping Walsh-Hadamard transforms (`Backend.rotate`).
//
// What is meant to make it fast (no GPU was at hand: none of it has been measured):
//   - A row stays in shared memory from its one read to its one write.
//   - A thread takes sixteen values through four levels of butterflies in registers, so that 4096
//     columns cross shared memory three times instead of twelve. Sums and differences are those of
//     the textbook transform (strides 1, 2, 4, ...) in its order: the same bits as the reference.
//   - A gap after every 32 values: a thread's sixteen neighbours of the first pass would otherwise
//     lie in the same banks as every other thread's.
//   - Signs are hashed where they are needed; a table would have to be read.
#include "rows.cuh"

namespace lowbit {
namespace {

// As ROTATED_COLUMNS of lowbit_muon/backends/cuda.py.
constexpr int kMaxColumns = 24 << 10;
constexpr int kMaxRadix = 16;

__device__ __forceinline__ int padded(int column) {
    return column + column / 32;
}
constexpr size_t padded_bytes(int columns) {
    return static_cast<size_t>(columns + columns / 32) * sizeof(float);
}
static_assert(padded_bytes(kMaxColumns) <= 99 << 10, "what a block may ask for on sm_86 and sm_89");

// Signs before the first (bit 0) or second (bit 1) transform: `formats.rotation_signs`.
__device__ __forceinline__ float with_sign(float value, int column, int transform) {
    uint32_t h = static_cast<uint32_t>(column) + 1;
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    h ^= h >> 16;
    return h >> transform & 1 ? -value : value;
}

// The butterflies of strides half, 2 half, ... RADIX / 2 half on `size` values from `first` on.
template <int RADIX>
__device__ __forceinline__ void butterflies(float* row, int first, int size, int half) {
    for (int i = threadIdx.x; i < size / RADIX; i += blockDim.x) {
        const int start = first + i / half * half * RADIX + i % half;
        float v[RADIX];
#pragma unroll
        for (int k = 0; k < RADIX; ++k) {
            v[k] = row[padded(start + k * half)];
        }
#pragma unroll
        for (int stride = 1; stride < RADIX; stride *= 2) {
#pragma unroll
            for (int k = 0; k < RADIX; ++k) {
                if ((k & stride) == 0) {
                    const float a = v[k];
                    const float b = v[k + stride];
                    v[k] = __fadd_rn(a, b);
                    v[k + stride] = __fsub_rn(a, b);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < RADIX; ++k) {
            row[padded(start + k * half)] = v[k];
        }
    }
    __syncthreads();
}

// Transform of `size` (a power of two) values from `first` on, not yet divided by sqrt(size).
__device__ __forceinline__ void transform(float* row, int first, int size) {
    int half = 1;
    for (; half * kMaxRadix <= size; half *= kMaxRadix) {
        butterflies<kMaxRadix>(row, first, size, half);
    }
    switch (size / half) {
        case 8:
            return butterflies<8>(row, first, size, half);
        case 4:
            return butterflies<4>(row, first, size, half);
        case 2:
            return butterflies<2>(row, first, size, half);
        default:
            return;
    }
}

__global__ void __launch_bounds__(kMaxThreads)
    rotate(float* x /* [rows, columns] */, int64_t stride, int columns, int size, float scale,
           bool inverse) {
    float* const row = reinterpret_cast<float*>(dynamic_shared());
    x += blockIdx.x * stride;
    const int overlap_start = columns - size;
    const auto for_each_column = [&](const auto& run) {
        for (int column = threadIdx.x; column < columns; column += blockDim.x) {
            run(column, row[padded(column)]);
        }
        __syncthreads();
    };
    for_each_column([&](int column, float& value) {
        value = inverse ? x[column] : with_sign(x[column], column, 0);
    });
    if (!inverse) {
        transform(row, 0, size);
        for_each_column([&](int column, float& value) {
            value = column < size ? __fmul_rn(value, scale) : value;
            value = overlap_start > 0 ? with_sign(value, column, 1) : value;
        });
        if (overlap_start > 0) {
            transform(row, overlap_start, size);
        }
        for_each_column([&](int column, float& value) {
            const bool scales = overlap_start > 0 && column >= overlap_start;
            x[column] = scales ? __fmul_rn(value, scale) : value;
        });
    } else {
        if (overlap_start > 0) {
            transform(row, overlap_start, size);
            for_each_column([&](int column, float& value) {
                value = column >= overlap_start ? __fmul_rn(value, scale) : value;
                value = with_sign(value, column, 1);
            });
        }
        transform(row, 0, size);
        for_each_column([&](int column, float& value) {
            value = column < size ? __fmul_rn(value, scale) : value;
            x[column] = with_sign(value, column, 0);
        });
    }
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

// Rows of x, in place, by the orthogonal matrix of `Backend.rotate` or its inverse.
extern "C" int lowbit_rotate(int64_t rows, int columns,
                             float* x,  // [rows, columns]
                             int64_t x_stride, int inverse, void* stream) {
    if (rows <= 0 || rows >= int64_t{1} << 31 || columns <= 0 || columns > kMaxColumns) {
        return kBadArgument;
    }
    int size = 1;
    while (2 * size <= columns) {
        size *= 2;
    }
    const float scale = static_cast<float>(1.0 / sqrt(static_cast<double>(size)));
    const Grid grid = {dim3(static_cast<unsigned>(rows)), threads_for_row(columns),
                       padded_bytes(columns)};
    return launch(rotate, grid, stream, x, x_stride, columns, size, scale, inverse != 0);
}
