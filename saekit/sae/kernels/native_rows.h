// Dot products with rows, sums of chosen rows, and a step of Adam on a row.
//
// Included by `native.cpp`.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int64_t CACHE_LINE = 16;  // in floats

// Prefetch a row. The hardware only prefetches within a row, since it does not know which row is next.
inline void fetch(const float* row, int64_t D) {
    for (int64_t d = 0; d < D; d += CACHE_LINE) __builtin_prefetch(row + d);
}

inline float dot(const float* a, const float* b, int64_t D) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; d++) sum += a[d] * b[d];
    return sum;
}

// Weighted sums of chosen rows: segment s sums weights[p] * rows[indices[p]] for p from starts[s] to starts[s + 1] - 1.
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

// Computed in double precision, so that squares of tiny numbers are not zero. At least the smallest normal number.
inline float norm_of(const float* row, int64_t D) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; d++) sum += double(row[d]) * row[d];
    return std::max(float(std::sqrt(sum)), std::numeric_limits<float>::min());
}

// A bfloat16 number is the upper half of a float32's bits.

inline uint32_t bits_of(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
}

inline uint16_t rounded(float number) {  // round to nearest, ties to even
    const uint32_t bits = bits_of(number);
    return number == number ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}

inline float widened(uint16_t number) {
    const uint32_t bits = uint32_t(number) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline float widened(float number) { return number; }

// Equals `eager.round_stochastically` bit for bit: rounds up or down at random, by a hash of `noise` and `odds`.
inline uint16_t rounded_by_odds(float number, float noise, uint32_t odds) {
    int32_t mixed = int32_t((bits_of(noise) ^ bits_of(number)) * 0x9e3779b1u + odds);
    mixed = int32_t(uint32_t(mixed ^ (mixed >> 15)) * 0x85ebca6bu);
    return uint16_t((bits_of(number) + ((uint32_t(mixed) >> 16) & 0xffff)) >> 16);
}

// Store moments. To bfloat16, the second moment is rounded at random: to nearest, it would never change.

inline void keep(float& first, float& second, float new_first, float new_second, float, uint32_t) {
    first = new_first;
    second = new_second;
}

inline void keep(uint16_t& first, uint16_t& second, float new_first, float new_second, float noise, uint32_t odds) {
    first = rounded(new_first);
    second = rounded_by_odds(new_second, noise, odds);
}

struct Adam {
    float step_size, beta1, beta2, scale2, eps;  // scale2: 1 / the second moment's bias correction
    uint32_t odds;                               // differs from step to step, for rounding

    // One step of a row, or of any D consecutive numbers. With `unit`, the row stays at norm 1.
    template <class Moment>
    void step(float* param, const float* grad, Moment* first, Moment* second, int64_t D, bool unit) const {
        float along = 0;  // the gradient's component along the row, as a multiple of the row
        if (unit) {
            const float norm = norm_of(param, D);
            along = dot(grad, param, D) / norm / norm;
        }
#pragma omp simd
        for (int64_t d = 0; d < D; d++) {
            const float g = grad[d] - along * param[d];
            const float new_first = beta1 * widened(first[d]) + (1 - beta1) * g;
            const float new_second = beta2 * widened(second[d]) + (1 - beta2) * g * g;
            keep(first[d], second[d], new_first, new_second, g, odds);
            param[d] -= step_size * new_first / (std::sqrt(new_second * scale2) + eps);
        }
        if (unit) {
            const float scale = 1 / norm_of(param, D);
#pragma omp simd
            for (int64_t d = 0; d < D; d++) param[d] *= scale;
        }
    }
};

// Reads the numbers of this step, in the order of `eager.adam_numbers`.
inline Adam adam_of(const double* numbers, float beta1, float beta2, float eps) {
    enum { STEP_SIZE, CORRECTION, ROOT, ODDS };
    return {float(numbers[STEP_SIZE]), beta1, beta2, 1 / float(numbers[CORRECTION]), eps, uint32_t(numbers[ODDS])};
}

}  // namespace
