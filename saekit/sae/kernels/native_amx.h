// The encoder fused with its top-k, for CPUs with AMX (Intel, since 2023). Scores stay in tile registers and in the
// cache of the core that computes them, and those that cannot be among the k largest are dropped at once.
//
// Included by `native.cpp`. Scores are float32 sums of bfloat16 products.

#include <immintrin.h>
#include <cstdlib>
#include <sys/syscall.h>
#include <unistd.h>

namespace amx {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int64_t ROWS = 16;                // rows of a tile
constexpr int64_t DEEP = 32;                // bfloat16 numbers in a row of a tile
constexpr int64_t SIDE = 2 * ROWS;          // side of the square block of scores (tokens by latents) computed at a time
constexpr int64_t TOKENS = 8 * SIDE;        // tokens per core at a time: they and their candidates stay in its cache
constexpr int64_t SLAB = 16 * SIDE;         // latents whose scores also stay in that cache
constexpr int64_t STRIDE = SLAB + ROWS;     // scores from one token to the next: not a power of two, for the cache
constexpr int64_t REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arguments of arch_prctl
constexpr int64_t MOST = 4;                 // a token has at most MOST * k candidates

constexpr uint16_t UP_TO_31[SIDE] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                     16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

inline int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

struct Config {
    alignas(64) uint8_t palette = 1;
    uint8_t start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS};
};

// Compilers assume that the two instructions for tile configurations access 8 bytes instead of 64.
inline void memory_is_up_to_date() { asm volatile("" ::: "memory"); }

inline __mmask16 first_of(int64_t count) { return count < ROWS ? __mmask16((1 << count) - 1) : __mmask16(-1); }

inline __m512i keys_of(__m512 scores) {
    const __m512i bits = _mm512_castps_si512(scores), largest = _mm512_set1_epi32(0x7fffffff);
    const __m512i keys = _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), largest));
    return _mm512_mask_mov_epi32(keys, _mm512_cmp_ps_mask(scores, scores, _CMP_UNORD_Q), largest);
}

// A token's candidates so far. Its k largest scores are among them, and new candidates must exceed `bound`.
struct Best {
    std::vector<int32_t> keys, latents;
    int64_t k, count = 0;
    float bound = std::numeric_limits<float>::quiet_NaN();  // every score passes

    explicit Best(int64_t k_largest) : keys(MOST * k_largest + SLAB + ROWS), latents(keys.size()), k(k_largest) {}

    void forget() {
        count = 0;
        bound = std::numeric_limits<float>::quiet_NaN();
    }

    // Take `size` scores, from latent `first` on. Without a branch, since which of them pass is unpredictable.
    void take(const float* scores, int64_t first, int64_t size) {
        uint16_t passing[SLAB + SIDE];
        int64_t more = 0;
        const __m512 least = _mm512_set1_ps(bound);
        __m512i at = _mm512_loadu_si512(UP_TO_31);
        for (int64_t m = 0; m < size; m += SIDE) {
            const uint32_t low = _mm512_cmp_ps_mask(_mm512_load_ps(scores + m), least, _CMP_NLE_UQ);
            const uint32_t high = _mm512_cmp_ps_mask(_mm512_load_ps(scores + m + ROWS), least, _CMP_NLE_UQ);
            const uint32_t pass = (low | high << ROWS) & (size - m < SIDE ? (1u << (size - m)) - 1 : ~0u);
            _mm512_storeu_si512(passing + more, _mm512_maskz_compress_epi16(pass, at));
            more += __builtin_popcount(pass);
            at = _mm512_add_epi16(at, _mm512_set1_epi16(SIDE));
        }
        for (int64_t i = 0; i < more; i += ROWS) {
            const __m512i their = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(passing + i)));
            const __m512 some = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), first_of(more - i), their, scores, 4);
            _mm512_storeu_si512(keys.data() + count + i, keys_of(some));
            _mm512_storeu_si512(latents.data() + count + i, _mm512_add_epi32(their, _mm512_set1_epi32(int32_t(first))));
        }
        count += more;
        if (count > MOST * k) reduce(k + k / 2);
    }

    // Keep the k largest or a few more, at most `most`. Among equal scores, keep the smaller latents, which came first.
    void reduce(int64_t most) {
        if (count <= most) return;
        const int32_t cut = kth_largest(keys.data(), count, k, most);
        int64_t reach = 0, above = 0;
        for (int64_t i = 0; i < count; i++) {
            reach += keys[i] >= cut;
            above += keys[i] > cut;
        }
        if (reach <= most) keep_from(cut);
        else {  // too many scores equal it
            int64_t ties = k - above;
            for (int64_t i = 0; i < count; i++)
                if (keys[i] == cut && ties-- <= 0) keys[i] = std::numeric_limits<int32_t>::min();
            keep_from(cut);
        }
        bound = number_of(cut);
        if (bound != bound) bound = INFINITE;  // only NaN passes
    }

    void keep_from(int32_t cut) {
        const __m512i least = _mm512_set1_epi32(cut);
        int64_t kept = 0;
        int32_t *const key = keys.data(), *const latent = latents.data();
        for (int64_t i = 0; i < count; i += ROWS) {
            const __m512i some = _mm512_loadu_si512(key + i), their = _mm512_loadu_si512(latent + i);
            const __mmask16 keep = _mm512_mask_cmp_epi32_mask(first_of(count - i), some, least, _MM_CMPINT_NLT);
            _mm512_storeu_si512(key + kept, _mm512_maskz_compress_epi32(keep, some));
            _mm512_storeu_si512(latent + kept, _mm512_maskz_compress_epi32(keep, their));
            kept += __builtin_popcount(keep);
        }
        count = kept;
    }
};

