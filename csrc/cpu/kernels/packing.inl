// Codes of a panel, one byte each, to and from the packed planes of a row (layout:
// lowbit_muon/formats.py, CodeLayout). Included by common.inl.

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

// The reverse of pack_chunk for fields from FIELD on; with SHIFT > 0 adds to the codes. (Always
// inline, since a caller with a constant count keeps the codes in registers.)
template <int BITS, int SHIFT, int FIELD = 0>
[[gnu::always_inline]] inline void unpack_chunk(const uint8_t* __restrict packed, size_t width,
                                                uint8_t* __restrict codes) {
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
[[gnu::always_inline]] inline void unpack_plane(const uint8_t* packed, size_t count,
                                                uint8_t* codes) {
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
[[gnu::always_inline]] inline void unpack(const uint8_t* row, size_t panel, size_t count,
                                          size_t columns, PanelCodes& codes) {
    if constexpr (BITS == 3) {
        const uint8_t* const high = row + plane_bytes<2>(columns);
        unpack_plane<2, 0>(row + plane_bytes<2>(panel), count, codes.code);
        unpack_plane<1, 2>(high + plane_bytes<1>(panel), count, codes.code);
    } else {
        unpack_plane<BITS, 0>(row + plane_bytes<BITS>(panel), count, codes.code);
    }
}
