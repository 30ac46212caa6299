// The loops of the backend `native`: what torch's operations do in several passes over memory, in one.
//
// `native_build.py` compiles this file on the machine that runs it, `native_ops.py` calls it, and the tests hold it to
// `torch_ops.py` and `eager.py`. Every row is computed by one thread in a fixed order: results do not depend on the
// number of threads. All matrices are contiguous and lie row by row.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int64_t CACHE_LINE = 16;  // floats
constexpr int64_t BLOCK = 4096;     // numbers that are taken at a time where nothing else says how many

// ---- The k largest scores of a row -----------------------------------------------------------------------------------

// An integer that orders as the number with these bits does. What is not a number is the largest, so that it is chosen
// and a step can refuse it.
template <class Key>
inline Key key_of(Key bits, Key infinity) {
    constexpr Key LARGEST = std::numeric_limits<Key>::max();
    const Key key = bits ^ ((bits >> (8 * sizeof(Key) - 1)) & LARGEST);
    return Key(bits & LARGEST) > infinity ? LARGEST : key;
}

inline int32_t key_of(float score) {
    int32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    return key_of<int32_t>(bits, 0x7f800000);
}

// The inverse.
inline float number_of(int32_t key) {
    const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// Where scores come from: that of latent m, and its key.

struct Float32 {  // a product without its bias
    using Key = int32_t;
    const float* row;
    const float* bias;
    float operator()(int64_t m) const { return row[m] + bias[m]; }
    Key key(int64_t m) const { return key_of((*this)(m)); }
};

struct BFloat16 {
    using Key = int16_t;
    const int16_t* row;
    float operator()(int64_t m) const {
        const uint32_t bits = uint32_t(uint16_t(row[m])) << 16;
        float score;
        std::memcpy(&score, &bits, sizeof score);
        return score;
    }
    Key key(int64_t m) const { return key_of<int16_t>(row[m], 0x7f80); }
};

struct Int8 {  // 32-bit sums of 8-bit products; all divided by the token's scale, which changes no order
    using Key = int32_t;
    const int32_t* row;
    const float* scale;
    const float* bias;
    float one_over_x;
    // Fused by name, so that a score is the same number each time it is computed.
    float operator()(int64_t m) const { return std::fma(float(row[m]), scale[m], bias[m] * one_over_x); }
    Key key(int64_t m) const { return key_of((*this)(m)); }
};

struct Candidate {
    int32_t key;
    int32_t latent;
    bool operator<(const Candidate& other) const {  // larger scores first; among equal ones smaller latents
        return key != other.key ? key > other.key : latent < other.latent;
    }
};

template <class Key>
struct Scratch {
    std::vector<Key> maxima;
    std::vector<Candidate> found, ties;
};

// A key that at least k of the keys reach, and no more than `most`; if there is none, the largest that k reach.
template <class Key>
Key kth_largest(const Key* keys, int64_t count, int64_t k, int64_t most) {
    Key smallest = keys[0], largest = keys[0];
    for (int64_t i = 0; i < count; i++) {
        smallest = std::min(smallest, keys[i]);
        largest = std::max(largest, keys[i]);
    }
    int64_t low = smallest, high = largest;
    while (low < high) {
        const Key middle = Key((low + high + 1) >> 1);
        int64_t reach = 0;
        for (int64_t start = 0; start < count; start += BLOCK) {
            Key some = 0;  // of the keys' type, so that a register counts as many as it holds
            for (int64_t i = start; i < std::min(count, start + BLOCK); i++) some += keys[i] >= middle;
            reach += some;
        }
        if (reach >= k && reach <= most) return middle;
        if (reach > k) low = middle;
        else high = middle - 1;
    }
    return Key(low);
}

// Latents first..first + count - 1 are dealt to lanes in turn. The k-th largest of the lanes' maxima is a lower bound
// of the k-th largest score, and what reaches it lies in the few lanes whose maxima do: so each score is read once,
// without a branch, and only some are read again. `found` then has the k largest in front.
template <class Scores, class Key = typename Scores::Key>
void topk_of_row(const Scores& scores, int64_t first, int64_t count, int64_t k, bool in_order, Scratch<Key>& scratch) {
    auto& [maxima, found, ties] = scratch;
    const int64_t lanes = int64_t(maxima.size());
    std::fill(maxima.begin(), maxima.end(), std::numeric_limits<Key>::min());
    Key* const maximum = maxima.data();
    for (int64_t start = 0; start < count; start += lanes) {
        const int64_t end = std::min(lanes, count - start);
        for (int64_t lane = 0; lane < end; lane++)
            maximum[lane] = std::max(maximum[lane], scores.key(first + start + lane));
    }
    const Key bound = kth_largest(maxima.data(), lanes, k, k);

    found.clear();
    ties.clear();
    for (int64_t lane = 0; lane < std::min(lanes, count); lane++) {
        if (maxima[lane] < bound) continue;
        for (int64_t m = lane; m < count; m += lanes) {
            const Key key = scores.key(first + m);
            if (key > bound) found.push_back({key, int32_t(first + m)});
            else if (key == bound && int64_t(ties.size()) < k) ties.push_back({key, int32_t(first + m)});
        }
    }
    const int64_t missing = std::max<int64_t>(0, k - int64_t(found.size()));
    found.insert(found.end(), ties.begin(), ties.begin() + std::min<int64_t>(missing, ties.size()));
    if (int64_t(found.size()) > k) std::nth_element(found.begin(), found.begin() + k, found.end());
    if (in_order) std::sort(found.begin(), found.begin() + k);
}

// Lanes per row: enough that few have two of the k largest, few enough that their maxima stay close at hand.
int64_t lanes_for(int64_t count, int64_t k) {
    int64_t lanes = 64;
    while (lanes < 16 * k && lanes < count) lanes *= 2;
    return lanes;
}

template <class Scores, class ScoresOf>
void topk(ScoresOf scores_of, int64_t N, int64_t M, int64_t k, int64_t parts, bool in_order, int64_t threads,
          float* values, int64_t* latents) {
    const int64_t count = M / parts, k_each = k / parts, lanes = lanes_for(count, k_each);
#pragma omp parallel num_threads(threads)
    {
        Scratch<typename Scores::Key> scratch{std::vector<typename Scores::Key>(lanes), {}, {}};
#pragma omp for schedule(dynamic, 8)
        for (int64_t n = 0; n < N; n++) {
            const auto scores = scores_of(n);
            for (int64_t part = 0; part < parts; part++) {
                topk_of_row(scores, part * count, count, k_each, in_order, scratch);
                for (int64_t i = 0; i < k_each; i++) {
                    const int64_t at = n * k + part * k_each + i;
                    latents[at] = scratch.found[i].latent;
                    values[at] = scores(scratch.found[i].latent);
                }
            }
        }
    }
}

// ---- Sums over chosen rows -------------------------------------------------------------------------------------------

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

// ---- Adam ------------------------------------------------------------------------------------------------------------

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

// Of C scores of each token the k largest, in order, and their latents; of each of `parts` equal parts of them k / parts.
// Among equal ones the first. An element's place is the number of those before it: no branch, and C is small.
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

// Pairs (token, latent) in the order of latents, and of tokens within a latent: where each was, its token, and where
// each latent's begin. Counted, not compared. `starts` has M + 1 numbers.
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

// Whether all of them are numbers of rows; the sums below, and the sort above, trust that.
bool all_below(const int64_t* indices, int64_t count, int64_t rows) {
    uint64_t largest = 0;  // a negative one is larger than any
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

// One step of Adam, as `eager.adam_` has it; with unit_rows on rows of D numbers, which stay at norm 1.
void adam(float* params, const float* grads, float* firsts, float* seconds, int64_t count, int64_t D, float step_size,
          float beta1, float beta2, float correction2, float eps, bool unit_rows, int64_t threads) {
    const Adam adam{step_size, beta1, beta2, 1 / correction2, eps};  // divisions take most of the time
    const int64_t size = unit_rows ? D : BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < count; at += size)
        adam.step(params + at, grads + at, firsts + at, seconds + at, std::min(size, count - at), unit_rows);
}

// The same with a gradient that is the sums of segments: each is there for as long as its row is stepped, in the cache.
void adam_of_sums(float* params, const float* weights, const int64_t* indices, const int64_t* starts, const float* rows,
                  float* firsts, float* seconds, int64_t M, int64_t D, float step_size, float beta1, float beta2,
                  float correction2, float eps, bool unit_rows, int64_t threads) {
    const Adam adam{step_size, beta1, beta2, 1 / correction2, eps};
    const Sums sums{weights, indices, starts, rows, D, starts[M]};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> grad(D);
#pragma omp for schedule(dynamic, 32)
        for (int64_t m = 0; m < M; m++) {
            sums.of(m, grad.data());
            adam.step(params + m * D, grad.data(), firsts + m * D, seconds + m * D, D, unit_rows);
        }
    }
}

}  // extern "C"

#if defined(__AMX_BF16__) && defined(__AVX512VBMI2__) && defined(__linux__)
#include "native_amx.h"
#else
extern "C" bool amx_ready() { return false; }
#endif