// Compute the scores of 32 tokens by 32 latents, and prefetch `coming` meanwhile.
inline void products(const uint16_t* x, const uint16_t* W, int64_t E, const uint16_t* coming, int64_t lines,
                     float* scores) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t e = 0; e < E; e += DEEP) {
        _tile_loadd(4, x + e * ROWS, 64);
        _tile_loadd(6, W + e * ROWS, 64);
        _tile_loadd(5, x + (E + e) * ROWS, 64);
        _tile_loadd(7, W + (E + e) * ROWS, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        for (int64_t line = 0; line < lines; line++) _mm_prefetch(coming + DEEP * line, _MM_HINT_T1);
        coming += DEEP * lines;
    }
    _tile_stored(0, scores, 4 * STRIDE);
    _tile_stored(1, scores + ROWS, 4 * STRIDE);
    _tile_stored(2, scores + ROWS * STRIDE, 4 * STRIDE);
    _tile_stored(3, scores + ROWS * STRIDE + ROWS, 4 * STRIDE);
}

}  // namespace amx

extern "C" {

// Whether the operating system lets this process use tiles.
bool amx_ready() { return syscall(SYS_arch_prctl, amx::REQUEST_PERMISSION, amx::TILE_DATA) == 0; }

// Convert weights to bfloat16 in the layout of tiles, [M / 16, E / 2, 16, 2]. E is D + 2, padded to whole tiles. The
// two extra columns are the bias and its rounding error.
void amx_pack_weights(const float* W, const float* bias, int64_t M, int64_t D, int64_t E, int64_t threads,
                      uint16_t* packed) {
    using namespace amx;
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint16_t> row(E);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < whole(M, SIDE); m++) {
            std::fill(row.begin(), row.end(), 0);
            if (m < M) {
                for (int64_t d = 0; d < D; d++) row[d] = rounded(W[m * D + d]);
                row[D] = rounded(bias[m]);
                const float lost = bias[m] - widened(row[D]);
                row[D + 1] = lost == lost ? rounded(lost) : 0;  // NaN for an infinite bias
            }
            uint16_t* const out = packed + m / ROWS * ROWS * E + m % ROWS * 2;
            for (int64_t e = 0; e < E; e += 2) std::memcpy(out + e * ROWS, &row[e], 4);
        }
    }
}

// Convert tokens to bfloat16, [N / 16, E / 32, 16, 32], with ones for the bias.
void amx_pack_tokens(const float* x, int64_t N, int64_t D, int64_t E, int64_t threads, uint16_t* packed) {
    using namespace amx;
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint16_t> row(E, rounded(1.0f));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            for (int64_t d = 0; d < D; d++) row[d] = rounded(x[n * D + d]);
            uint16_t* const out = packed + n / ROWS * ROWS * E + n % ROWS * DEEP;
            for (int64_t e = 0; e < E; e += DEEP) std::memcpy(out + e * ROWS, &row[e], 2 * DEEP);
        }
    }
}

// The k largest scores of each token and their latents, largest first if `in_order`. `x` and `W` are packed as above.
void amx_topk(const uint16_t* x, const uint16_t* W, int64_t N, int64_t M, int64_t E, int64_t k, bool in_order,
              int64_t threads, float* values, int64_t* latents) {
    using namespace amx;
    const int64_t tokens = std::clamp(whole((N + threads - 1) / threads, SIDE), SIDE, TOKENS);
    const int64_t lines = (SIDE * SIDE + tokens - 1) / tokens;  // cache lines to prefetch with each pair of tiles
#pragma omp parallel num_threads(threads)
    {
        Config before, config;
        _tile_storeconfig(&before);  // oneDNN's configuration: it uses the same threads
        memory_is_up_to_date();
        _tile_loadconfig(&config);
        std::vector<Best> best(tokens, Best(k));
        std::vector<std::pair<int32_t, int32_t>> found(k);
        float* const scores = static_cast<float*>(std::aligned_alloc(64, tokens * STRIDE * sizeof(float)));
#pragma omp for schedule(dynamic, 1)
        for (int64_t start = 0; start < N; start += tokens) {
            const int64_t end = std::min(N, start + tokens);
            for (Best& each : best) each.forget();
            for (int64_t slab = 0; slab < M; slab += SLAB) {
                const int64_t last = std::min(M, slab + SLAB);
                for (int64_t m = slab; m < last; m += SIDE)
                    for (int64_t n = start; n < end; n += SIDE) {
                        const uint16_t* const coming = W + (m + SIDE) * E + (n - start) / SIDE * E * lines;
                        products(x + n * E, W + m * E, E, coming, lines, scores + (n - start) * STRIDE + m - slab);
                    }
                for (int64_t n = start; n < end; n++) best[n - start].take(scores + (n - start) * STRIDE, slab, last - slab);
            }
            for (int64_t n = start; n < end; n++) {
                Best& own = best[n - start];
                own.reduce(k + k / 2);
                own.reduce(k);
                for (int64_t i = 0; i < k; i++) found[i] = {-own.keys[i], own.latents[i]};
                if (in_order) std::sort(found.begin(), found.end());
                for (int64_t i = 0; i < k; i++) {
                    values[n * k + i] = number_of(-found[i].first);
                    latents[n * k + i] = found[i].second;
                }
            }
        }
        std::free(scores);
        memory_is_up_to_date();
        _tile_loadconfig(&before);
    }
}

}  // extern "C"
