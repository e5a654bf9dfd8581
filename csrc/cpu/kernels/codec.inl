// Quantise, encode, decode and accumulate: one source, compiled once for each ISA level into
// namespace lowbit::LOWBIT_ISA.
//
// A row is worked on in panels of 512 columns whose codes pass through one byte each in L1. All
// levels round after every product and sum (-ffp-contract=off) and keep the same 32 lanes of
// partial sums, so their results are bit-identical.
//
// What made it fast; ns for 16 elements, 4 bits, AVX-512 (Zen 5, 1 core), matrix in L2 unless said:
//   quantize     3.4  search of a tree of thresholds, four lookups and compares
//                2.7  sums of squares in 32 lanes, read from memory as halves
//                2.0  search by cells: one lookup for the code, one for the threshold to compare
//                     (8 bits, linear: 10.9 -> 4.6)
//     from DRAM  7.5 -> 2.4  encoding a row prefetches the next one for its statistic
//   dequantize   1.8  lookup, sum of squares in the same loop
//                1.4  sum of squares in a pass of its own, unpacking in arithmetic of bytes
//     from DRAM  3.4 -> 2.9  prefetching the next row for writing
// Tried without gain: the same with a buffer or gradient to read (slower with three streams),
// gathers instead of register lookups (6 ns for 16 lanes).
//
// No function of the C++ library may be used here: see interface.hpp.

#include "common.inl"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

#include "gradient.inl"

// ---- Statistics ----

inline double sum_lanes(F64x16 sums) {
    double s[kLanes];
    store_sums(s, sums);
    return (((s[0] + s[8]) + (s[4] + s[12])) + ((s[2] + s[10]) + (s[6] + s[14]))) +
           (((s[1] + s[9]) + (s[5] + s[13])) + ((s[3] + s[11]) + (s[7] + s[15])));
}

// Sum of squares in 32 lanes; the lane of an element is its index mod 32.
inline double sum_of_squares(const float* x, size_t count) {
    constexpr size_t group = 2 * kLanes;
    F64x16 even = zero_sums();
    F64x16 odd = zero_sums();
    size_t i = 0;
    for (; i + group <= count; i += group) {
        even = add_squares(even, x + i);
        odd = add_squares(odd, x + i + kLanes);
    }
    if (i < count) {
        float rest[group] = {};
        memcpy(rest, x + i, (count - i) * sizeof *rest);
        even = add_squares(even, rest);
        odd = add_squares(odd, rest + kLanes);
    }
    return sum_lanes(even + odd);
}

inline float block_scale(const float* x, size_t count, Statistic statistic, float clip) {
    const float value = statistic == Statistic::absmax
                            ? largest_magnitude(x, count)
                            : static_cast<float>(__builtin_sqrt(sum_of_squares(x, count) /
                                                                static_cast<double>(count)));
    const float scale = value * clip;
    return scale < kSmallestScale ? 0.0f : scale;
}

// ---- Encoding ----

template <int BITS, int STEP = 0>
inline I32x16 search_tree(const CodebookTables& codebook, F32x16 z, I32x16 node) {
    if constexpr (STEP == BITS) {
        return node;
    } else {
        const F32x16 threshold = lookup<STEP>(codebook.steps[STEP], node);
        const I32x16 child = add_greater(twice(node), z, threshold);
        return search_tree<BITS, STEP + 1>(codebook, z, child);
    }
}

// Number of thresholds below z.
template <int BITS, bool CELLS>
inline I32x16 search(const CodebookTables& codebook, F32x16 z) {
    if constexpr (CELLS) {
        return search_cells<BITS>(codebook, z);
    } else if constexpr (BITS <= kCountedBits) {
        I32x16 count = zero_codes();
        for (int i = 0; i < (1 << BITS) - 1; ++i) {
            count = add_greater(count, z, broadcast(codebook.thresholds[i]));
        }
        return count;
    } else {
        return search_tree<BITS>(codebook, z, zero_codes());
    }
}

