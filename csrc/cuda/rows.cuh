// Rows of numbers as the element-wise kernels read and write them: quads of float32 whatever the
// type in memory, scales of blocks, sums over a block of threads.
#pragma once

#include "codes.cuh"

namespace lowbit {

// Error codes beside CUDA's, which are positive.
constexpr int kBadArgument = -1;

constexpr int kWarpThreads = 32;
constexpr int kMaxThreads = 256;
constexpr int kMaxWarps = kMaxThreads / kWarpThreads;
constexpr unsigned kAllLanes = ~0u;

// As lowbit_muon/backends/cuda_library.py numbers them.
enum NumberType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct Quad {
    float v[kQuad];
};

// A matrix of numbers of one of three types with contiguous rows.
template <typename Pointer>
struct Rows {
    Pointer data;    // null: absent
    int type;        // NumberType
    int64_t stride;  // elements from one row to the next

    __device__ __forceinline__ bool is_wide() const { return type == kFloat32; }
    __device__ __forceinline__ Pointer at(int64_t row, int column) const {
        return data + (row * stride + column) * (is_wide() ? 4 : 2);
    }
};
using InputRows = Rows<const uint8_t*>;
using OutputRows = Rows<uint8_t*>;

__device__ __forceinline__ float narrow_to_float(int type, uint16_t bits) {
    return type == kFloat16 ? half_to_float(bits)
                            : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
__device__ __forceinline__ uint16_t float_to_narrow(int type, float value) {
    return type == kFloat16 ? float_to_half(value) : float_to_bfloat(value);
}

// The first `count` of four neighbours; one access where they are aligned.
__device__ __forceinline__ Quad load_numbers(const uint8_t* from, int type, int count) {
    Quad quad = {};
    const uintptr_t address = reinterpret_cast<uintptr_t>(from);
    if (type == kFloat32) {
        const float* const floats = reinterpret_cast<const float*>(from);
        if (count == kQuad && address % 16 == 0) {
            const uint4 words = *reinterpret_cast<const uint4*>(from);
            return {__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z),
                    __uint_as_float(words.w)};
        }
        for (int i = 0; i < kQuad; ++i) {
            if (i < count) {
                quad.v[i] = floats[i];
            }
        }
        return quad;
    }
    uint16_t bits[kQuad] = {};
    if (count == kQuad && address % 8 == 0) {
        const uint2 words = *reinterpret_cast<const uint2*>(from);
        bits[0] = static_cast<uint16_t>(words.x);
        bits[1] = static_cast<uint16_t>(words.x >> 16);
        bits[2] = static_cast<uint16_t>(words.y);
        bits[3] = static_cast<uint16_t>(words.y >> 16);
    } else {
        for (int i = 0; i < kQuad; ++i) {
            if (i < count) {
                bits[i] = reinterpret_cast<const uint16_t*>(from)[i];
            }
        }
    }
    for (int i = 0; i < kQuad; ++i) {
        quad.v[i] = narrow_to_float(type, bits[i]);
    }
    return quad;
}

__device__ __forceinline__ void store_numbers(uint8_t* to, int type, int count, const Quad& quad) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(to);
    if (type == kFloat32) {
        if (count == kQuad && address % 16 == 0) {
            *reinterpret_cast<uint4*>(to) = {__float_as_uint(quad.v[0]), __float_as_uint(quad.v[1]),
                                             __float_as_uint(quad.v[2]),
                                             __float_as_uint(quad.v[3])};
            return;
        }
        for (int i = 0; i < kQuad; ++i) {
            if (i < count) {
                reinterpret_cast<float*>(to)[i] = quad.v[i];
            }
        }
        return;
    }
    uint32_t bits[kQuad];
    for (int i = 0; i < kQuad; ++i) {
        bits[i] = float_to_narrow(type, quad.v[i]);
    }
    if (count == kQuad && address % 8 == 0) {
        *reinterpret_cast<uint2*>(to) = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
        return;
    }
    for (int i = 0; i < kQuad; ++i) {
        if (i < count) {
            reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(bits[i]);
        }
    }
}

// Scales of one row.
struct RowScales {
    const float* scales;  // [blocks]
    int block;            // columns that share one
    bool single;          // one for the row

    // Of four neighbours from `column` on; those past the row's end repeat its last.
    __device__ __forceinline__ Quad quad(int column, int columns) const {
        if (single || block % kQuad == 0) {
            const float scale = scales[single ? 0 : column / block];
            return {scale, scale, scale, scale};
        }
        Quad quad;
        for (int i = 0; i < kQuad; ++i) {
            quad.v[i] = scales[min_int(column + i, columns - 1) / block];
        }
        return quad;
    }
};

// ---- Over the threads of a block, of whole warps ----

// The sum of `value` over all threads, in all of them, in an order that is always the same.
// `partial`: shared memory for kMaxWarps numbers.
template <typename T, typename Combine>
__device__ __forceinline__ T reduce_threads(T value, T* partial, const Combine& combine) {
    for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2) {
        value = combine(value, __shfl_xor_sync(kAllLanes, value, lanes));
    }
    __syncthreads();  // `partial` may still be read for the result before
    if (threadIdx.x % kWarpThreads == 0) {
        partial[threadIdx.x / kWarpThreads] = value;
    }
    __syncthreads();
    T total = partial[0];
    for (unsigned warp = 1; warp < blockDim.x / kWarpThreads; ++warp) {
        total = combine(total, partial[warp]);
    }
    return total;
}

struct Add {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a + b;
    }
};
struct Larger {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a > b ? a : b;
    }
};

// A float without its sign, as a number that is ordered alike and in which NaN is the largest.
__device__ __forceinline__ uint32_t magnitude_bits(float value) {
    return __float_as_uint(value) & 0x7fffffff;
}

// Threads for a row: enough for eight columns each, in whole warps. Short rows take small blocks,
// of which more fit a multiprocessor.
inline unsigned threads_for_row(int columns) {
    const int wanted = ceil_divide(columns, 8 * kWarpThreads) * kWarpThreads;
    return static_cast<unsigned>(wanted < kWarpThreads  ? kWarpThreads
                                 : wanted > kMaxThreads ? kMaxThreads
                                                        : wanted);
}

}  // namespace lowbit
