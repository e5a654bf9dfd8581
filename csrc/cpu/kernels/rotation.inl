// Rotation of rows by two overlapping Walsh-Hadamard transforms, compiled once for each ISA level
// into namespace lowbit::LOWBIT_ISA.
//
// Sums and differences are taken in the order of the textbook transform (strides 1, 2, 4, ...), so
// that every level and the reference round alike. No function of the C++ library may be used here.

#include "common.inl"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// Strides 1 to 8 within sixteen neighbours, in registers.
inline void transform_16(float* __restrict x) {
    float v[kLanes];
    memcpy(v, x, sizeof v);
#pragma GCC unroll 4
    for (size_t half = 1; half < kLanes; half *= 2) {
        float w[kLanes];
#pragma GCC unroll 16
        for (size_t i = 0; i < kLanes; ++i) {
            w[i] = i & half ? v[i ^ half] - v[i] : v[i] + v[i ^ half];
        }
        memcpy(v, w, sizeof v);
    }
    memcpy(x, v, sizeof v);
}

inline void butterflies(float* x, size_t size, size_t half) {
    for (size_t start = 0; start < size; start += 2 * half) {
        float* __restrict first = x + start;
        float* __restrict second = x + start + half;
        for (size_t i = 0; i < half; ++i) {
            const float a = first[i];
            const float b = second[i];
            first[i] = a + b;
            second[i] = a - b;
        }
    }
}

// Transform of `size` (a power of two) values divided by sqrt(size), in place.
inline void transform(float* x, size_t size, float scale) {
    size_t half = 1;
    if (size >= kLanes) {
        for (size_t start = 0; start < size; start += kLanes) {
            transform_16(x + start);
        }
        half = kLanes;
    }
    for (; half < size; half *= 2) {
        butterflies(x, size, half);
    }
    for (size_t i = 0; i < size; ++i) {
        x[i] *= scale;
    }
}

inline void multiply(float* __restrict x, const float* __restrict signs, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        x[i] *= signs[i];
    }
}

void rotate(const RotateArgs& args, size_t begin, size_t end) {
    const size_t overlap_start = args.columns - args.size;
    for (size_t row = begin; row < end; ++row) {
        float* const x = args.x + row * args.x_stride;
        if (!args.inverse) {
            multiply(x, args.first_signs, args.columns);
            transform(x, args.size, args.scale);
            if (overlap_start > 0) {
                multiply(x, args.second_signs, args.columns);
                transform(x + overlap_start, args.size, args.scale);
            }
        } else {
            if (overlap_start > 0) {
                transform(x + overlap_start, args.size, args.scale);
                multiply(x, args.second_signs, args.columns);
            }
            transform(x, args.size, args.scale);
            multiply(x, args.first_signs, args.columns);
        }
    }
}

}  // namespace

extern const RotationKernel rotation_kernel;
const RotationKernel rotation_kernel = rotate;

}  // namespace LOWBIT_ISA
}  // namespace lowbit
