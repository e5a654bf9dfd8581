// Sums of inverses of a symmetric positive definite matrix plus multiples of I.
//
// By Cholesky's factor: A = L L^T, A^-1 = L^-T L^-1. Both are taken by halves,
//   A = [A  B  ]    L^-1 = [L_A^-1           0     ]    Q = L_A^-1 B,
//       [B^T C ]           [-L_C^-1 Q^T L_A^-1  L_C^-1],  L_C of C - Q^T Q,
// so that nearly all of it is products. Without pivots, which a positive definite matrix does not
// need. Inverting A and C - B^T A^-1 B themselves would take three quarters of the products; but
// it squares the condition number: of a matrix of rank one plus 1e-5 I nothing was left.
#include <algorithm>
#include <utility>
#include <vector>

#include "isa.hpp"
#include "product.hpp"
#include "workspace.hpp"

namespace lowbit {

namespace {

// Whole strips, if it can be.
size_t first_half(size_t size) {
    return ceil_divide(size / 2, kStrip) * kStrip;
}

// Floats that `invert` needs beside a matrix.
size_t spare_floats(size_t size) {
    if (size <= kSmallInverse) {
        return 0;
    }
    const size_t first = first_half(size), second = size - first;
    return first * second + std::max(spare_floats(first), spare_floats(second));
}

// A square matrix in memory.
struct Square {
    float* data;
    size_t stride, size;

    Square part(size_t first, size_t count) const {
        return {data + first * (stride + 1), stride, count};
    }
};

Matrices rows_at(const float* x, size_t stride) {
    return {reinterpret_cast<uintptr_t>(x), 0, static_cast<ptrdiff_t>(stride), 1};
}

Matrices transposed(const Matrices& x) {
    const auto [data, batch_stride, row_stride, column_stride] = x;
    return {data, batch_stride, column_stride, row_stride};
}

class Inverter {
  public:
    explicit Inverter(int threads) : kernels_(product_kernels()), threads_(threads) {}

    // x <- its inverse.
    void invert(const Square& x, float* spare) const {
        factor(x, spare);
        square(x);
        kernels_.mirror(x.data, x.stride, 0, x.size);
    }

  private:
    // x <- L^-1 of x = L L^T, zeros above the diagonal.
    void factor(const Square& x, float* spare) const {
        if (x.size <= kSmallInverse) {
            kernels_.factor_small(x.data, x.stride, x.size);
            return;
        }
        const size_t first = first_half(x.size), second = x.size - first;
        const Square a = x.part(0, first), c = x.part(first, second);
        float* const b = x.data + first;
        float* const below = x.data + first * x.stride;
        const Matrices q = rows_at(spare, second);
        float* const rest = spare + first * second;
        factor(a, rest);
        multiply_lower(a, rows_at(b, x.stride), second, spare, second, 1.0f);
        symmetric_product(1, second, first, transposed(q), {}, rows_at(c.data, c.stride),
                          rows_at(c.data, c.stride), -1.0f, 1.0f, false, threads_);
        factor(c, rest);
        multiply_lower_transposed(a, q, second, b, x.stride);
        multiply_lower(c, transposed(rows_at(b, x.stride)), first, below, x.stride, -1.0f);
        for (size_t row = 0; row < first; ++row) {
            std::fill_n(b + row * x.stride, second, 0.0f);
        }
    }

    // On and above the diagonal: x <- x^T x of a lower triangle.
    void square(const Square& x) const {
        if (x.size <= kSmallInverse) {
            kernels_.square_small(x.data, x.stride, x.size);
            return;
        }
        const size_t first = first_half(x.size), second = x.size - first;
        const Square a = x.part(0, first), c = x.part(first, second);
        float* const b = x.data + first;
        const Matrices below = rows_at(x.data + first * x.stride, x.stride);
        // (B^T)^T = C^T below, by columns of C^T
        for (const auto& [begin, count] : halves(second)) {
            multiply(first, count, second - begin,
                     transposed(rows_at(x.data + (first + begin) * x.stride, x.stride)),
                     rows_at(c.data + begin * x.stride + begin, x.stride), b + begin, x.stride,
                     1.0f);
        }
        square(a);
        symmetric_product(1, first, second, transposed(below), {}, rows_at(a.data, a.stride),
                          rows_at(a.data, a.stride), 1.0f, 1.0f, false, threads_);
        square(c);
    }

    // to [x.size, columns] <- alpha * x y of a lower triangle x.
    void multiply_lower(const Square& x, const Matrices& y, size_t columns, float* to,
                        size_t stride, float alpha) const {
        for (const auto& [begin, count] : halves(x.size)) {
            multiply(count, columns, begin + count, rows_at(x.data + begin * x.stride, x.stride), y,
                     to + begin * stride, stride, alpha);
        }
    }

