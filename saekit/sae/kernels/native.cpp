// The loops of the backend `native`. They do in one pass over memory what torch's operations do in several.
//
// `native_build.py` compiles this file on the machine that runs it, `native_ops.py` calls it, and the tests compare it
// with `torch_ops.py` and `eager.py`. One thread computes each row in a fixed order, so results do not depend on the
// number of threads. All matrices are contiguous and row-major.

#include "native_rows.h"
#include "native_topk.h"

namespace {

template <class Call>
void with_moments(void* firsts, void* seconds, bool bfloat16, Call call) {
    if (bfloat16) call(static_cast<uint16_t*>(firsts), static_cast<uint16_t*>(seconds));
    else call(static_cast<float*>(firsts), static_cast<float*>(seconds));
}

}  // namespace

extern "C" {

void topk_float32(const float* products, const float* bias, int64_t N, int64_t M, int64_t k, int64_t parts,
                  bool in_order, int64_t threads, float* values, int64_t* latents) {
    topk<Float32>([=](int64_t n) { return Float32{products + n * M, bias}; }, N, M, k, parts, in_order, threads, values, latents);
}

void topk_bfloat16(const int16_t* scores, int64_t N, int64_t M, int64_t k, int64_t parts, bool in_order,
                   int64_t threads, float* values, int64_t* latents) {
    topk<BFloat16>([=](int64_t n) { return BFloat16{scores + n * M}; }, N, M, k, parts, in_order, threads, values, latents);
}

void topk_int8(const int32_t* sums, const float* scale, const float* bias, const float* one_over_x, int64_t N,
               int64_t M, int64_t k, int64_t parts, bool in_order, int64_t threads, float* values, int64_t* latents) {
    topk<Int8>([=](int64_t n) { return Int8{sums + n * M, scale, bias, one_over_x[n]}; }, N, M, k, parts, in_order, threads,
         values, latents);
}

// The k largest of each token's C scores, in order, and their latents: k / parts from each of `parts` equal parts.
// Among equal scores, the first wins. An element's place is the number of larger ones, counted without a branch: C is
// small.
void best_of(const float* scores, const int64_t* latents, int64_t N, int64_t C, int64_t k, int64_t parts,
             int64_t threads, float* values, int64_t* indices) {
    const int64_t count = C / parts, k_each = k / parts;
#pragma omp parallel num_threads(threads)
    {
        std::vector<int64_t> keys(count);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < N * parts; group++) {
            const int64_t from = group * count, to = group * k_each;
            for (int64_t i = 0; i < count; i++) keys[i] = int64_t(key_of(scores[from + i])) * (1LL << 32) - i;
            for (int64_t i = 0; i < count; i++) {
                int64_t place = 0;
                for (int64_t j = 0; j < count; j++) place += keys[j] > keys[i];
                if (place >= k_each) continue;
                values[to + place] = scores[from + i];
                indices[to + place] = latents[from + i];
            }
        }
    }
}

// Counting sort of the pairs (latent, token) by latent, and by token within a latent: each pair's old position, its
// token, and where each latent's pairs begin. `starts` has M + 1 numbers.
void sort_pairs(const int64_t* latents, int64_t count, int64_t K, int64_t M, int64_t* order, int64_t* tokens,
                int64_t* starts) {
    std::fill_n(starts, M + 1, 0);
    for (int64_t p = 0; p < count; p++) starts[latents[p] + 1]++;
    for (int64_t m = 0; m < M; m++) starts[m + 1] += starts[m];
    std::vector<int64_t> next(starts, starts + M);
    for (int64_t n = 0, p = 0; p < count; n++)
        for (const int64_t end = p + K; p < end; p++) {
            const int64_t at = next[latents[p]]++;
            order[at] = p;
            tokens[at] = n;
        }
}

// Whether all indices are valid row numbers. The sums below and the sort above do not check them.
bool all_below(const int64_t* indices, int64_t count, int64_t rows) {
    uint64_t largest = 0;  // as unsigned, a negative index is larger than any valid one
    for (int64_t i = 0; i < count; i++) largest = std::max(largest, uint64_t(indices[i]));
    return count == 0 || largest < uint64_t(rows);
}

// out[n, i] = <x[n], W[indices[n, i]]>
void gather_dot(const float* x, const float* W, const int64_t* indices, int64_t N, int64_t K, int64_t D,
                int64_t threads, float* out) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t n = 0; n < N; n++)
        for (int64_t at = n * K; at < (n + 1) * K; at++) {
            if (at + 1 < N * K) fetch(W + indices[at + 1] * D, D);
            out[at] = dot(x + n * D, W + indices[at] * D, D);
        }
}

// out[s] = the sum of segment s
void weighted_sums(const float* weights, const int64_t* indices, const int64_t* starts, const float* rows, int64_t S,
                   int64_t D, int64_t threads, float* out) {
    const Sums sums{weights, indices, starts, rows, D, starts[S]};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 32)
    for (int64_t s = 0; s < S; s++) sums.of(s, out + s * D);
}

// One step of Adam, as in `eager.adam_`. With unit_rows, the rows have D numbers and stay at norm 1.
void adam(float* params, const float* grads, void* firsts, void* seconds, bool bfloat16, int64_t count, int64_t D,
          const double* numbers, float beta1, float beta2, float eps, bool unit_rows, int64_t threads) {
    const Adam adam = adam_of(numbers, beta1, beta2, eps);
    const int64_t size = unit_rows ? D : BLOCK;
    with_moments(firsts, seconds, bfloat16, [&](auto* first, auto* second) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t at = 0; at < count; at += size)
            adam.step(params + at, grads + at, first + at, second + at, std::min(size, count - at), unit_rows);
    });
}

// The same for a gradient given as sums of segments. Each row of it is computed when it is needed, in the cache.
void adam_of_sums(float* params, const float* weights, const int64_t* indices, const int64_t* starts, const float* rows,
                  void* firsts, void* seconds, bool bfloat16, int64_t M, int64_t D, const double* numbers, float beta1,
                  float beta2, float eps, bool unit_rows, int64_t threads) {
    const Adam adam = adam_of(numbers, beta1, beta2, eps);
    const Sums sums{weights, indices, starts, rows, D, starts[M]};
    with_moments(firsts, seconds, bfloat16, [&](auto* first, auto* second) {
#pragma omp parallel num_threads(threads)
        {
            std::vector<float> grad(D);
#pragma omp for schedule(dynamic, 32)
            for (int64_t m = 0; m < M; m++) {
                sums.of(m, grad.data());
                adam.step(params + m * D, grad.data(), first + m * D, second + m * D, D, unit_rows);
            }
        }
    });
}

}  // extern "C"

#if defined(__AMX_BF16__) && defined(__AVX512VBMI2__) && defined(__linux__)
#include "native_amx.h"
#else
extern "C" bool amx_ready() { return false; }
#endif
