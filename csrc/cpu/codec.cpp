#include "codec.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "arguments.hpp"
#include "isa.hpp"

namespace lowbit {

namespace {

// Below this many elements a thread costs more than it saves (its wake-up is about 5 us).
constexpr size_t kElementsPerThread = 16384;

void check_codes(int bits, size_t block_size, size_t columns) {
    expect_bits(bits);
    expect(block_size >= 1 && block_size <= columns, "block_size: expected 1..", columns, ", got ",
           block_size);
}

void check_count(const char* name, size_t count, size_t least, size_t most) {
    expect(count >= least && count <= most, name, ": expected ", least, "..", most, ", got ",
           count);
}

void set_levels(CodebookTables& tables, const float* levels, size_t count) {
    for (size_t i = 0; i < kMaxLevels; ++i) {
        tables.levels[i] = levels[std::min(i, count - 1)];
    }
}

void set_thresholds(CodebookTables& tables, int bits, const float* thresholds, size_t count) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    std::copy_n(thresholds, count, tables.thresholds);
    std::fill(tables.thresholds + count, tables.thresholds + kMaxLevels, infinity);
    for (int step = 0; step < bits; ++step) {
        const size_t span = size_t{1} << (bits - step);  // codes below one node
        for (size_t node = 0; node < size_t{1} << step; ++node) {
            tables.steps[step][node] = tables.thresholds[node * span + span / 2 - 1];
        }
    }
}

// Cells of `scale` to the unit that begin at the first threshold; true if they serve for `bits`.
bool try_cells(CodebookTables& tables, int bits, size_t count, float scale) {
    tables.cell_scale = scale;
    tables.cell_offset = count == 0 ? 0.0f : -tables.thresholds[0] * scale;
    tables.cell_last = bits == 8 ? static_cast<float>(count) : kCells - 1;
    if (!std::isfinite(tables.cell_offset)) {
        return false;
    }
    std::fill_n(tables.cell_bases, kCells, 0);
    int previous = -1;
    for (size_t i = 0; i < count; ++i) {
        const float place = std::fma(tables.thresholds[i], scale, tables.cell_offset);
        const int cell =
            static_cast<int>(std::nearbyint(std::min(std::max(place, 0.0f), tables.cell_last)));
        if (cell == previous || (bits == 8 && cell != static_cast<int>(i))) {
            return false;
        }
        for (int above = cell + 1; above < kCells; ++above) {
            ++tables.cell_bases[above];
        }
        previous = cell;
    }
    return true;
}

void set_cells(CodebookTables& tables, int bits, size_t count) {
    const float width = count < 2 ? 1.0f : tables.thresholds[count - 1] - tables.thresholds[0];
    const int fewest = std::max(static_cast<int>(count) - 1, 1);
    const int most = bits == 8 ? fewest : kCells - 1;
    tables.has_cells = false;
    for (int cells = most; cells >= fewest && !tables.has_cells; --cells) {
        tables.has_cells = try_cells(tables, bits, count, static_cast<float>(cells) / width);
    }
}

Statistic parse_statistic(const std::string& name) {
    if (name == "given") {
        return Statistic::given;
    }
    if (name == "absmax") {
        return Statistic::absmax;
    }
    expect(name == "rms", "statistic: expected given, absmax or rms, got ", name);
    return Statistic::rms;
}

GradType parse_grad_type(const std::string& name) {
    if (name == "float32") {
        return GradType::float32;
    }
    if (name == "bfloat16") {
        return GradType::bfloat16;
    }
    expect(name == "float16", "grad_type: expected float32, bfloat16 or float16, got ", name);
    return GradType::float16;
}

// kernel(begin, end) on equal parts of the rows.
template <typename Kernel>
void run_rows(const Kernel& kernel, size_t rows, size_t columns, int threads) {
    expect(threads >= 1, "threads: expected at least 1, got ", threads);
    const size_t useful = std::max<size_t>(1, rows * columns / kElementsPerThread);
    const size_t parts = std::min({static_cast<size_t>(threads), useful, rows});
    if (parts <= 1) {
        kernel(0, rows);
        return;
    }
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (size_t part = 0; part < parts; ++part) {
        kernel(rows * part / parts, rows * (part + 1) / parts);
    }
}

}  // namespace

