// What the kernels need of the machine: instructions that C++ cannot name, shared memory, launches.
//
// The same sources are compiled by nvcc and, against the models of primitives_emulated.hpp, by a
// host compiler; this is the only file that tells them apart.
#pragma once

#if defined(__CUDACC__)

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace lowbit {

__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

// sum + x * x.
__device__ __forceinline__ double fused_square(float x, double sum) {
    return fma(static_cast<double>(x), static_cast<double>(x), sum);
}

// Byte i of the result is the one of the eight bytes `high:low` that nibble i of `selector` (its
// lower four) numbers. Bit 3 of a nibble would ask for a byte of copies of the sign.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}

// sums [16, 8] += a [16, 32] b [8, 32]^T in int8, fragments as the PTX manual lays them out.
__device__ __forceinline__ void mma_s8(int (&sums)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 rows of 16 bytes in shared memory; lane 8*i + r gives row r of matrix i. Lane
// l receives bytes 4*(l%4) ... of row l/4 of each: the fragments of mma_s8.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// Asynchronous copies of 4, 8 or 16 aligned bytes, closed in groups by each thread for itself.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    if constexpr (BYTES == 16) {  // .cg: past the L1 cache, which has no second use for it
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global),
                     "n"(BYTES)
                     : "memory");
    }
}
__device__ __forceinline__ void close_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most the last GROUPS of this thread's groups are under way.
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ uint16_t float_to_half(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
__device__ __forceinline__ uint16_t float_to_bfloat(float value) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

struct Grid {
    dim3 blocks;
    unsigned threads;     // of a block; a multiple of 32
    size_t shared_bytes;  // of a block
};

// What every block may have; more has to be asked for, kernel by kernel.
constexpr size_t kSharedBytesUnasked = 48 << 10;

// Queues the kernel; returns CUDA's error code. Neither waits nor allocates.
template <typename... Parameters>
int launch(void (*kernel)(Parameters...), const Grid& grid, void* stream,
           std::common_type_t<Parameters>... arguments) {
    if (grid.shared_bytes > kSharedBytesUnasked) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(grid.shared_bytes));
        if (error != cudaSuccess) {
            return error;
        }
    }
    void* pointers[] = {&arguments...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid.blocks, dim3(grid.threads),
                            pointers, grid.shared_bytes, static_cast<cudaStream_t>(stream));
}

// Of the current device; 1 if it cannot be asked.
inline int multiprocessors() {
    int device = 0;
    int count = 1;
    if (cudaGetDevice(&device) == cudaSuccess) {
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    }
    return count;
}

}  // namespace lowbit

#else
#include "primitives_emulated.hpp"
#endif
