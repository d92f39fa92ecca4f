// Exact top-k in float32 behind a first pass on tensor cores: what cannot be among the k best is never scored in full.
//
// Queries q and keys k are rounded to bfloat16, q' and k'. By Cauchy-Schwarz
//     |q·k - q'·k'|  <=  |q| |k - k'| + |q - q'| |k'|,
// so the product of the rounded ones lies within a band about the score, for all keys no longer than the longest yet.
//
// certify_*     A block takes `queries` of them and a run of keys, newest first, a tile of KEYS at a time. The tile is
//               multiplied by warps, each a part of it, and its products sifted: one that is more than a band below a
//               score that k keys are sure to reach, `least`, is dropped, and the others join the query's candidates.
//               Where the next tile might overflow them, a warp settles them: it raises `least`, for the other runs as
//               well, and drops what fell below. Where the band tells too few apart, it scores them in full.
// finish_*      A warp takes the candidates of all runs of one query, scores in full those that may still be among the
//               best, and keeps k.
//
// The result is that of scoring every key in float32, ties included: what is dropped is below k others for certain.

#include "candidates.cuh"
#include "stored.cuh"

constexpr int KEYS = FRESH, THREADS = 256, WARPS = THREADS / WARP;
constexpr int ROOM = 192, SHARE = ROOM / WARP;  // candidates of a query and run, and how many of them a lane holds
constexpr int FULL = 96;                        // candidates left by a settling that has told too few apart
constexpr unsigned ALL = 0xffffffffu;
constexpr float ROUNDED = 1.0f / 256;         // of a number to bfloat16, at most
constexpr float SLACK = 1.0f / (1 << 20);     // of sums, a component: of float32, and of what tensor cores make of it
constexpr float FAINT = 1.0f / (1ull << 59);  // norms that may vanish where squares underflow
constexpr float WIDEST = 1e30f;               // band; a wider one, of NaN or infinity, tells nothing apart

// ---- the tile: 16 x 8 products of 16 components by a warp ------------------------------------------------------------