// Codes of `count` values that share a scale. Writes whole groups of sixteen codes. `next_row` is
// what the thread reads next: the statistic of a row is bound by memory and its codes by
// arithmetic, so the one fetches for the other.
template <int BITS, bool CELLS>
inline void encode_segment(const float* x, const float* next_row, size_t count, float scale,
                           const CodebookTables& codebook, uint8_t* __restrict codes) {
    const F32x16 inverse = broadcast(scale > 0.0f ? 1.0f / scale : 0.0f);
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        __builtin_prefetch(next_row + i);
        store_codes(codes + i, search<BITS, CELLS>(codebook, load(x + i) * inverse));
    }
    if (i < count) {
        const F32x16 z = load_first(x + i, count - i) * inverse;
        store_codes(codes + i, search<BITS, CELLS>(codebook, z));
    }
}

// End of the part of [column, end) that shares a scale with `column`.
inline size_t segment_end(size_t column, size_t end, size_t block_size) {
    return min_size(end, (column / block_size + 1) * block_size);
}

template <int BITS, bool CELLS>
void quantize_rows(const QuantizeArgs& args, size_t begin, size_t end) {
    PanelCodes codes;
    for (size_t r = begin; r < end; ++r) {
        const float* const x = args.x + r * args.x_stride;
        float* const scales = args.scales + r * args.blocks;
        if (args.statistic != Statistic::given) {
            for (size_t block = 0; block < args.blocks; ++block) {
                const size_t first = block * args.block_size;
                const size_t count = min_size(args.block_size, args.columns - first);
                scales[block] = block_scale(x + first, count, args.statistic, args.clip);
            }
        }
        for (size_t panel = 0; panel < args.columns; panel += kPanelColumns) {
            const size_t panel_end = min_size(panel + kPanelColumns, args.columns);
            for (size_t c = panel; c < panel_end;) {
                const size_t next = segment_end(c, panel_end, args.block_size);
                encode_segment<BITS, CELLS>(x + c, x + args.x_stride + c, next - c,
                                            scales[c / args.block_size], *args.codebook,
                                            codes.code + (c - panel));
                c = next;
            }
            pack<BITS>(codes, panel, panel_end - panel, args.columns,
                       args.packed + r * args.row_bytes);
        }
    }
}

template <int BITS>
void quantize_bits(const QuantizeArgs& args, size_t begin, size_t end) {
    if constexpr (kHasCells<BITS>) {
        if (args.codebook->has_cells) {
            return quantize_rows<BITS, true>(args, begin, end);
        }
    }
    quantize_rows<BITS, false>(args, begin, end);
}

void quantize(const QuantizeArgs& args, size_t begin, size_t end) {
    switch (args.bits) {
        case 2:
            return quantize_bits<2>(args, begin, end);
        case 3:
            return quantize_bits<3>(args, begin, end);
        case 4:
            return quantize_bits<4>(args, begin, end);
        default:
            return quantize_bits<8>(args, begin, end);
    }
}

// ---- Decoding and accumulation ----

struct Terms {
    F32x16 buffer_weight, scale, code_weight, grad_weight;
    bool has_buffer, has_grad;
};

// Sum of the terms that are present; 0 if none is.
template <bool HAS_CODES>
inline F32x16 combine(const Terms& terms, F32x16 buffer, F32x16 level, F32x16 grad) {
    F32x16 sum = terms.has_buffer ? terms.buffer_weight * buffer : broadcast(0.0f);
    if constexpr (HAS_CODES) {
        const F32x16 value = terms.code_weight * (level * terms.scale);
        sum = terms.has_buffer ? sum + value : value;
    }
    if (terms.has_grad) {
        const F32x16 value = terms.grad_weight * grad;
        sum = HAS_CODES || terms.has_buffer ? sum + value : value;
    }
    return sum;
}

