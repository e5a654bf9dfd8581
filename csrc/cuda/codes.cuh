// How codes lie in memory (lowbit_muon/formats.py, `CodeLayout`), and how four of them are read.
#pragma once

#include "primitives.cuh"

namespace lowbit {

constexpr int kChunkBytes = 64;
constexpr int kMaxLevels = 256;
// Four neighbouring columns, a word of 8-bit codes: what a thread works on at a time.
constexpr int kQuad = 4;

// Codes in a whole chunk of a plane of BITS bits.
template <int BITS>
constexpr int kChunkCodes = kChunkBytes * 8 / BITS;

// A byte of each of which the lower BITS bits are set.
template <int BITS>
constexpr uint32_t kFieldMask = 0x01010101u * ((1u << BITS) - 1);

// Plain constexpr functions are for both sides (nvcc --expt-relaxed-constexpr).
constexpr int min_int(int a, int b) {
    return a < b ? a : b;
}
constexpr int ceil_divide(int a, int b) {
    return a / b + (a % b != 0);
}

// Bytes of a plane's row.
constexpr int64_t plane_bytes(int bits, int columns) {
    const int chunk = kChunkBytes * 8 / bits;
    return static_cast<int64_t>(columns / chunk) * kChunkBytes + (columns % chunk * bits + 7) / 8;
}
constexpr int64_t row_bytes(int bits, int columns) {
    return bits == 3 ? plane_bytes(2, columns) + plane_bytes(1, columns)
                     : plane_bytes(bits, columns);
}

// A word from bytes that need not be aligned; rows of codes start at any byte.
__device__ __forceinline__ uint32_t load_word(const uint8_t* bytes) {
    if (reinterpret_cast<uintptr_t>(bytes) % 4 == 0) {
        return *reinterpret_cast<const uint32_t*>(bytes);
    }
    return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<uint32_t>(bytes[3]) << 24;
}

__device__ __forceinline__ void store_word(uint8_t* bytes, uint32_t word) {
    if (reinterpret_cast<uintptr_t>(bytes) % 4 == 0) {
        *reinterpret_cast<uint32_t*>(bytes) = word;
        return;
    }
    for (int i = 0; i < 4; ++i) {
        bytes[i] = static_cast<uint8_t>(word >> 8 * i);
    }
}

// The fields of BITS bits of the codes at column ... column + 3 (a multiple of four), one in each
// byte; zero from `columns` on.
template <int BITS>
__device__ __forceinline__ uint32_t load_plane_quad(const uint8_t* plane, int column, int columns) {
    constexpr int codes = kChunkCodes<BITS>;
    const int chunk = column / codes;
    const int place = column % codes;
    plane += static_cast<int64_t>(chunk) * kChunkBytes;
    if (columns - chunk * codes >= codes) {  // a whole chunk: four neighbours share a field
        const uint32_t word = load_word(plane + place % kChunkBytes);
        return word >> place / kChunkBytes * BITS & kFieldMask<BITS>;
    }
    const int rest = columns - chunk * codes;
    const int width = ceil_divide(rest * BITS, 8);
    uint32_t quad = 0;
    for (int i = 0; i < min_int(kQuad, rest - place); ++i) {
        const int field = (place + i) / width;
        const uint32_t byte = plane[place + i - field * width];
        quad |= (byte >> field * BITS & ((1u << BITS) - 1)) << 8 * i;
    }
    return quad;
}

// Codes at column ... column + 3 of a packed row, one in each byte; zero from `columns` on.
template <int BITS>
__device__ __forceinline__ uint32_t load_quad(const uint8_t* row, int column, int columns) {
    if constexpr (BITS == 3) {
        const uint8_t* const high = row + plane_bytes(2, columns);
        return load_plane_quad<2>(row, column, columns) | load_plane_quad<1>(high, column, columns)
                                                              << 2;
    } else {
        return load_plane_quad<BITS>(row, column, columns);
    }
}

// The codes of `quad` from column `first` (where a chunk begins) on, packed into a plane's row:
// fields of BITS bits from bit SHIFT of a code on. A thread owns whole bytes (four where a chunk is
// whole) and asks for every code that lies in them. quad(column, count): `count` codes, one a byte.
template <int BITS, int SHIFT, typename Quad>
__device__ __forceinline__ void store_plane(uint8_t* plane, int first, int columns,
                                            const Quad& quad) {
    constexpr int codes = kChunkCodes<BITS>;
    constexpr int fields = 8 / BITS;
    plane += static_cast<int64_t>(first / codes) * kChunkBytes;
    const int whole = (columns - first) / codes * codes;
    const int words = whole / (kQuad * fields);
    for (int i = threadIdx.x; i < words; i += blockDim.x) {
        const int chunk = i / (kChunkBytes / 4);
        const int byte = i % (kChunkBytes / 4) * 4;
        uint32_t word = 0;
        for (int field = 0; field < fields; ++field) {
            const uint32_t found = quad(first + chunk * codes + field * kChunkBytes + byte, kQuad);
            word |= (found >> SHIFT & kFieldMask<BITS>) << field * BITS;
        }
        store_word(plane + static_cast<int64_t>(i) * 4, word);
    }
    const int rest = columns - first - whole;
    const int width = ceil_divide(rest * BITS, 8);
    plane += static_cast<int64_t>(words) * 4;
    for (int byte = threadIdx.x; byte < width; byte += blockDim.x) {
        uint32_t packed = 0;
        for (int field = 0; field < fields; ++field) {
            const int place = field * width + byte;
            if (place < rest) {
                const uint32_t found = quad(first + whole + place, 1);
                packed |= (found >> SHIFT & ((1u << BITS) - 1)) << field * BITS;
            }
        }
        plane[byte] = static_cast<uint8_t>(packed);
    }
}

// All codes of a row.
template <int BITS, typename Quad>
__device__ __forceinline__ void store_row(uint8_t* row, int columns, const Quad& quad) {
    if constexpr (BITS == 3) {
        // Chunks that are whole in both planes: each code is asked for once.
        constexpr int codes = kChunkCodes<1>;
        uint8_t* const high_plane = row + plane_bytes(2, columns);
        const int whole = columns / codes * codes;
        for (int i = threadIdx.x; i < whole / (8 * kQuad); i += blockDim.x) {
            const int chunk = i / (kChunkBytes / 4);
            const int byte = i % (kChunkBytes / 4) * 4;
            uint32_t high = 0;
            for (int half = 0; half < 2; ++half) {
                uint32_t low = 0;
                for (int field = 0; field < 4; ++field) {
                    const int part = 4 * half + field;
                    const uint32_t found = quad(chunk * codes + part * kChunkBytes + byte, kQuad);
                    low |= (found & kFieldMask<2>) << 2 * field;
                    high |= (found >> 2 & kFieldMask<1>) << part;
                }
                store_word(row + (static_cast<int64_t>(chunk) * 2 + half) * kChunkBytes + byte,
                           low);
            }
            store_word(high_plane + static_cast<int64_t>(chunk) * kChunkBytes + byte, high);
        }
        store_plane<2, 0>(row, whole, columns, quad);
        store_plane<1, 2>(high_plane, whole, columns, quad);
    } else {
        store_plane<BITS, 0>(row, 0, columns, quad);
    }
}

}  // namespace lowbit
