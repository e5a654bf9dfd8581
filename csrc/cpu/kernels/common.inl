// What every kernel file needs: the lanes of the ISA level and the codes of a panel.
//
// No function of the C++ library may be used here: see interface.hpp.
#pragma once

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "interface.hpp"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

#include LOWBIT_LANES_FILE

constexpr size_t kLanes = 16;
constexpr size_t kChunkBytes = 64;
// Smallest normal float: a smaller scale has no finite reciprocal and is stored as zero.
constexpr float kSmallestScale = 1.17549435e-38f;

inline size_t min_size(size_t a, size_t b) {
    return a < b ? a : b;
}

inline float largest_magnitude(const float* x, size_t count) {
    I32x16 largest = zero_codes();
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        largest = max_magnitude(largest, load(x + i));
    }
    if (i < count) {
        largest = max_magnitude(largest, load_first(x + i, count - i));
    }
    uint32_t lane[kLanes];
    store_bits(lane, largest);
    uint32_t bits = 0;
    for (size_t j = 0; j < kLanes; ++j) {
        bits = lane[j] > bits ? lane[j] : bits;
    }
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    return magnitude;
}

// Interleaves the first, or the last, two elements; compilers make one shuffle of it.
template <typename Vector>
inline Vector zip_first(Vector a, Vector b) {
    return Vector{a[0], b[0], a[1], b[1]};
}
template <typename Vector>
inline Vector zip_last(Vector a, Vector b) {
    return Vector{a[2], b[2], a[3], b[3]};
}

template <typename Word>
inline void transpose_4x4(const Word* from, size_t from_stride, Word* to, size_t to_stride) {
    typedef Word Vector __attribute__((vector_size(4 * sizeof(Word))));
    Vector row[4];
    for (size_t i = 0; i < 4; ++i) {
        memcpy(&row[i], from + i * from_stride, sizeof(Vector));
    }
    const Vector even[2] = {zip_first(row[0], row[2]), zip_last(row[0], row[2])};
    const Vector odd[2] = {zip_first(row[1], row[3]), zip_last(row[1], row[3])};
    for (size_t i = 0; i < 2; ++i) {
        const Vector first = zip_first(even[i], odd[i]);
        const Vector last = zip_last(even[i], odd[i]);
        memcpy(to + 2 * i * to_stride, &first, sizeof(Vector));
        memcpy(to + (2 * i + 1) * to_stride, &last, sizeof(Vector));
    }
}

#include "packing.inl"

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