// Columns that share a scale. BITS 0: without codes. `grad` may be null. `next_row` is where the
// thread writes next: fetching it helps if nothing else is read but codes.
template <int BITS>
inline void accumulate_segment(float* buffer, const float* next_row, const uint8_t* codes,
                               const float* grad, size_t count, const Terms& terms,
                               const float* levels) {
    constexpr bool has_codes = BITS != 0;
    const bool only_writes = !terms.has_buffer && !terms.has_grad;
    const F32x16 none = broadcast(0.0f);
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        if (only_writes) {
            __builtin_prefetch(next_row + i, 1);
        }
        store(buffer + i,
              combine<has_codes>(terms, terms.has_buffer ? load(buffer + i) : none,
                                 has_codes ? lookup<BITS>(levels, load_codes(codes + i)) : none,
                                 terms.has_grad ? load(grad + i) : none));
    }
    if (i < count) {
        const size_t rest = count - i;
        const F32x16 sum =
            combine<has_codes>(terms, terms.has_buffer ? load_first(buffer + i, rest) : none,
                               has_codes ? lookup<BITS>(levels, load_codes(codes + i)) : none,
                               terms.has_grad ? load_first(grad + i, rest) : none);
        store_first(buffer + i, sum, rest);
    }
}

// `grad` may be null. Returns the sum of squares of the result.
template <int BITS>
inline double accumulate_panel(const AccumulateArgs& args, size_t row, size_t panel, size_t count,
                               const float* grad) {
    float* const buffer = args.buffer + row * args.buffer_stride + panel;
    const float* const next_row = buffer + args.buffer_stride;
    Terms terms = {broadcast(args.buffer_weight), broadcast(0.0f),
                   broadcast(args.code_weight),   broadcast(args.grad_weight),
                   args.buffer_weight != 0.0f,    grad != nullptr};
    if constexpr (BITS == 0) {
        accumulate_segment<BITS>(buffer, next_row, nullptr, grad, count, terms, nullptr);
    } else {
        PanelCodes codes;
        unpack<BITS>(args.packed + row * args.row_bytes, panel, count, args.columns, codes);
        const float* const scales = args.scales + row * args.blocks;
        for (size_t c = 0; c < count;) {
            const size_t next = segment_end(panel + c, panel + count, args.block_size) - panel;
            terms.scale = broadcast(scales[(panel + c) / args.block_size]);
            accumulate_segment<BITS>(buffer + c, next_row + c, codes.code + c,
                                     terms.has_grad ? grad + c : nullptr, next - c, terms,
                                     args.codebook->levels);
            c = next;
        }
    }
    // A pass of its own over the panel in L1: faster than squares in the loop above, whose lanes
    // would depend on the blocks.
    return sum_of_squares(buffer, count);
}

template <int BITS>
void accumulate_rows(const AccumulateArgs& args, size_t begin, size_t end) {
    GradPanel grad(args);
    const size_t tile_rows = grad.is_strided() ? kTileRows : 1;
    for (size_t row = begin; row < end; row += tile_rows) {
        const size_t rows = min_size(tile_rows, end - row);
        for (size_t r = 0; r < rows; ++r) {
            args.row_sums[row + r] = 0.0;
        }
        for (size_t panel = 0; panel < args.columns; panel += kPanelColumns) {
            const size_t count = min_size(kPanelColumns, args.columns - panel);
            if (grad.is_strided()) {
                grad.gather(row, rows, panel, count);
            }
            for (size_t r = 0; r < rows; ++r) {
                const float* const floats = grad.floats(row, r, panel, count);
                args.row_sums[row + r] +=
                    accumulate_panel<BITS>(args, row + r, panel, count, floats);
            }
        }
    }
}

void accumulate(const AccumulateArgs& args, size_t begin, size_t end) {
    if (args.packed == nullptr) {
        return accumulate_rows<0>(args, begin, end);
    }
    switch (args.bits) {
        case 2:
            return accumulate_rows<2>(args, begin, end);
        case 3:
            return accumulate_rows<3>(args, begin, end);
        case 4:
            return accumulate_rows<4>(args, begin, end);
        default:
            return accumulate_rows<8>(args, begin, end);
    }
}

}  // namespace

extern const CodecKernels codec_kernels;
const CodecKernels codec_kernels = {quantize, accumulate};

}  // namespace LOWBIT_ISA
}  // namespace lowbit
