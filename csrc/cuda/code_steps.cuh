// Rows of codes, step by step, to tiles of int8 levels in shared memory: the copies of packed bytes
// and their decoding. A `Tile` (code_gram.cu) has kSize rows on each side, kThreads threads, levels
// in rows of kPitch bytes, and takes kNarrowBytes of a chunk of 2 or 3 bits at a time.
#pragma once

#include "levels.cuh"

namespace lowbit {

// How a row is cut into steps: a part of a chunk of each plane at a time while chunks are whole,
// then what is left, column by column.
struct Steps {
    int plane_bytes;  // of a step, in each plane
    int planes;
    int columns;  // of a step
    int whole;    // steps of whole chunks
    int count;    // all steps
    int64_t high_plane;

    __device__ __forceinline__ Steps(int bits, int narrow_bytes, int row_columns) {
        plane_bytes = bits < 4 ? narrow_bytes : kChunkBytes;
        planes = bits == 3 ? 2 : 1;
        columns = plane_bytes * (bits < 4 ? 4 : 8 / bits);
        // A chunk of the plane with the most codes in one.
        const int rest = row_columns % (kChunkBytes * 8 / (bits == 3 ? 1 : bits));
        whole = (row_columns - rest) / columns;
        count = whole + ceil_divide(rest, columns);
        high_plane = lowbit::plane_bytes(2, row_columns);
    }
    __device__ __forceinline__ int stage_bytes() const { return plane_bytes * planes; }
    // Place of the step's bytes in the row of the low plane, and of the high one, whose chunks hold
    // the codes of two.
    __device__ __forceinline__ int64_t low_place(int step) const {
        return static_cast<int64_t>(step) * plane_bytes;
    }
    __device__ __forceinline__ int64_t high_place(int step) const {
        const int parts = kChunkBytes / plane_bytes;
        return high_plane + static_cast<int64_t>(step / parts / 2) * kChunkBytes +
               step % parts * plane_bytes;
    }
    // First field of the high plane's chunk that belongs to the step.
    __device__ __forceinline__ int high_field(int step) const {
        return step / (kChunkBytes / plane_bytes) % 2 * 4;
    }
};

// Where a block's factors lie.
struct Factors {
    const uint8_t* packed;  // of this matrix
    int64_t row_bytes;
    int first_row, first_column;
    int rows;   // of the matrix
    int sides;  // 1: both factors are the same rows

    // Row `i` of the rows of the tile, which are followed by those of its columns. Past the end of
    // the matrix the last one stands in; what comes of it is not stored.
    template <int SIZE>
    __device__ __forceinline__ const uint8_t* row(int i) const {
        const int place = i < SIZE ? first_row + i : first_column + i - SIZE;
        return packed + min_int(place, rows - 1) * row_bytes;
    }
};

// Copies a step's packed bytes, BYTES of them at a time; 1: at once, the others in the background.
template <typename Tile, int BYTES>
__device__ __forceinline__ void fetch_pieces(uint8_t* packed, const Factors& factors,
                                             const Steps& steps, int step) {
    const int pieces = steps.stage_bytes() / BYTES;  // of a row
    for (int i = threadIdx.x; i < factors.sides * Tile::kSize * pieces; i += Tile::kThreads) {
        const int row = i / pieces;
        const int byte = i % pieces * BYTES;
        const int64_t place = byte < steps.plane_bytes
                                  ? steps.low_place(step) + byte
                                  : steps.high_place(step) + byte - steps.plane_bytes;
        const uint8_t* const from = factors.row<Tile::kSize>(row) + place;
        uint8_t* const to = packed + row * steps.stage_bytes() + byte;
        if constexpr (BYTES == 1) {
            *to = *from;
        } else {
            copy_async<BYTES>(to, from);
        }
    }
}

// Starts the copies of a step and closes their group, also where there is nothing to copy.
template <typename Tile>
__device__ __forceinline__ void fetch(uint8_t* packed, const Factors& factors, const Steps& steps,
                                      int step, int alignment) {
    if (step < steps.whole) {
        if (alignment == 16) {
            fetch_pieces<Tile, 16>(packed, factors, steps, step);
        } else if (alignment == 4) {
            fetch_pieces<Tile, 4>(packed, factors, steps, step);
        } else {
            fetch_pieces<Tile, 1>(packed, factors, steps, step);
        }
    }
    close_copies();
}

// Packed bytes, or past the whole chunks the row itself, to levels.
template <typename Tile, int BITS>
__device__ __forceinline__ void decode(uint8_t* levels, const uint8_t* packed,
                                       const LevelTable& table, const Factors& factors,
                                       const Steps& steps, int step, int columns) {
    constexpr int plane_bytes = BITS < 4 ? Tile::kNarrowBytes : kChunkBytes;
    constexpr int fields = BITS < 4 ? 4 : 8 / BITS;
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(table.words);
    const int rows = factors.sides * Tile::kSize;
    if (step >= steps.whole) {
        constexpr int quads = plane_bytes * fields / kQuad;
        for (int i = threadIdx.x; i < rows * quads; i += Tile::kThreads) {
            const int row = i / quads;
            const int column = i % quads * kQuad;
            const uint32_t found = look_up_quad<BITS>(
                factors.row<Tile::kSize>(row), step * steps.columns + column, columns, bytes);
            *reinterpret_cast<uint32_t*>(levels + row * Tile::kPitch + column) = found;
        }
        return;
    }
    constexpr int words = plane_bytes / 4;
    constexpr int stage_bytes = BITS == 3 ? 2 * plane_bytes : plane_bytes;
    const uint32_t registers[4] = {table.words[0], table.words[1], table.words[2], table.words[3]};
    for (int i = threadIdx.x; i < rows * words; i += Tile::kThreads) {
        const int row = i / words;
        const int byte = i % words * 4;
        const uint8_t* const from = packed + row * stage_bytes + byte;
        const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
        uint8_t* const to = levels + row * Tile::kPitch + byte;
        if constexpr (BITS == 8) {
            *reinterpret_cast<uint32_t*>(to) = look_up_bytes(word, bytes);
        } else {
            uint32_t high = 0;
            if constexpr (BITS == 3) {
                high = *reinterpret_cast<const uint32_t*>(from + plane_bytes) >>
                       steps.high_field(step);
            }
            uint32_t found[4];
            look_up_word<BITS>(word, high, registers, found);
#pragma unroll
            for (int field = 0; field < fields; ++field) {
                *reinterpret_cast<uint32_t*>(to + field * plane_bytes) = found[field];
            }
        }
    }
}

}  // namespace lowbit
