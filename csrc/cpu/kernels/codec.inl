// Quantise, encode, decode and accumulate: one source, compiled once for each ISA level into
// namespace lowbit::LOWBIT_ISA.
//
// A row is worked on in panels of 512 columns whose codes pass through one byte each in L1. All
// levels round after every product and sum (-ffp-contract=off) and keep the same sixteen lanes of
// partial sums, so their results are bit-identical.
//
// No function of the C++ library may be used here: see interface.hpp.

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

// ---- Packing: codes of a panel, one byte each, to and from the planes of a row ----

constexpr size_t ceil_divide(size_t a, size_t b) {
    return (a + b - 1) / b;
}

// Bytes of a plane of BITS bits that holds `count` codes of a row.
template <int BITS>
constexpr size_t plane_bytes(size_t count) {
    constexpr size_t chunk_codes = kChunkBytes * 8 / BITS;
    return count / chunk_codes * kChunkBytes + ceil_divide(count % chunk_codes * BITS, 8);
}
static_assert(plane_bytes<4>(128) == 64 && plane_bytes<4>(129) == 65, "4-bit plane");
static_assert(plane_bytes<2>(256) == 64 && plane_bytes<1>(kPanelColumns) == 64, "3-bit planes");

// Codes past the end of a short chunk are read as zero fields, up to 7 of them.
constexpr size_t kCodeSlack = kLanes;
struct PanelCodes {
    alignas(64) uint8_t code[kPanelColumns + kCodeSlack];
};

// Field FIELD and those above it of the byte that holds every width-th code from `codes` on, each
// cut to bits [SHIFT, SHIFT + BITS).
template <int BITS, int SHIFT, int FIELD = 0>
inline uint8_t pack_byte(const uint8_t* codes, size_t width) {
    if constexpr (FIELD == 8 / BITS) {
        return 0;
    } else {
        constexpr uint8_t mask = (1u << BITS) - 1;
        const uint8_t code = (codes[FIELD * width] >> SHIFT) & mask;
        const uint8_t above = pack_byte<BITS, SHIFT, FIELD + 1>(codes, width);
        return static_cast<uint8_t>(code << (FIELD * BITS)) | above;
    }
}

template <int BITS, int SHIFT>
inline void pack_chunk(const uint8_t* __restrict codes, size_t width, uint8_t* __restrict packed) {
    for (size_t j = 0; j < width; ++j) {
        packed[j] = pack_byte<BITS, SHIFT>(codes + j, width);
    }
}

// The reverse of pack_chunk for fields from FIELD on; with SHIFT > 0 adds to the codes.
template <int BITS, int SHIFT, int FIELD = 0>
inline void unpack_chunk(const uint8_t* __restrict packed, size_t width, uint8_t* __restrict codes) {
    if constexpr (FIELD < 8 / BITS) {
        constexpr uint8_t mask = (1u << BITS) - 1;
        uint8_t* __restrict const to = codes + FIELD * width;
        for (size_t j = 0; j < width; ++j) {
            const uint8_t bits = (packed[j] >> (FIELD * BITS)) & mask;
            const uint8_t lower = SHIFT == 0 ? 0 : to[j];
            to[j] = static_cast<uint8_t>(bits << SHIFT) | lower;
        }
        unpack_chunk<BITS, SHIFT, FIELD + 1>(packed, width, codes);
    }
}

// The plane holds `count` codes of this panel from `packed` on.
template <int BITS, int SHIFT>
inline void pack_plane(const uint8_t* codes, size_t count, uint8_t* packed) {
    constexpr size_t chunk_codes = kChunkBytes * 8 / BITS;
    size_t start = 0;
    for (; start + chunk_codes <= count; start += chunk_codes, packed += kChunkBytes) {
        pack_chunk<BITS, SHIFT>(codes + start, kChunkBytes, packed);
    }
    pack_chunk<BITS, SHIFT>(codes + start, plane_bytes<BITS>(count - start), packed);
}

template <int BITS, int SHIFT>
inline void unpack_plane(const uint8_t* packed, size_t count, uint8_t* codes) {
    constexpr size_t chunk_codes = kChunkBytes * 8 / BITS;
    size_t start = 0;
    for (; start + chunk_codes <= count; start += chunk_codes, packed += kChunkBytes) {
        unpack_chunk<BITS, SHIFT>(packed, kChunkBytes, codes + start);
    }
    unpack_chunk<BITS, SHIFT>(packed, plane_bytes<BITS>(count - start), codes + start);
}

// `row` is a packed row of `columns` codes, `panel` the first column and `count` the columns of
// the panel.
template <int BITS>
inline void pack(PanelCodes& codes, size_t panel, size_t count, size_t columns, uint8_t* row) {
    memset(codes.code + count, 0, kCodeSlack);
    if constexpr (BITS == 3) {
        uint8_t* const high = row + plane_bytes<2>(columns);
        pack_plane<2, 0>(codes.code, count, row + plane_bytes<2>(panel));
        pack_plane<1, 2>(codes.code, count, high + plane_bytes<1>(panel));
    } else {
        pack_plane<BITS, 0>(codes.code, count, row + plane_bytes<BITS>(panel));
    }
}

template <int BITS>
inline void unpack(const uint8_t* row, size_t panel, size_t count, size_t columns,
                   PanelCodes& codes) {
    if constexpr (BITS == 3) {
        const uint8_t* const high = row + plane_bytes<2>(columns);
        unpack_plane<2, 0>(row + plane_bytes<2>(panel), count, codes.code);
        unpack_plane<1, 2>(high + plane_bytes<1>(panel), count, codes.code);
    } else {
        unpack_plane<BITS, 0>(row + plane_bytes<BITS>(panel), count, codes.code);
    }
}

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

