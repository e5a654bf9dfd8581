// Gradients as contiguous rows of floats, whatever their strides and type. Included by codec.inl.

// A transposed gradient is contiguous down its columns: 32 rows use whole cache lines of it.
constexpr size_t kTileRows = 32;
// Off a power of two, so that the rows of a tile do not compete for the same set of the cache.
constexpr size_t kTileStride = kPanelColumns + kLanes;

constexpr ptrdiff_t kColumnsAhead = 32;

union GradTile {
    alignas(64) float floats[kTileRows * kTileStride];
    uint16_t words[kTileRows * kTileStride];
};

// A tile whose columns are contiguous and lie close together is read where it is: 4 to 5 times as
// fast as by `gather_tile` with 8 rows.
template <typename Word>
inline void gather_close_columns(const Word* from, size_t column_stride, size_t rows,
                                 size_t columns, Word* to) {
    const size_t whole_rows = rows / 4 * 4;
    const size_t whole_columns = columns / 4 * 4;
    for (size_t c = 0; c < whole_columns; c += 4) {
        for (size_t r = 0; r < whole_rows; r += 4) {
            transpose_4x4(from + c * column_stride + r, column_stride, to + r * kTileStride + c,
                          kTileStride);
        }
    }
    for (size_t r = 0; r < rows; ++r) {
        for (size_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
            to[r * kTileStride + c] = from[c * column_stride + r];
        }
    }
}

// Copies a strided tile to rows of `to`, and beyond them what fills the groups of sixteen columns.
// It goes through columns kept in L1, because the columns of a large gradient compete for the same
// set of the cache as well.
template <typename Word>
inline void gather_tile(const Word* from, ptrdiff_t row_stride, ptrdiff_t column_stride,
                        size_t rows, size_t columns, Word* to) {
    if (row_stride == 1 && column_stride > 0 &&
        column_stride <= static_cast<ptrdiff_t>(kTileRows)) {
        return gather_close_columns(from, static_cast<size_t>(column_stride), rows, columns, to);
    }
    Word block[kLanes][kTileRows] = {};
    for (size_t first = 0; first < columns; first += kLanes) {
        const size_t count = min_size(kLanes, columns - first);
        for (size_t c = 0; c < count; ++c) {
            const Word* const column = from + static_cast<ptrdiff_t>(first + c) * column_stride;
            // No hardware prefetcher follows columns that lie pages apart.
            const Word* const ahead = column + kColumnsAhead * column_stride;
            __builtin_prefetch(ahead);
            __builtin_prefetch(ahead + kTileRows / 2);
            if (row_stride == 1 && rows == kTileRows) {
                memcpy(block[c], column, sizeof block[c]);
            } else {
                for (size_t r = 0; r < rows; ++r) {
                    block[c][r] = column[static_cast<ptrdiff_t>(r) * row_stride];
                }
            }
        }
        for (size_t r = 0; r < rows; r += 4) {
            for (size_t c = 0; c < kLanes; c += 4) {
                transpose_4x4(&block[c][r], kTileRows, to + r * kTileStride + first + c,
                              kTileStride);
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
