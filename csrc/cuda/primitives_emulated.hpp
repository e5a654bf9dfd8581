// Models of the functions of primitives.cuh: read them beside each other.
#pragma once

#include <algorithm>
#include <exception>
#include <string>

#include "emulation.hpp"

namespace lowbit {

inline unsigned char* dynamic_shared() {
    return emulation::machine.shared;
}

// `square` is exact, so that fused and separate rounding agree.
inline double fused_square(float x, double sum) {
    const double square = static_cast<double>(x) * x;
    return sum + square;
}

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = uint64_t{high} << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t nibble = selector >> 4 * i & 15;
        uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (nibble & 7)) & 0xff;
        if (nibble & 8) {
            byte = byte & 0x80 ? 0xff : 0;
        }
        result |= byte << 8 * i;
    }
    return result;
}

inline void mma_s8(int (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Fragment {
        uint32_t a[4], b[2];
    } mine;
    std::memcpy(mine.a, a, sizeof mine.a);
    std::memcpy(mine.b, b, sizeof mine.b);
    const emulation::Exchange<Fragment> warp(mine);
    const size_t group = emulation::lane() / 4;
    const size_t member = emulation::lane() % 4;
    const auto byte = [](uint32_t word, int i) {
        return static_cast<int>(static_cast<int8_t>(word >> 8 * i));
    };
    for (size_t quarter = 0; quarter < 4; ++quarter) {  // of k: lanes 4*row + quarter hold it
        Fragment columns[2];
        for (size_t c = 0; c < 2; ++c) {
            columns[c] = warp.of(4 * (2 * member + c) + quarter);
        }
        const Fragment rows = warp.of(4 * group + quarter);
        for (size_t i = 0; i < 4; ++i) {  // sums: rows group and group + 8, columns 2*member + c
            for (size_t half = 0; half < 2; ++half) {
                const uint32_t left = rows.a[i / 2 + 2 * half];
                const uint32_t right = columns[i % 2].b[half];
                for (int k = 0; k < 4; ++k) {
                    sums[i] += byte(left, k) * byte(right, k);
                }
            }
        }
    }
}

inline void load_matrices(uint32_t (&words)[4], const void* row) {
    const emulation::Exchange<const void*> warp(row);
    for (size_t i = 0; i < 4; ++i) {
        const void* const from = warp.of(8 * i + emulation::lane() / 4);
        std::memcpy(&words[i], static_cast<const char*>(from) + 4 * (emulation::lane() % 4), 4);
    }
    // A lane may overwrite its row once it goes on: not before all have read it.
    emulation::Exchange<int> read(0);
}

template <int BYTES>
inline void copy_async(void* shared, const void* global) {
    if (reinterpret_cast<uintptr_t>(shared) % BYTES ||
        reinterpret_cast<uintptr_t>(global) % BYTES) {
        emulation::fail("an asynchronous copy is not aligned");
    }
    emulation::machine.current->copies.back().push_back({shared, global, BYTES});
}
inline void close_copies() {
    emulation::machine.current->copies.emplace_back();
}
template <int GROUPS>
inline void wait_for_copies() {
    auto& groups = emulation::machine.current->copies;
    while (groups.size() > GROUPS + 1) {
        for (const emulation::Copy& copy : groups.front()) {
            std::memcpy(copy.to, copy.from, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}

// ---- 16-bit floats ----

inline float half_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t exponent = bits >> 10 & 31;
    const uint32_t fraction = bits & 0x3ff;
    if (exponent == 0) {
        const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    const uint32_t rebased = exponent == 31 ? 255 : exponent + 112;
    return __uint_as_float(sign | rebased << 23 | fraction << 13);
}

inline uint16_t float_to_half(float value) {
    const uint16_t sign = static_cast<uint16_t>(__float_as_uint(value) >> 16 & 0x8000);
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) {
        return 0x7fff;
    }
    if (magnitude >= 65520.0f) {  // halfway from the largest to 2^16, which is even
        return sign | 0x7c00;
    }
    if (magnitude == 0.0f) {
        return sign;
    }
    // Whole numbers of eleven bits (or fewer, below 2^-14) in units of the last, halves to even.
    int exponent;
    std::frexp(magnitude, &exponent);
    const int unit = std::max(exponent - 11, -24);
    const float steps = std::nearbyint(std::ldexp(magnitude, -unit));
    const int first = unit == -24 ? 0 : (unit + 24) << 10;
    return static_cast<uint16_t>(sign | (first + static_cast<int>(steps)));
}

inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (std::isnan(value)) {
        return 0x7fff;
    }
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---- Launch ----

constexpr int kEmulationFailed = 1 << 20;
inline std::string emulation_failure;

struct Grid {
    dim3 blocks;
    unsigned threads;
    size_t shared_bytes;
};

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), const Grid& grid, void*,
           std::common_type_t<Parameters>... arguments) {
    try {
        emulation::run_grid(grid.blocks, dim3(grid.threads), grid.shared_bytes,
                            [&] { kernel(arguments...); });
    } catch (const std::exception& error) {
        emulation_failure = error.what();
        return kEmulationFailed;
    }
    return 0;
}

inline int multiprocessors() {
    return 2;
}

}  // namespace lowbit
