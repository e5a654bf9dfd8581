// Triangles that fit into L1. Included by product.inl.

// Cholesky's factor and its inverse together: what eliminates A's columns makes L^-1 of I.
void factor_small(float* x, size_t stride, size_t size) {
    // Row i: of the remaining matrix from column i on, of L^-1 before it.
    alignas(64) float rows[kSmallInverse][kSmallInverse];
    for (size_t i = 0; i < size; ++i) {
        memcpy(rows[i], x + i * stride, size * sizeof(float));
        memset(rows[i] + size, 0, (kSmallInverse - size) * sizeof(float));
    }
    for (size_t k = 0; k < size; ++k) {
        const float inverse = 1.0f / __builtin_sqrtf(rows[k][k]);
        rows[k][k] = 1.0f;
        for (size_t j = 0; j < kSmallInverse; ++j) {
            rows[k][j] *= inverse;
        }
        for (size_t i = k + 1; i < size; ++i) {
            const float factor = rows[k][i];  // of L
            rows[i][k] = 0.0f;
            for (size_t j = 0; j < kSmallInverse; ++j) {
                rows[i][j] -= factor * rows[k][j];
            }
        }
    }
    for (size_t i = 0; i < size; ++i) {
        memcpy(x + i * stride, rows[i], (i + 1) * sizeof(float));
        memset(x + i * stride + i + 1, 0, (size - i - 1) * sizeof(float));
    }
}

// x <- x^T x of a lower triangle.
void square_small(float* x, size_t stride, size_t size) {
    alignas(64) float sums[kSmallInverse][kSmallInverse] = {};
    for (size_t k = 0; k < size; ++k) {
        alignas(64) float row[kSmallInverse] = {};
        memcpy(row, x + k * stride, (k + 1) * sizeof(float));
        for (size_t i = 0; i <= k; ++i) {
            for (size_t j = 0; j < kSmallInverse; ++j) {
                sums[i][j] += row[i] * row[j];
            }
        }
    }
    for (size_t i = 0; i < size; ++i) {
        memcpy(x + i * stride, sums[i], size * sizeof(float));
    }
}
