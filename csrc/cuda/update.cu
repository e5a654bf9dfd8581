// The fused update of coded rows: decode, add the gradient, take the statistic, encode. Without
// codes to decode it quantises, with given scales it only encodes.
//
// What is meant to make it fast (no GPU was at hand: none of it has been measured):
//   - One pass over device memory. A row's statistic must be known before its first code, so a row
//     is visited twice; its values wait in shared memory between, up to kKeptColumns columns, and
//     are computed again from what the caches still hold beyond.
//   - A block for each row: no sum crosses blocks, and results do not depend on the launch.
//   - Quads: a thread takes four neighbouring columns, one access for each stream. The layout puts
//     neighbours into the same field of neighbouring bytes, so one shift and mask of a word
//     unpacks four codes, and a thread that writes a word asks for whole quads.
//   - Search by halving in shared memory: as many steps as bits, without branches.
//   - Statistics in float64 as in the reference: fused multiply-adds whose products are exact.
//     Consumer GPUs have few such units, and there they may be the limit.
#include "terms.cuh"

namespace lowbit {
namespace {

// Up to here a row's values fit in the shared memory that every kernel gets unasked, beside the
// tables, on every GPU.
constexpr int kKeptColumns = 10240;

static_assert(sizeof(Shared) + kKeptColumns * sizeof(float) <= 48 << 10, "asked of no GPU");

enum Statistic : int { kGiven = 0, kAbsmax = 1, kRms = 2 };

struct Update {
    Terms terms;
    int statistic;
    float clip;
    uint8_t* packed;  // [rows, row_bytes]
    float* scales;    // [rows, blocks]; read if the statistic is given
    OutputRows out;
    float out_value_weight, out_grad_weight;
    double* squares;  // [2, rows]; null: not wanted
    bool keeps;       // a row's values stay in shared memory
};

// Four values of the row: kept, or computed once more.
template <int BITS>
__device__ __forceinline__ Quad value_quad(const Update& update, Shared& shared, int64_t row,
                                           int column, int count) {
    if (!update.keeps) {
        return sum_of_terms<BITS>(update.terms, shared.levels, row, column, count);
    }
    return load_numbers(reinterpret_cast<const uint8_t*>(shared.values() + column), kFloat32,
                        count);
}

// One of them; unlike a quad, it may start at any column.
template <int BITS>
__device__ __forceinline__ float value_at(const Update& update, Shared& shared, int64_t row,
                                          int column) {
    if (update.keeps) {
        return shared.values()[column];
    }
    const int first = column / kQuad * kQuad;
    const int count = min_int(kQuad, update.terms.columns - first);
    return sum_of_terms<BITS>(update.terms, shared.levels, row, first, count).v[column - first];
}

__device__ __forceinline__ float scale_of(const Update& update, double squares, uint32_t largest,
                                          int count) {
    const float value = update.statistic == kAbsmax
                            ? __uint_as_float(largest)
                            : __double2float_rn(__dsqrt_rn(__ddiv_rn(squares, count)));
    const float scale = __fmul_rn(value, update.clip);
    // The smallest normal float: a smaller scale has no finite reciprocal and is stored as zero.
    return scale < 1.17549435e-38f ? 0.0f : scale;
}

// The values, their squares, `out` and its squares; one scale a row follows from the same pass.
template <int BITS>
__device__ __forceinline__ void first_visit(const Update& update, Shared& shared, int64_t row) {
    const int columns = update.terms.columns;
    const bool writes = update.out.data != nullptr;
    double squares = 0.0;
    double out_squares = 0.0;
    uint32_t largest = 0;
    for (int column = kQuad * threadIdx.x; column < columns; column += kQuad * blockDim.x) {
        const int count = min_int(kQuad, columns - column);
        const Quad value = sum_of_terms<BITS>(update.terms, shared.levels, row, column, count);
        if (update.keeps) {
            store_numbers(reinterpret_cast<uint8_t*>(shared.values() + column), kFloat32, count,
                          value);
        }
        for (int i = 0; i < count; ++i) {
            squares = fused_square(value.v[i], squares);
            largest = Larger()(largest, magnitude_bits(value.v[i]));
        }
        if (writes) {
            // The gradient once more: its line is in the L1 cache.
            const InputRows& grad = update.terms.grad;
            const Quad fresh = load_numbers(grad.at(row, column), grad.type, count);
            Quad out;
            for (int i = 0; i < kQuad; ++i) {
                out.v[i] = __fadd_rn(__fmul_rn(value.v[i], update.out_value_weight),
                                     __fmul_rn(fresh.v[i], update.out_grad_weight));
            }
            store_numbers(update.out.at(row, column), update.out.type, count, out);
            for (int i = 0; i < count; ++i) {
                out_squares = fused_square(out.v[i], out_squares);
            }
        }
    }
    const bool scales_row = update.statistic != kGiven && update.terms.block >= columns;
    if (update.squares != nullptr || (scales_row && update.statistic == kRms)) {
        squares = reduce_threads(squares, shared.sums, Add());
    }
    if (scales_row && update.statistic == kAbsmax) {
        largest = reduce_threads(largest, shared.largest, Larger());
    }
    if (update.squares != nullptr) {
        out_squares = reduce_threads(out_squares, shared.sums, Add());
        if (threadIdx.x == 0) {
            update.squares[row] = squares;
            update.squares[update.terms.rows + row] = out_squares;
        }
    }
    if (scales_row && threadIdx.x == 0) {
        update.scales[row] = scale_of(update, squares, largest, columns);
    }
    __syncthreads();  // kept values and the scale are there
}

// Scales of several blocks a row: a group of lanes for each, as wide as a block is long.
template <int BITS>
__device__ __forceinline__ void take_statistics(const Update& update, Shared& shared, int64_t row) {
    const int columns = update.terms.columns;
    const int block = update.terms.block;
    const int blocks = ceil_divide(columns, block);
    int lanes = 1;
    while (lanes < kWarpThreads && lanes < block) {
        lanes *= 2;
    }
    const int groups = blockDim.x / lanes;
    const int lane = threadIdx.x % lanes;
    // All lanes of a warp take every turn, also without a block: they shuffle together.
    for (int turn = 0; turn < ceil_divide(blocks, groups); ++turn) {
        const int index = turn * groups + static_cast<int>(threadIdx.x) / lanes;
        const int64_t first = static_cast<int64_t>(index) * block;
        const int count = index < blocks ? min_int(block, columns - static_cast<int>(first)) : 0;
        double squares = 0.0;
        uint32_t largest = 0;
        for (int i = lane; i < count; i += lanes) {
            const float value = value_at<BITS>(update, shared, row, static_cast<int>(first) + i);
            squares = fused_square(value, squares);
            largest = Larger()(largest, magnitude_bits(value));
        }
        for (int other = lanes / 2; other > 0; other /= 2) {
            squares += __shfl_xor_sync(kAllLanes, squares, other);
            largest = Larger()(largest, __shfl_xor_sync(kAllLanes, largest, other));
        }
        if (lane == 0 && index < blocks) {
            update.scales[row * blocks + index] = scale_of(update, squares, largest, count);
        }
    }
    __syncthreads();  // makes the scales visible to the block
}

// The number of thresholds below z; of all of them where z is NaN, like torch.bucketize.
template <int BITS>
__device__ __forceinline__ uint32_t search(const Shared& shared, int last_code, float z) {
    int code = 0;
    for (int step = 1 << (BITS - 1); step > 0; step /= 2) {
        code += shared.thresholds[code + step - 1] >= z ? 0 : step;
    }
    return static_cast<uint32_t>(min_int(code, last_code));
}

template <int BITS>
__global__ void __launch_bounds__(kMaxThreads, 3) update_codes(Update update, Codebook book) {
    Shared& shared = shared_tables();
    load_tables<BITS>(shared, book);
    const int64_t row = blockIdx.x;
    const int columns = update.terms.columns;
    if (update.keeps || update.squares != nullptr || update.out.data != nullptr ||
        update.statistic != kGiven) {
        first_visit<BITS>(update, shared, row);
    }
    const RowScales scales = update.terms.scales_of(update.scales, row);
    if (update.statistic != kGiven && !scales.single) {
        take_statistics<BITS>(update, shared, row);
    }
    const auto inverse = [](float scale) { return scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f; };
    const float row_inverse = scales.single ? inverse(scales.scales[0]) : 0.0f;
    store_row<BITS>(
        update.packed + row * row_bytes(BITS, columns), columns, [&](int column, int count) {
            if (count == 1) {
                const float factor =
                    scales.single ? row_inverse : inverse(scales.scales[column / scales.block]);
                const float value = value_at<BITS>(update, shared, row, column);
                return search<BITS>(shared, book.last_code, __fmul_rn(value, factor));
            }
            const Quad value = value_quad<BITS>(update, shared, row, column, kQuad);
            Quad factor = {row_inverse, row_inverse, row_inverse, row_inverse};
            if (!scales.single) {
                factor = scales.quad(column, columns);
                for (int i = 0; i < kQuad; ++i) {
                    factor.v[i] = inverse(factor.v[i]);
                }
            }
            uint32_t codes = 0;
            for (int i = 0; i < kQuad; ++i) {
                const float z = __fmul_rn(value.v[i], factor.v[i]);
                codes |= search<BITS>(shared, book.last_code, z) << 8 * i;
            }
            return codes;
        });
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

// X <- code_weight * levels[code] * scale + grad_weight * grad (without codes if old_packed is
// null), its scales unless they are given, its codes; out and squares where they are not null.
extern "C" int lowbit_update_codes(int64_t rows, int columns, int bits, int block,
                                   const float* levels,      // [level_count], on the host
                                   const float* thresholds,  // [level_count - 1], on the host
                                   int level_count,
                                   const uint8_t* old_packed,  // [rows, row_bytes], or null
                                   const float* old_scales,    // [rows, blocks]
                                   float code_weight,
                                   const void* grad,  // [rows, columns]
                                   int grad_type, int64_t grad_stride, float grad_weight,
                                   int statistic,  // 0: scales are given; 1: absmax; 2: RMS
                                   float clip,
                                   uint8_t* packed,  // [rows, row_bytes]
                                   float* scales,    // [rows, blocks]
                                   void* out,        // [rows, columns], or null
                                   int out_type, int64_t out_stride, float out_value_weight,
                                   float out_grad_weight,
                                   double* squares,  // [2, rows], or null
                                   void* stream) {
    Update update = {};
    update.terms.codes = {old_packed, old_scales, code_weight};
    update.terms.grad = {static_cast<const uint8_t*>(grad), grad_type, grad_stride};
    update.terms.grad_weight = grad_weight;
    update.terms.rows = rows;
    update.terms.columns = columns;
    update.terms.block = block;
    update.statistic = statistic;
    update.clip = clip;
    update.packed = packed;
    update.scales = scales;
    update.out = {static_cast<uint8_t*>(out), out_type, out_stride};
    update.out_value_weight = out_value_weight;
    update.out_grad_weight = out_grad_weight;
    update.squares = squares;
    if (bits == 0 || !is_valid(update.terms, bits, level_count)) {
        return kBadArgument;
    }
    // Plain float rows for which nothing but codes is wanted are cheaper to read again.
    const bool reads_once = statistic == kGiven && squares == nullptr && out == nullptr;
    update.keeps = columns <= kKeptColumns && !reads_once;
    const Grid grid = {dim3(static_cast<unsigned>(rows)), threads_for_row(columns),
                       sizeof(Shared) + (update.keeps ? columns * sizeof(float) : 0)};
    const Codebook book = make_book(levels, thresholds, level_count);
    return with_bits(bits, [&](auto constant) {
        return launch(update_codes<constant.value>, grid, stream, update, book);
    });
}
