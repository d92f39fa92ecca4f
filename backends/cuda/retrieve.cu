// Exact top-k in float32: every key is scored, and no score leaves the block that made it.
//
// retrieve_*     A block takes QUERIES queries and a run of keys, newest first, a tile of KEYS at a time. Scores live in
//                registers; one that beats its query's threshold, the k-th best so far, joins the query's candidates in
//                shared memory. Where the next tile might overflow them, a warp sorts them, keeps the best k, and
//                raises the threshold. So a key is read once for QUERIES queries, and k numbers a query and run are
//                written.
// merge_runs     A warp takes the candidates of all runs of one query, and keeps the best k.
//
// Each score is summed in the order of the components, whatever the shape of the call: equal keys score equally.

#include "candidates.cuh"

constexpr int QUERIES = 32, KEYS = FRESH, DEPTH = 32, THREADS = 128;
constexpr int ROOM = LIST;  // candidates of a query: those kept, and a tile's worth of new ones

// One more component of a score: of the product q·k, or of -|q-k|², which cancels nothing.
template <bool squared>
__device__ float with(float score, float q, float k) {
    float difference = q - k;
    return squared ? fmaf(-difference, difference, score) : fmaf(q, k, score);
}

template <bool squared>
__device__ void retrieve(const float* queries, const float* keys, const unsigned char* mask, Candidate* found, int q,
                         int n, int d, int k, int start, int length, long long key_batch, long long mask_batch,
                         long long mask_query, long long mask_key) {
    __shared__ float Q[DEPTH][QUERIES + 1], K[DEPTH][KEYS + 1];  // one more: rows begin in different banks
    __shared__ Candidate candidates[QUERIES][ROOM], threshold[QUERIES];
    __shared__ int count[QUERIES];

    const int t = threadIdx.x, lane = t % WARP, warp = t / WARP;
    const int row = t / 16 * 4, column = t % 16;  // this thread's scores: queries row + i, keys column + 16 j
    const int first_query = blockIdx.x * QUERIES, run = blockIdx.y, batch = blockIdx.z;
    const int first = run * length, last = min(first + length, n);  // positions: the oldest key has 0
    queries += ((long long)batch * q + first_query) * d;
    keys += batch * key_batch;
    const int here = min(QUERIES, q - first_query);  // queries of this block

    if (t < QUERIES) count[t] = 0, threshold[t] = 0;

    for (int base = last - KEYS; base > first - KEYS; base -= KEYS) {  // the tile of positions base .. base + KEYS - 1
        float scores[4][4] = {};
        for (int depth = 0; depth < d; depth += DEPTH) {
            __syncthreads();  // the chunk before has been used
            for (int i = t; i < QUERIES * DEPTH; i += THREADS) {
                int r = i / DEPTH, c = i % DEPTH;
                Q[c][r] = r < here && depth + c < d ? queries[(long long)r * d + depth + c] : 0;
            }
            for (int i = t; i < KEYS * DEPTH; i += THREADS) {
                int r = i / DEPTH, c = i % DEPTH, position = base + r;
                int slot = position + start < n ? position + start : position + start - n;
                K[c][r] = position >= first && depth + c < d ? keys[(long long)slot * d + depth + c] : 0;
            }
            __syncthreads();
            for (int c = 0; c < DEPTH; c++) {
                float a[4], b[4];
                for (int i = 0; i < 4; i++) a[i] = Q[c][row + i], b[i] = K[c][column + 16 * i];
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++) scores[i][j] = with<squared>(scores[i][j], a[i], b[j]);
            }
        }
        __syncthreads();  // thresholds and counts are those of the last settling
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) {
                int query = row + i, position = base + column + 16 * j;
                if (query >= here || position < first || !(scores[i][j] > NOTHING)) continue;
                Candidate c = candidate(scores[i][j], position);
                if (c <= threshold[query]) continue;
                if (mask && !mask[batch * mask_batch + (first_query + query) * mask_query + position * mask_key]) continue;
                candidates[query][atomicAdd(&count[query], 1)] = c;
            }
        __syncthreads();
        for (int query = warp; query < here; query += THREADS / WARP) {
            int stored = count[query];
            if (stored <= ROOM - KEYS) continue;
            Candidate least = settle(candidates[query], stored, k, lane);
            if (lane == 0) count[query] = min(stored, k), threshold[query] = least;
        }
    }
    __syncthreads();
    for (int query = warp; query < here; query += THREADS / WARP) {
        settle(candidates[query], count[query], k, lane);
        Candidate* out = found + (((long long)batch * q + first_query + query) * gridDim.y + run) * k;
        for (int i = lane; i < k; i += WARP) out[i] = candidates[query][i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
retrieve_products(const float* queries, const float* keys, const unsigned char* mask, Candidate* found, int q, int n,
                  int d, int k, int start, int length, long long key_batch, long long mask_batch, long long mask_query,
                  long long mask_key) {
    retrieve<false>(queries, keys, mask, found, q, n, d, k, start, length, key_batch, mask_batch, mask_query, mask_key);
}

extern "C" __global__ void __launch_bounds__(THREADS)
retrieve_distances(const float* queries, const float* keys, const unsigned char* mask, Candidate* found, int q, int n,
                   int d, int k, int start, int length, long long key_batch, long long mask_batch, long long mask_query,
                   long long mask_key) {
    retrieve<true>(queries, keys, mask, found, q, n, d, k, start, length, key_batch, mask_batch, mask_query, mask_key);
}

extern "C" __global__ void __launch_bounds__(THREADS)
merge_runs(const Candidate* found, float* scores, long long* positions, long long queries, int runs, int k) {
    __shared__ Candidate candidates[THREADS / WARP][ROOM];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const long long query = (long long)blockIdx.x * (THREADS / WARP) + warp;
    if (query >= queries) return;  // the whole warp leaves, and warps do not wait for one another
    Candidate* best = candidates[warp];
    found += query * runs * k;
    int kept = 0;
    for (int begin = 0; begin < runs * k; begin += KEYS) {
        int taken = min(KEYS, runs * k - begin);
        for (int i = lane; i < taken; i += WARP) best[kept + i] = found[begin + i];
        __syncwarp();
        settle(best, kept + taken, k, lane);
        kept = k;
    }
    write_out(best, scores + query * k, positions + query * k, k, lane);
}
