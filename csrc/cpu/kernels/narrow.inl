// Products of codes with a few rows or columns, in limbs: a code is decoded where it is multiplied,
// so nothing is packed but what stays in L1. Included by product.inl.
//
// What made it fast; us for 1024x4096 codes of 4 bits and one row or column (Zen 5, AVX-512 VNNI,
// 1 core, 11 of them Python's):
//   A X  755  a panel of 512 columns packed for all rows, then multiplied as eight rows
//        155  packed for 32 rows at a time, multiplied as one row or two
//         94  bytes of four rows interleaved by unpacking, whole panels decoded in registers
//   X V 1710  decoded to floats by panels, then multiplied
//        116  levels of four rows in scratch memory, their words times words of limbs
//         75  whole panels decoded in registers
// Tried without gain: tables of sums in place of levels (T-MAC, arXiv 2407.00088); figures in
// bench/results/README.md.

#if defined(LOWBIT_HAS_DOT_4)
using Limb = int8_t;
inline I32x16 dot_words(I32x16 sum, I32x16 limbs, I32x16 levels) {
    return add_dot_4(sum, limbs, levels);
}
#else
using Limb = int16_t;
inline I32x16 dot_words(I32x16 sum, I32x16 limbs, I32x16 levels) {
    return add_dot_2(sum, limbs, levels);
}
#endif

// A row as `pack_limbs` rounds it, but with its words in a row and zeros after them.
void round_limbs(const RoundLimbsArgs& args) {
    float* const values = args.scratch;
    for (size_t k = 0; k < args.depth; ++k) {
        values[k] = args.a[static_cast<ptrdiff_t>(k) * args.k_stride];
    }
    if (args.factors != nullptr) {
        for (size_t k = 0; k < args.depth; ++k) {
            values[k] *= args.factors[k];
        }
    }
    const LimbScale scale = limb_scale(values, args.depth);
    *args.scale = scale.scale;
    memset(args.high, 0, args.words * sizeof *args.high);
    memset(args.low, 0, args.words * sizeof *args.low);
    *args.high_sum = *args.low_sum = 0;
    split_limbs(values, args.depth, scale.inverse, reinterpret_cast<Limb*>(args.high),
                reinterpret_cast<Limb*>(args.low), args.high_sum, args.low_sum);
}

// ---- Few rows times coded X: lanes are columns ----

// Words along k of a block of rows, which its columns are decoded to.
constexpr size_t kBlockSteps = 8;

// Adds `steps` words of ROWS rows from `row` on, with STRIPS strips of columns from `column` on.
template <int ROWS, int STRIPS>
inline void add_tile(const NarrowArgs& args, size_t row, size_t word, const uint32_t* strips,
                     size_t steps, size_t column) {
    using W = Words<kCodeType>;
    const uint32_t* const high = args.high + row * args.words + word;
    const uint32_t* const low = args.low + row * args.words + word;
    int32_t* const high_sums = args.high_sums + row * args.stride + column;
    int32_t* const low_sums = args.low_sums + row * args.stride + column;
    I32x16 upper[ROWS][STRIPS], lower[ROWS][STRIPS];
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int s = 0; s < STRIPS; ++s) {
            upper[r][s] = load_words(high_sums + r * args.stride + s * kStrip);
            lower[r][s] = load_words(low_sums + r * args.stride + s * kStrip);
        }
    }
    for (size_t k = 0; k < steps; ++k) {
#pragma GCC unroll 4
        for (int s = 0; s < STRIPS; ++s) {
            const auto strip = W::load_strip(strips + (s * steps + k) * kStrip);
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; ++r) {
                upper[r][s] = W::multiply(upper[r][s], high + r * args.words + k, strip);
                lower[r][s] = W::multiply(lower[r][s], low + r * args.words + k, strip);
            }
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int s = 0; s < STRIPS; ++s) {
            store_words(high_sums + r * args.stride + s * kStrip, upper[r][s]);
            store_words(low_sums + r * args.stride + s * kStrip, lower[r][s]);
        }
    }
}