#ifndef TENSOR_CORES  // tests that run this on a CPU bring their own
// Of lane 4 g + t, a: components 2t, 2t+1 of rows g and g+8, then 2t+8, 2t+9 of both; b: the same of column g; sums: rows
// g and g+8 of columns 2t, 2t+1.
__device__ void multiply(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two numbers rounded to bfloat16 in one word.
__device__ unsigned rounded(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
#endif

// ---- the band --------------------------------------------------------------------------------------------------------

__device__ float norm(float square) { return sqrtf(square) * 1.001f + FAINT; }

// How far from the score a product is at most, for keys of that square or less; infinite where nothing is sure.
__device__ float band(float reach, float square) {
    float wide = reach * norm(square);
    return wide < WIDEST ? wide : -NOTHING;
}

// What is a band below a score; never NaN.
__device__ float below(float score, float wide) {
    float edge = score - wide;
    return edge > NOTHING ? edge : NOTHING;
}

// The sum over the lanes that share a vector.
template <int LANES>
__device__ float total(float x) {
    for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
    return x;
}

// ---- settling a query's candidates, by a warp ------------------------------------------------------------------------

// The largest number that at least k of the warp's reach; 0 where there are fewer above 0.
template <typename Word>
__device__ Word kth(const Word (&own)[SHARE], int k) {
    Word found = 0;
#pragma unroll 1
    for (Word bit = Word(1) << (8 * sizeof(Word) - 1); bit > 0; bit >>= 1) {
        int count = 0;
        for (int i = 0; i < SHARE; i++) count += __popc(__ballot_sync(ALL, own[i] >= (found | bit)));
        if (count >= k) found |= bit;
    }
    return found;
}

__device__ void take(Candidate (&own)[SHARE], const Candidate* list, int count, int lane) {
    __syncwarp();
    for (int i = 0; i < SHARE; i++) own[i] = i * WARP + lane < count ? list[i * WARP + lane] : 0;
    __syncwarp();
}

// Leaves of the warp's candidates, taken before, those from `least` up; returns how many.
__device__ int keep(Candidate* list, const Candidate (&own)[SHARE], Candidate least, int lane) {
    int kept = 0;
    for (int i = 0; i < SHARE; i++) {
        bool stays = own[i] != 0 && own[i] >= least;
        unsigned votes = __ballot_sync(ALL, stays);
        if (stays) list[kept + __popc(votes & ((1u << lane) - 1))] = own[i];
        kept += __popc(votes);
    }
    return kept;
}

// What k keys of the query are sure to reach: the most that any run knows, this one's `known` included.
__device__ unsigned agreed(unsigned* sure, unsigned known, int lane) {
    unsigned others = lane == 0 ? atomicMax(sure, known) : 0;
    return max(__shfl_sync(ALL, others, 0), known);
}

// Drops candidates; returns how many are left, and what k keys are sure to reach.
template <typename Stored>
__device__ __noinline__ int settle(Candidate* list, int count, const Ring<Stored>& keys, const float* query, int k, float wide,
                      unsigned* sure, float& least, int lane) {
    Candidate own[SHARE];
    unsigned scores[SHARE];
    take(own, list, count, lane);
    for (int i = 0; i < SHARE; i++) scores[i] = (unsigned)(own[i] >> 32);
    unsigned best = kth(scores, k), known = agreed(sure, best ? ordered(below(number(best), wide)) : 0, lane);
    least = known ? number(known) : NOTHING;
    count = keep(list, own, (Candidate)ordered(below(least, wide)) << 32, lane);
    if (count <= FULL) return count;
    take(own, list, count, lane);  // the band is no help: an exact score lies within any band, too
    for (int i = 0; i < SHARE; i++) {
        float score = own[i] ? full_score(keys, query, (int)own[i]) : NOTHING;
        own[i] = score > NOTHING ? candidate(score, (int)own[i]) : 0;
    }
    Candidate last = kth(own, k);
    known = agreed(sure, (unsigned)(last >> 32), lane);
    least = known ? number(known) : NOTHING;
    return keep(list, own, last, lane);
}

// ---- the scan --------------------------------------------------------------------------------------------------------

// `batch_`: elements from one batch to the next. found (batch, q, runs, ROOM), counts and bands (batch, q, runs), sure
// (batch, q), zeros at first.
template <int DEPTH, typename Stored>
__device__ void certify(const float* queries, Ring<Stored> keys, const unsigned char* mask, Candidate* found,
                        int* counts, float* bands, unsigned* sure, int q, int k, int length, long long key_batch,
                        long long scale_batch, long long mask_batch, long long mask_query, long long mask_key) {
    constexpr int QUERIES = 128 * 64 / DEPTH, WORDS = DEPTH / 2, LANES = DEPTH / 4;  // lanes share a vector
    constexpr int DOWN = 32, ACROSS = KEYS * (QUERIES / DOWN) / WARPS;               // a warp's queries and keys
    __shared__ unsigned Q[QUERIES][WORDS + 4], K[KEYS][WORDS + 4];  // four more: eight rows lie in different banks
    __shared__ float reach[QUERIES], least[QUERIES];
    __shared__ int count[QUERIES];
    __shared__ unsigned longest;  // of keys, its square; floats of one sign compare as their bits do

    const int t = threadIdx.x, lane = t % WARP, warp = t / WARP, group = lane / 4, pair = lane % 4;
    const int row = warp % (QUERIES / DOWN) * DOWN, column = warp / (QUERIES / DOWN) * ACROSS;
    const int first_query = blockIdx.x * QUERIES, run = blockIdx.y, batch = blockIdx.z;
    const int first = run * length, last = min(first + length, keys.n);
    const int here = min(QUERIES, q - first_query);
    const long long number_of_first = (long long)batch * q + first_query;
    queries += number_of_first * keys.d, sure += number_of_first;
    found += (number_of_first * gridDim.y + run) * ROOM;  // this run's, of the first query
    const long long apart = (long long)gridDim.y * ROOM;
    keys.vectors += batch * key_batch;
    if (keys.scales) keys.scales += batch * scale_batch;

    const Ring<float> asked = {queries, nullptr, here, keys.d, 0};
#pragma unroll 1
    for (int i = t; i < QUERIES * LANES; i += THREADS) {
        int r = i / LANES, c = i % LANES * 4;
        float x[4] = {};
        if (r < here && c < keys.d) four(asked, r, c, x);
        Q[r][c / 2] = rounded(x[0], x[1]), Q[r][c / 2 + 1] = rounded(x[2], x[3]);
        float square = total<LANES>(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3]);
        if (i % LANES == 0) {
            reach[r] = norm(square) * (2.01f * ROUNDED + SLACK * (DEPTH + 16));
            least[r] = r < here && sure[r] ? number(sure[r]) : NOTHING, count[r] = 0;
        }
    }
    if (t == 0) longest = 0;

    constexpr int AHEAD = KEYS * LANES / THREADS;  // the next tile is on its way while one is worked on
    float ahead[AHEAD][4];
    auto fetch = [&](int base) {
        for (int s = 0; s < AHEAD; s++) {
            int i = s * THREADS + t, position = base + i / LANES, c = i % LANES * 4;
            for (int j = 0; j < 4; j++) ahead[s][j] = 0;
            if (position >= first && c < keys.d) four(keys, slot_of(keys, position), c, ahead[s]);
        }
    };
    fetch(last - KEYS);
    float square = 0;  // the largest of a key yet
    __syncthreads();   // queries are there, and `longest` is 0
    for (int base = last - KEYS; base > first - KEYS; base -= KEYS) {  // positions base .. base + KEYS - 1
        for (int s = 0; s < AHEAD; s++) {
            int i = s * THREADS + t, r = i / LANES, c = i % LANES * 2;
            const float* x = ahead[s];
            K[r][c] = rounded(x[0], x[1]), K[r][c + 1] = rounded(x[2], x[3]);
            float own = total<LANES>(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3]);
            if (i % LANES == 0) atomicMax(&longest, __float_as_uint(own));
        }
        __syncthreads();  // the tile is there, and what settling left of the one before
        square = __uint_as_float(longest);
        fetch(base - KEYS);

        float sums[DOWN / 16][ACROSS / 8][4] = {};
        for (int w = 0; w < WORDS; w += 8) {
            unsigned a[DOWN / 16][4], b[ACROSS / 8][2];
            for (int m = 0; m < DOWN / 16; m++)
                for (int i = 0; i < 4; i++) a[m][i] = Q[row + 16 * m + 8 * (i % 2) + group][w + 4 * (i / 2) + pair];
            for (int n = 0; n < ACROSS / 8; n++)
                for (int i = 0; i < 2; i++) b[n][i] = K[column + 8 * n + group][w + 4 * i + pair];
            for (int m = 0; m < DOWN / 16; m++)
                for (int n = 0; n < ACROSS / 8; n++) multiply(sums[m][n], a[m], b[n]);
        }
        for (int m = 0; m < DOWN / 16; m++)
            for (int half = 0; half < 2; half++) {
                const int query = row + 16 * m + 8 * half + group;
                const float wide = band(reach[query], square), edge = below(least[query], wide);
                for (int n = 0; n < ACROSS / 8; n++)
                    for (int i = 0; i < 2; i++) {
                        const float product = sums[m][n][2 * half + i];
                        const int position = base + column + 8 * n + 2 * pair + i;
                        if (product < edge || query >= here || position < first) continue;  // NaN is below nothing
                        if (mask && !mask[batch * mask_batch + (first_query + query) * mask_query + position * mask_key])
                            continue;
                        found[query * apart + atomicAdd(&count[query], 1)] =
                            candidate(wide < WIDEST ? product : 0.0f, position);
                    }
            }
        __syncthreads();  // the tile has been used, and all candidates are there
        for (int query = warp; query < here; query += WARPS) {
            const int stored = count[query];
            if (stored <= ROOM - KEYS) continue;
            float reached;
            int left = settle(found + query * apart, stored, keys, queries + (long long)query * keys.d, k,
                              band(reach[query], square), sure + query, reached, lane);
            if (lane == 0) count[query] = left, least[query] = reached;
        }
    }
    __syncthreads();
    for (int query = warp; query < here; query += WARPS) {
        const float wide = band(reach[query], square);
        float reached;
        int left = settle(found + query * apart, count[query], keys, queries + (long long)query * keys.d, k, wide,
                          sure + query, reached, lane);
        if (lane == 0) {
            const long long place = (number_of_first + query) * gridDim.y + run;
            counts[place] = left, bands[place] = wide;
        }
    }
}