    // to <- x^T y.
    void multiply_lower_transposed(const Square& x, const Matrices& y, size_t columns, float* to,
                                   size_t stride) const {
        for (const auto& [begin, count] : halves(x.size)) {
            const auto [data, batch_stride, row_stride, column_stride] = y;
            const Matrices from = {data + begin * row_stride * sizeof(float), batch_stride,
                                   row_stride, column_stride};
            multiply(count, columns, x.size - begin,
                     transposed(rows_at(x.data + begin * (x.stride + 1), x.stride)), from,
                     to + begin * stride, stride, 1.0f);
        }
    }

    // Half of a triangle's other half is not multiplied.
    static std::vector<std::pair<size_t, size_t>> halves(size_t size) {
        if (size <= 2 * kSmallInverse) {
            return {{0, size}};
        }
        const size_t first = first_half(size);
        return {{0, first}, {first, size - first}};
    }

    // to [m, n] <- alpha * a b
    void multiply(size_t m, size_t n, size_t k, const Matrices& a, const Matrices& b, float* to,
                  size_t stride, float alpha) const {
        product(1, m, n, k, a, b, rows_at(to, stride), 0, alpha, 0.0f, false, std::nullopt,
                std::nullopt, threads_);
    }

    const ProductKernels& kernels_;
    int threads_;
};

// Rows a power of two apart would share their places in the cache.
size_t row_floats(size_t size) {
    return ceil_divide(size, kStrip) * kStrip + kStrip;
}

}  // namespace

size_t inverse_floats(size_t size) {
    return ceil_divide(size * row_floats(size) + spare_floats(size), kStrip) * kStrip;
}

void add_inverses(size_t batch, size_t size, const Matrices& x, size_t count, uintptr_t shifts,
                  uintptr_t weights, const Matrices& out, size_t together, uintptr_t workspace,
                  int threads) {
    if (batch == 0 || size == 0) {
        return;
    }
    expect(threads >= 1, "threads: expected at least 1, got ", threads);
    const ProductKernels& kernels = product_kernels();
    const auto [x_data, x_batch_stride, x_row_stride, x_column_stride] = x;
    const auto [out_data, out_batch_stride, out_row_stride, out_column_stride] = out;
    const float* const shift_of = pointer<const float>(shifts, "shifts");
    const float* const weight_of = pointer<const float>(weights, "weights");
    const size_t jobs = batch * count;
    expect(together >= 1, "together: expected at least 1, got ", together);
    const size_t useful =
        std::min(jobs * size * size * size / 2 / kWorkPerThread + 1, static_cast<size_t>(threads));
    const size_t workers = std::min(together, useful);
    const int within = workers > 1 ? 1 : static_cast<int>(useful);
    const size_t stride = row_floats(size), floats = inverse_floats(size);
    float* const inverses = pointer<float>(workspace, "workspace");

    const auto invert = [&](size_t job, float* to) {
        const float* const from = pointer<const float>(x_data, "x") +
                                  static_cast<ptrdiff_t>(job / count) * x_batch_stride;
        for (size_t row = 0; row < size; ++row) {
            std::copy_n(from + static_cast<ptrdiff_t>(row) * x_row_stride, size, to + row * stride);
            to[row * stride + row] += shift_of[job % count];
        }
        Inverter(within).invert({to, stride, size}, to + size * stride);
    };
    // In order, so that the sum does not depend on the number of threads.
    const auto add = [&](size_t job, const float* inverse, size_t begin, size_t end) {
        float* const sum = pointer<float>(out_data, "out") +
                           static_cast<ptrdiff_t>(job / count) * out_batch_stride;
        for (size_t row = begin; row < end; ++row) {
            kernels.add_scaled(sum + static_cast<ptrdiff_t>(row) * out_row_stride,
                               inverse + row * stride, 1, weight_of[job % count], nullptr, size);
        }
    };
    const size_t parts = std::min(static_cast<size_t>(threads), ceil_divide(size, kStrip));
    for (size_t first = 0; first < jobs; first += workers) {
        const size_t group = std::min(workers, jobs - first);
        parallel_for(group, group, [&](size_t index, size_t) {
            invert(first + index, inverses + index * floats);
        });
        parallel_for(parts, parts, [&](size_t part, size_t) {
            for (size_t index = 0; index < group; ++index) {
                add(first + index, inverses + index * floats, size * part / parts,
                    size * (part + 1) / parts);
            }
        });
    }
}

}  // namespace lowbit