void quantize(size_t rows, size_t columns, uintptr_t x, size_t x_stride,
              const std::string& statistic, float clip, int bits, size_t block_size,
              uintptr_t thresholds, size_t threshold_count, uintptr_t packed, size_t row_bytes,
              uintptr_t scales, int threads) {
    if (rows == 0 || columns == 0) {
        return;
    }
    check_codes(bits, block_size, columns);
    check_count("threshold_count", threshold_count, 0, (size_t{1} << bits) - 1);
    CodebookTables tables;
    const float* const splits =
        threshold_count == 0 ? nullptr : pointer<const float>(thresholds, "thresholds");
    set_thresholds(tables, bits, splits, threshold_count);
    set_cells(tables, bits, threshold_count);

    QuantizeArgs args = {};
    args.x = pointer<const float>(x, "x");
    args.x_stride = x_stride;
    args.columns = columns;
    args.bits = bits;
    args.block_size = block_size;
    args.statistic = parse_statistic(statistic);
    args.clip = clip;
    args.codebook = &tables;
    args.packed = pointer<uint8_t>(packed, "packed");
    args.row_bytes = row_bytes;
    args.scales = pointer<float>(scales, "scales");
    args.blocks = (columns - 1) / block_size + 1;
    const auto kernel = codec_kernels().quantize;
    run_rows([&](size_t begin, size_t end) { kernel(args, begin, end); }, rows, columns, threads);
}

void accumulate(size_t batch, size_t rows, size_t columns, uintptr_t buffer, size_t buffer_stride,
                float buffer_weight, int bits, size_t block_size, uintptr_t levels,
                size_t level_count, uintptr_t packed, size_t row_bytes, uintptr_t scales,
                float code_weight, const Matrices& grad, const std::string& grad_type,
                float grad_weight, uintptr_t row_sums, int threads) {
    if (batch == 0 || rows == 0) {
        return;
    }
    double* const sums = pointer<double>(row_sums, "row_sums");
    if (columns == 0) {
        std::fill_n(sums, batch * rows, 0.0);
        return;
    }
    AccumulateArgs args = {};
    args.buffer = pointer<float>(buffer, "buffer");
    args.buffer_stride = buffer_stride;
    args.buffer_weight = buffer_weight;
    args.columns = columns;

    CodebookTables tables;
    if (packed != 0) {
        check_codes(bits, block_size, columns);
        check_count("level_count", level_count, 1, size_t{1} << bits);
        set_levels(tables, pointer<const float>(levels, "levels"), level_count);
        args.packed = pointer<const uint8_t>(packed, "packed");
        args.row_bytes = row_bytes;
        args.scales = pointer<const float>(scales, "scales");
        args.blocks = (columns - 1) / block_size + 1;
        args.bits = bits;
        args.block_size = block_size;
        args.codebook = &tables;
        args.code_weight = code_weight;
    }
    const auto [address, batch_stride, row_stride, column_stride] = grad;
    if (address != 0) {
        args.grad = pointer<const void>(address, "grad");
        args.grad_type = parse_grad_type(grad_type);
        args.grad_row_stride = row_stride;
        args.grad_column_stride = column_stride;
        args.grad_weight = grad_weight;
    }
    args.row_sums = sums;
    // The gradients of a batch may lie anywhere; all else is one matrix of batch * rows rows.
    const ptrdiff_t gap = batch_stride - static_cast<ptrdiff_t>(rows) * row_stride;
    const size_t even_rows = args.grad == nullptr || gap == 0 ? batch * rows : rows;
    const ptrdiff_t gap_bytes = gap * (args.grad_type == GradType::float32 ? 4 : 2);
    const auto kernel = codec_kernels().accumulate;
    const auto run = [&](size_t begin, size_t end) {
        AccumulateArgs part = args;
        while (begin < end) {
            const ptrdiff_t matrix = static_cast<ptrdiff_t>(begin / even_rows);
            const size_t stop = std::min(end, (begin / even_rows + 1) * even_rows);
            if (matrix != 0) {
                part.grad = static_cast<const char*>(args.grad) + matrix * gap_bytes;
            }
            kernel(part, begin, stop);
            begin = stop;
        }
    };
    run_rows(run, batch * rows, columns, threads);
}

void rotate(size_t rows, size_t columns, uintptr_t x, size_t x_stride, uintptr_t first_signs,
            uintptr_t second_signs, bool inverse, int threads) {
    if (rows == 0 || columns == 0) {
        return;
    }
    RotateArgs args = {};
    args.x = pointer<float>(x, "x");
    args.x_stride = x_stride;
    args.columns = columns;
    args.size = 1;
    while (args.size <= columns / 2) {
        args.size *= 2;
    }
    args.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(args.size)));
    args.first_signs = pointer<const float>(first_signs, "first_signs");
    args.second_signs = pointer<const float>(second_signs, "second_signs");
    args.inverse = inverse;
    const RotationKernel kernel = rotation_kernel();
    run_rows([&](size_t begin, size_t end) { kernel(args, begin, end); }, rows, columns, threads);
}

}  // namespace lowbit
