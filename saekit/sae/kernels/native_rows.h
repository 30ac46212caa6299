// Products with rows, sums of chosen ones, and a step of Adam on each.
//
// Included by `native.cpp`.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

constexpr int64_t CACHE_LINE = 16;  // floats

// The hardware reads ahead within a row; where the next row lies only the list of rows says.
inline void fetch(const float* row, int64_t D) {
    for (int64_t d = 0; d < D; d += CACHE_LINE) __builtin_prefetch(row + d);
}

inline float dot(const float* a, const float* b, int64_t D) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; d++) sum += a[d] * b[d];
    return sum;
}

// Sums of chosen rows, one per segment: weights[p] * rows[indices[p]] over p from starts[s] to starts[s + 1].
struct Sums {
    const float* weights;
    const int64_t* indices;
    const int64_t* starts;
    const float* rows;
    int64_t D, last;

    void of(int64_t s, float* sum) const {
        std::fill_n(sum, D, 0.0f);
        for (int64_t p = starts[s]; p < starts[s + 1]; p++) {
            if (p + 1 < last) fetch(rows + indices[p + 1] * D, D);
            const float weight = weights[p];
            const float* const row = rows + indices[p] * D;
#pragma omp simd
            for (int64_t d = 0; d < D; d++) sum[d] += weight * row[d];
        }
    }
};

// In double precision, so that the square of a tiny row is not zero; at least the smallest normal number.
inline float norm_of(const float* row, int64_t D) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; d++) sum += double(row[d]) * row[d];
    return std::max(float(std::sqrt(sum)), std::numeric_limits<float>::min());
}

struct Adam {
    float step_size, beta1, beta2, scale2, eps;  // scale2: one over the second moment's correction

    // One step of a row, or of any few numbers in sequence; with `unit` it stays at norm 1.
    void step(float* param, const float* grad, float* first, float* second, int64_t D, bool unit) const {
        float along = 0;  // the gradient's part along the row, in units of the row
        if (unit) {
            const float norm = norm_of(param, D);
            along = dot(grad, param, D) / norm / norm;
        }
#pragma omp simd
        for (int64_t d = 0; d < D; d++) {
            const float g = grad[d] - along * param[d];
            first[d] = beta1 * first[d] + (1 - beta1) * g;
            second[d] = beta2 * second[d] + (1 - beta2) * g * g;
            param[d] -= step_size * first[d] / (std::sqrt(second[d] * scale2) + eps);
        }
        if (unit) {
            const float scale = 1 / norm_of(param, D);
#pragma omp simd
            for (int64_t d = 0; d < D; d++) param[d] *= scale;
        }
    }
};

}  // namespace