// ---- the end ---------------------------------------------------------------------------------------------------------

template <typename Stored>
__device__ void finish(const float* queries, Ring<Stored> keys, const Candidate* found, const int* counts,
                       const float* bands, const unsigned* sure, float* scores, long long* positions, long long all,
                       int per_batch, int runs, int k, long long key_batch, long long scale_batch) {
    __shared__ Candidate lists[WARPS][LIST];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const long long query = (long long)blockIdx.x * WARPS + warp, batch = query / per_batch;
    if (query >= all) return;  // the whole warp leaves, and warps do not wait for one another
    Candidate* list = lists[warp];
    keys.vectors += batch * key_batch, queries += query * keys.d;
    if (keys.scales) keys.scales += batch * scale_batch;
    unsigned least = sure[query];
    int kept = 0;
    for (int run = 0; run < runs; run++) {
        const long long place = query * runs + run;
        for (int begin = 0; begin < counts[place]; begin += WARP) {
            Candidate c = begin + lane < counts[place] ? found[place * ROOM + begin + lane] : 0;
            if (c != 0 && ordered(score_of(c) + bands[place]) >= least) {
                float score = full_score(keys, queries, (int)c);
                c = score > NOTHING ? candidate(score, (int)c) : 0;
            } else {
                c = 0;
            }
            bool stays = c != 0 && (unsigned)(c >> 32) >= least;
            unsigned votes = __ballot_sync(ALL, stays);
            if (stays) list[kept + __popc(votes & ((1u << lane) - 1))] = c;
            kept += __popc(votes);
            if (kept <= LIST - WARP) continue;
            __syncwarp();
            least = max(least, (unsigned)(settle(list, kept, k, lane) >> 32));
            kept = min(kept, k);
            __syncwarp();
        }
    }
    __syncwarp();
    settle(list, kept, k, lane);
    write_out(list, scores + query * k, positions + query * k, k, lane);
}