inline float block_scale(const float* x, size_t count, Statistic statistic, float clip) {
    const float value =
        statistic == Statistic::absmax
            ? largest_magnitude(x, count)
            : static_cast<float>(
                  __builtin_sqrt(sum_of_squares(x, count) / static_cast<double>(count)));
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
                encode_segment<BITS, CELLS>(x + c, x + args.x_stride + c, next - c, scales[c / args.block_size],
                                            *args.codebook, codes.code + (c - panel));
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

// ---- Gradients: rows of a panel as contiguous floats, whatever the strides and type ----

// A transposed gradient is contiguous down its columns: 32 rows use whole cache lines of it.
constexpr size_t kTileRows = 32;
// Off a power of two, so that the rows of a tile do not compete for the same set of the cache.
constexpr size_t kTileStride = kPanelColumns + kLanes;

union GradTile {
    alignas(64) float floats[kTileRows * kTileStride];
    uint16_t words[kTileRows * kTileStride];
};

// Copies a strided tile to rows of `to`. It goes through columns kept in L1, because the columns
// of a large gradient compete for the same set of the cache as well.
template <typename Word>
inline void gather_tile(const Word* from, ptrdiff_t row_stride, ptrdiff_t column_stride,
                        size_t rows, size_t columns, Word* to) {
    Word block[kLanes][kTileRows];
    for (size_t first = 0; first < columns; first += kLanes) {
        const size_t count = min_size(kLanes, columns - first);
        for (size_t c = 0; c < count; ++c) {
            const Word* const column = from + static_cast<ptrdiff_t>(first + c) * column_stride;
            if (row_stride == 1 && rows == kTileRows) {
                memcpy(block[c], column, sizeof block[c]);
            } else {
                for (size_t r = 0; r < rows; ++r) {
                    block[c][r] = column[static_cast<ptrdiff_t>(r) * row_stride];
                }
            }
        }
        for (size_t r = 0; r < rows; ++r) {
            for (size_t c = 0; c < count; ++c) {
                to[r * kTileStride + first + c] = block[c][r];
            }
        }
    }
}

inline F32x16 load_half(const uint16_t* from, GradType type) {
    return type == GradType::bfloat16 ? load_bfloat16(from) : load_float16(from);
}

inline void convert_words(const uint16_t* from, size_t count, GradType type, float* to) {
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store(to + i, load_half(from + i, type));
    }
    if (i < count) {
        uint16_t rest[kLanes] = {};
        memcpy(rest, from + i, (count - i) * sizeof(uint16_t));
        store_first(to + i, load_half(rest, type), count - i);
    }
}

// The gradient of one tile of rows and one panel of columns.
struct GradPanel {
    const AccumulateArgs& args;
    GradTile tile;
    float converted[kPanelColumns];

    explicit GradPanel(const AccumulateArgs& a) : args(a) {}

    bool is_strided() const { return args.grad != nullptr && args.grad_column_stride != 1; }

    ptrdiff_t offset(size_t row, size_t column) const {
        return static_cast<ptrdiff_t>(row) * args.grad_row_stride +
               static_cast<ptrdiff_t>(column) * args.grad_column_stride;
    }

    void gather(size_t row, size_t rows, size_t column, size_t columns) {
        const ptrdiff_t first = offset(row, column);
        if (args.grad_type == GradType::float32) {
            gather_tile(static_cast<const float*>(args.grad) + first, args.grad_row_stride,
                        args.grad_column_stride, rows, columns, tile.floats);
        } else {
            gather_tile(static_cast<const uint16_t*>(args.grad) + first, args.grad_row_stride,
                        args.grad_column_stride, rows, columns, tile.words);
        }
    }

    // Row `r` of the tile that starts at (row, column), or null without a gradient.
    const float* floats(size_t row, size_t r, size_t column, size_t columns) {
        if (args.grad == nullptr) {
            return nullptr;
        }
        const bool strided = is_strided();
        const ptrdiff_t first = offset(row + r, column);
        if (args.grad_type == GradType::float32) {
            return strided ? tile.floats + r * kTileStride
                           : static_cast<const float*>(args.grad) + first;
        }
        convert_words(strided ? tile.words + r * kTileStride
                              : static_cast<const uint16_t*>(args.grad) + first,
                      columns, args.grad_type, converted);
        return converted;
    }
};

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

// Columns that share a scale. BITS 0: without codes. `grad` may be null.
template <int BITS>
inline void accumulate_segment(float* buffer, const uint8_t* codes, const float* grad, size_t count,
                               const Terms& terms, const float* levels) {
    constexpr bool has_codes = BITS != 0;
    const F32x16 none = broadcast(0.0f);
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store(buffer + i, combine<has_codes>(
                              terms, terms.has_buffer ? load(buffer + i) : none,
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
    Terms terms = {broadcast(args.buffer_weight), broadcast(0.0f),
                   broadcast(args.code_weight),   broadcast(args.grad_weight),
                   args.buffer_weight != 0.0f,    grad != nullptr};
    if constexpr (BITS == 0) {
        accumulate_segment<BITS>(buffer, nullptr, grad, count, terms, nullptr);
    } else {
        PanelCodes codes;
        unpack<BITS>(args.packed + row * args.row_bytes, panel, count, args.columns, codes);
        const float* const scales = args.scales + row * args.blocks;
        for (size_t c = 0; c < count;) {
            const size_t next = segment_end(panel + c, panel + count, args.block_size) - panel;
            terms.scale = broadcast(scales[(panel + c) / args.block_size]);
            accumulate_segment<BITS>(buffer + c, codes.code + c, terms.has_grad ? grad + c : nullptr,
                                     next - c, terms, args.codebook->levels);
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
