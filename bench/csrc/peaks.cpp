// The most that cores multiply and add: independent chains in registers, with the instructions of
// the matrix products of one ISA level. bench/chains.py compiles it once for each level, with the
// level's flags and its LOWBIT_LANES_FILE.
//
// All factors are one, so that the sum of all lanes is the number of products: nothing was left
// out.
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "interface.hpp"

namespace lowbit {
namespace {

#include LOWBIT_LANES_FILE
#include "words.inl"

// More than latency times throughput of a fused multiply-add (4 or 5 cycles, two each cycle), and
// fewer than there are registers. Narrow levels need two or four registers for sixteen lanes.
constexpr int kChains = kRegisterRows * kRegisterStrips + (kRegisterStrips == 1 ? 1 : 0);

template <WordType TYPE>
struct Ones;
template <>
struct Ones<WordType::float32> {
    static constexpr uint32_t left = 0x3f800000, right = 0x3f800000;
};
template <>
struct Ones<WordType::int16> {
    static constexpr uint32_t left = 0x00010001, right = 0x00010001;
};
template <>
struct Ones<WordType::bfloat16> {
    static constexpr uint32_t left = 0x3f803f80, right = 0x3f803f80;
};
template <>
struct Ones<WordType::int8> {
    static constexpr uint32_t left = 0x01010101, right = 0x81818181;  // strips have 128 added
};

// The compiler knows nothing of x from here on, so that what is made of it stays in its loop.
template <typename Lanes>
inline void forget(Lanes& x) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(x.v));
#elif defined(__AVX2__)
    __asm__("" : "+x"(x.low), "+x"(x.high));
#elif defined(__x86_64__)
    __asm__("" : "+x"(x.v[0]), "+x"(x.v[1]), "+x"(x.v[2]), "+x"(x.v[3]));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x.v[0]), "+w"(x.v[1]), "+w"(x.v[2]), "+w"(x.v[3]));
#else
    __asm__("" : "+m"(x));
#endif
}

inline void store_lanes(float* to, F32x16 x) {
    store(to, x);
}
inline void store_lanes(int32_t* to, I32x16 x) {
    store_words(to, x);
}

// Not inlined, or its needs would decide what the loop before it keeps in registers.
template <typename Element>
__attribute__((noinline)) double sum_all(const Element* lanes, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; ++i) {
        sum += lanes[i];
    }
    return sum;
}

template <WordType TYPE>
double run_chains(size_t iterations) {
    using W = Words<TYPE>;
    uint32_t left = Ones<TYPE>::left;
    __asm__("" : "+r"(left));  // or products with one would be none
    uint32_t words[kStrip];
    for (uint32_t& word : words) {
        word = Ones<TYPE>::right;
    }
    typename W::Strip right = W::load_strip(words);
    typename W::Lanes sums[kChains];
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) {
        sums[c] = W::zero();
    }
    for (size_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 32
        for (int c = 0; c < kChains; ++c) {
            forget(right);  // or a product that is not fused would leave the loop
            sums[c] = W::multiply(sums[c], &left, right);
        }
    }
    typename W::Element lanes[kChains][kStrip];
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) {
        store_lanes(lanes[c], sums[c]);
    }
    return sum_all(lanes[0], kChains * kStrip);
}

#if defined(__AMX_TILE__)
// The same in tiles: four of sums, one of each factor; more than four hide no more latency.
template <WordType TYPE>
double run_tiles(size_t iterations) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
    } shapes;
    uint32_t ones[256];
    for (uint32_t& word : ones) {
        word = Ones<TYPE>::left;
    }
    _tile_loadconfig(&shapes);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, ones, 64);
    _tile_loadd(5, ones, 64);
    for (size_t i = 0; i < iterations; ++i) {
        if constexpr (TYPE == WordType::int8) {
            _tile_dpbssd(0, 4, 5);
            _tile_dpbssd(1, 4, 5);
            _tile_dpbssd(2, 4, 5);
            _tile_dpbssd(3, 4, 5);
        } else {
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 5);
            _tile_dpbf16ps(2, 4, 5);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    typename Words<TYPE>::Element sums[4][256];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    _tile_release();
    return sum_all(sums[0], 4 * 256);
}
#endif

double run_thread(WordType type, size_t iterations) {
    switch (type) {
        case WordType::float32:
            return run_chains<WordType::float32>(iterations);
        case WordType::int16:
            return run_chains<WordType::int16>(iterations);
        case WordType::int8:
#if defined(__AMX_TILE__)
            return run_tiles<WordType::int8>(iterations);
#elif defined(LOWBIT_HAS_DOT_4)
            return run_chains<WordType::int8>(iterations);
#else
            break;
#endif
        case WordType::bfloat16:
#if defined(__AMX_TILE__)
            return run_tiles<WordType::bfloat16>(iterations);
#elif defined(LOWBIT_HAS_BF16)
            return run_chains<WordType::bfloat16>(iterations);
#else
            break;
#endif
    }
    return 0;
}

}  // namespace
}  // namespace lowbit

// The number of products of `iterations` rounds on each of `threads` threads; 0 for a type that the
// level has no instruction for. type: of `WordType`, in its order.
extern "C" __attribute__((visibility("default"))) double multiply_adds(int type, size_t iterations,
                                                                       int threads) {
    double total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
    for (int thread = 0; thread < threads; ++thread) {
        total += lowbit::run_thread(static_cast<lowbit::WordType>(type), iterations);
    }
    return total;
}
