// Codes to int8 levels, and tiles of levels in shared memory to fragments of integer products.
#pragma once

#include "rows.cuh"

namespace lowbit {

// Levels of all codes, int8; those past a codebook's end repeat its last one.
struct LevelTable {
    uint32_t words[kMaxLevels / 4];
};

// Columns that one mma_s8 takes.
constexpr int kSlice = 32;
// A row of a tile is followed by 16 unused bytes: eight rows at the same column, which an ldmatrix
// reads together, then lie in different banks.
constexpr int kRowPadding = 16;

// Levels of the codes in the nibbles of `codes`: those of the lower nibbles of its four bytes, then
// those of the upper ones. `table`: levels of BITS bits, four in each word. prmt looks up eight
// levels for the four nibbles of half a word; bit 3 of a code then chooses between two look-ups.
template <int BITS>
__device__ __forceinline__ void look_up_nibbles(uint32_t codes, const uint32_t (&table)[4],
                                                uint32_t& lower, uint32_t& upper) {
    uint32_t mixed[2];
    for (int half = 0; half < 2; ++half) {
        const uint32_t four = codes >> 16 * half;
        if constexpr (BITS == 4) {
            const uint32_t index = four & 0x7777;
            mixed[half] = permute_bytes(permute_bytes(table[0], table[1], index),
                                        permute_bytes(table[2], table[3], index),
                                        0x3210 | (four & 0x8888) >> 1);
        } else {
            mixed[half] = permute_bytes(table[0], table[1], four);
        }
    }
    lower = permute_bytes(mixed[0], mixed[1], 0x6420);
    upper = permute_bytes(mixed[0], mixed[1], 0x7531);
}

// Levels of all codes in a word of a plane (for 3 bits of both, `high` with the fields of this half
// of its chunk in its lower nibbles): levels[f] are those of field f.
template <int BITS>
__device__ __forceinline__ void look_up_word(uint32_t word, uint32_t high,
                                             const uint32_t (&table)[4], uint32_t (&levels)[4]) {
    if constexpr (BITS == 4) {
        look_up_nibbles<4>(word, table, levels[0], levels[1]);
    } else {
        // A nibble has the room of two fields of 2 bits: even ones first, then odd ones.
        for (int odd = 0; odd < 2; ++odd) {
            uint32_t codes = word >> 2 * odd & 0x33333333;
            if constexpr (BITS == 3) {
                codes |= high >> odd << 2 & 0x04040404;
                codes |= high >> (odd + 2) << 6 & 0x40404040;
            }
            look_up_nibbles<BITS>(codes, table, levels[odd], levels[odd + 2]);
        }
    }
}

// Levels of four codes, one in each byte.
__device__ __forceinline__ uint32_t look_up_bytes(uint32_t codes, const uint8_t* table) {
    uint32_t levels = 0;
    for (int i = 0; i < kQuad; ++i) {
        levels |= static_cast<uint32_t>(table[codes >> 8 * i & 0xff]) << 8 * i;
    }
    return levels;
}

// Levels at column ... column + 3 of a packed row; zero from `columns` on.
template <int BITS>
__device__ __forceinline__ uint32_t look_up_quad(const uint8_t* row, int column, int columns,
                                                 const uint8_t* table) {
    const int count = columns - column;
    if (count <= 0) {
        return 0;
    }
    const uint32_t levels = look_up_bytes(load_quad<BITS>(row, column, columns), table);
    return count >= kQuad ? levels : levels & ((1u << 8 * count) - 1);
}

// ---- Fragments ----

// 16 rows of 32 bytes from `tile` on, as the left factor of mma_s8.
__device__ __forceinline__ void load_left(uint32_t (&fragment)[4], const uint8_t* tile, int pitch) {
    const int lane = threadIdx.x % kWarpThreads;
    load_matrices(fragment, tile + (lane % 16) * pitch + lane / 16 * 16);
}

// The same as two right factors of eight columns each.
__device__ __forceinline__ void load_right(uint32_t (&first)[2], uint32_t (&second)[2],
                                           const uint8_t* tile, int pitch) {
    const int lane = threadIdx.x % kWarpThreads;
    uint32_t words[4];
    load_matrices(words, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16);
    first[0] = words[0];
    first[1] = words[1];
    second[0] = words[2];
    second[1] = words[3];
}

// Place of sums[i] of this lane in the tile of 16 x 8 of an mma_s8.
__device__ __forceinline__ int sum_row(int i) {
    return static_cast<int>(threadIdx.x) % kWarpThreads / 4 + i / 2 * 8;
}
__device__ __forceinline__ int sum_column(int i) {
    return static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
}

}  // namespace lowbit