#define CERTIFY_KERNEL(DEPTH, Stored, suffix)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
    certify_##DEPTH##_##suffix(const float* queries, const Stored* keys, const float* scales,                          \
                               const unsigned char* mask, Candidate* found, int* counts, float* bands,                 \
                               unsigned* sure, int q, int n, int d, int k, int start, int length,                      \
                               long long key_batch, long long scale_batch, long long mask_batch,                       \
                               long long mask_query, long long mask_key) {                                             \
        certify<DEPTH, Stored>(queries, {keys, scales, n, d, start}, mask, found, counts, bands, sure, q, k, length,   \
                               key_batch, scale_batch, mask_batch, mask_query, mask_key);                              \
    }

#define CERTIFY(Stored, suffix)                                                                                       \
    CERTIFY_KERNEL(64, Stored, suffix)                                                                                 \
    CERTIFY_KERNEL(128, Stored, suffix)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
    finish_##suffix(const float* queries, const Stored* keys, const float* scales, const Candidate* found,             \
                    const int* counts, const float* bands, const unsigned* sure, float* scores, long long* positions,  \
                    long long all, int per_batch, int n, int d, int k, int start, int runs, long long key_batch,       \
                    long long scale_batch) {                                                                           \
        finish<Stored>(queries, {keys, scales, n, d, start}, found, counts, bands, sure, scores, positions, all,       \
                       per_batch, runs, k, key_batch, scale_batch);                                                    \
    }
