// The k largest scores of each token.
//
// Included by `native.cpp`.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t BLOCK = 4096;  // default for how many numbers are processed at a time

// An integer with the same order as the number with these bits. NaN is the largest, so that it is chosen and the step
// can be skipped.
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

// The inverse of key_of.
inline float number_of(int32_t key) {
    const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// Sources of scores: each returns the score of latent m, and its key.

struct Float32 {  // products without the bias
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

struct Int8 {  // 32-bit sums of 8-bit products. All are divided by the token's scale, which keeps their order.
    using Key = int32_t;
    const int32_t* row;
    const float* scale;
    const float* bias;
    float one_over_x;
    // An explicit fma, so that a score is the same number each time it is computed.
    float operator()(int64_t m) const { return std::fma(float(row[m]), scale[m], bias[m] * one_over_x); }
    Key key(int64_t m) const { return key_of((*this)(m)); }
};

struct Candidate {
    int32_t key;
    int32_t latent;
    bool operator<(const Candidate& other) const {  // larger scores first, and smaller latents among equal scores
        return key != other.key ? key > other.key : latent < other.latent;
    }
};

template <class Key>
struct Scratch {
    std::vector<Key> maxima;
    std::vector<Candidate> found, ties;
};

// A key that at least k and at most `most` of the keys reach. If there is none, the largest key that k of them reach.
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
            Key some = 0;  // in the keys' type, so that a vector register counts as many keys as it holds
            for (int64_t i = start; i < std::min(count, start + BLOCK); i++) some += keys[i] >= middle;
            reach += some;
        }
        if (reach >= k && reach <= most) return middle;
        if (reach > k) low = middle;
        else high = middle - 1;
    }
    return Key(low);
}

// Deal latents first..first + count - 1 to lanes in turn. The k-th largest of the lanes' maxima is a lower bound of the
// k-th largest score, and only the few lanes whose maxima reach it have scores that do. So each score is read once,
// without a branch, and only few are read again. Afterwards, `found` starts with the k largest.
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

// Lanes per row: enough that few have two of the k largest, but few enough that their maxima stay in the cache.
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

}  // namespace