template <int ROWS, int STRIPS = kRegisterStrips>
inline void add_strips(const NarrowArgs& args, size_t row, size_t word, const uint32_t* strips,
                       size_t steps, size_t column, size_t end) {
    for (; column + STRIPS * kStrip <= end; column += STRIPS * kStrip) {
        add_tile<ROWS, STRIPS>(args, row, word, strips, steps, column);
        strips += STRIPS * steps * kStrip;
    }
    if constexpr (STRIPS > 1) {
        add_strips<ROWS, STRIPS - 1>(args, row, word, strips, steps, column, end);
    }
}

void add_code_columns(const NarrowArgs& args, size_t begin, size_t end) {
    constexpr size_t block_rows = kBlockSteps * kCodesPerWord;
    alignas(64) uint32_t strips[kPanelColumns * kBlockSteps];
    PackCodesArgs pack = args.codes;
    pack.to = strips;
    for (size_t first = begin; first < end; first += block_rows) {
        pack.packed = args.codes.packed + first * pack.row_bytes;
        pack.rows = min_size(block_rows, end - first);
        const size_t steps = pack.steps = ceil_divide(pack.rows, kCodesPerWord);
        const size_t word = first / kCodesPerWord;
        for (pack.panel = 0; pack.panel < pack.columns; pack.panel += kPanelColumns) {
            pack.count = min_size(kPanelColumns, pack.columns - pack.panel);
            for (size_t step = 0; step < steps; ++step) {
                pack_code_columns(pack, step);
            }
            const size_t last = pack.panel + ceil_divide(pack.count, kStrip) * kStrip;
            size_t row = 0;
            for (; row + 2 <= args.out_rows; row += 2) {
                add_strips<2>(args, row, word, strips, steps, pack.panel, last);
            }
            if (row < args.out_rows) {
                add_strips<1>(args, row, word, strips, steps, pack.panel, last);
            }
        }
    }
}

// ---- Coded X times few columns: lanes are parts of a row's sum ----

constexpr int kDotRows = kRegisterRows / 2;  // rows of X that share a load of limbs
static_assert(kDotRows <= kNarrowScratch, "a row of scratch memory each");

inline int32_t sum_words(I32x16 sums) {
    uint32_t lane[kStrip];
    store_words(lane, sums);
    uint32_t sum = 0;
    for (size_t i = 0; i < kStrip; ++i) {
        sum += lane[i];
    }
    return static_cast<int32_t>(sum);
}

template <int ROWS>
inline void dot_rows(const NarrowArgs& args, const uint32_t* words, size_t row) {
    for (size_t c = 0; c < args.out_rows; ++c) {
        const uint32_t* const high = args.high + c * args.words;
        const uint32_t* const low = args.low + c * args.words;
        I32x16 upper[ROWS], lower[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            upper[r] = lower[r] = zero_codes();
        }
        for (size_t k = 0; k < args.words; k += kStrip) {
            const I32x16 high_words = load_words(high + k);
            const I32x16 low_words = load_words(low + k);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const auto levels = Words<kCodeType>::load_strip(words + r * args.words + k);
                upper[r] = dot_words(upper[r], high_words, levels);
                lower[r] = dot_words(lower[r], low_words, levels);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            args.high_sums[c * args.stride + row + r] = sum_words(upper[r]);
            args.low_sums[c * args.stride + row + r] = sum_words(lower[r]);
        }
    }
}

// Levels of a whole row; what follows the last one meets limbs that are zero.
inline void decode_row(PackCodesArgs args, size_t row, uint32_t* words) {
    alignas(64) int8_t levels[kPanelColumns + 64];
    for (args.panel = 0; args.panel < args.columns; args.panel += kPanelColumns) {
        args.count = min_size(kPanelColumns, args.columns - args.panel);
        uint32_t* const to = words + args.panel / kCodesPerWord;
        if constexpr (kCodeType == WordType::int8) {
            decode_levels(args, row, reinterpret_cast<int8_t*>(to));
        } else {
            decode_levels(args, row, levels);
            levels_to_words(levels, args.count, to);
        }
    }
}

void dot_code_rows(const NarrowArgs& args, size_t begin, size_t end) {
    size_t row = begin;
    for (; row + kDotRows <= end; row += kDotRows) {
        for (size_t r = 0; r < kDotRows; ++r) {
            decode_row(args.codes, row + r, args.scratch + r * args.words);
        }
        dot_rows<kDotRows>(args, args.scratch, row);
    }
    for (; row < end; ++row) {
        decode_row(args.codes, row, args.scratch);
        dot_rows<1>(args, args.scratch, row);
    }
}
