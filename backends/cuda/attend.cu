// Attention of each query over its own neighbours, forward and backward: a warp takes a query.
//
// The neighbours' keys and values are read where they stand; nothing of size queries x k x d is ever stored. Lanes share
// the components of a vector, so a warp reads each vector in one sweep.

constexpr int WARP = 32, WARPS = 4, MOST = 256;  // the most neighbours a query has
constexpr unsigned ALL = 0xffffffffu;
#define NOTHING __uint_as_float(0xff800000u)  // -infinity, the log-sum-exp of no scores

template <typename Real>
__device__ Real total(Real x) {  // the sum over the lanes, in every lane
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
    return x;
}

template <typename Real>
__device__ Real dot(const Real* a, const Real* b, int length, int lane) {
    Real sum = 0;
    for (int c = lane; c < length; c += WARP) sum += a[c] * b[c];
    return total(sum);
}

// Slots of a query's k neighbours, -1 where there is none, as outside of the keys, and the softmax of their scores; returns its log-sum-exp.
template <typename Real>
__device__ Real weigh(const Real* query, const Real* keys, const long long* positions, Real* weights, int* slots, int n,
                      int d, int k, int start, Real scale, int lane) {
    for (int j = lane; j < k; j += WARP) {
        long long slot = positions[j] + start;
        slots[j] = positions[j] < 0 || positions[j] >= n ? -1 : (int)(slot < n ? slot : slot - n);
    }
    __syncwarp();
    Real top = NOTHING;
    for (int j = 0; j < k; j++) {
        if (slots[j] < 0) continue;  // for all lanes alike; what no query may see is not even read
        Real score = scale * dot(query, keys + (long long)slots[j] * d, d, lane);
        if (lane == 0) weights[j] = score;
        top = score > top ? score : top;
    }
    __syncwarp();
    Real sum = 0;
    for (int j = lane; j < k; j += WARP) {
        weights[j] = slots[j] < 0 ? Real(0) : exp(weights[j] - top);
        sum += weights[j];
    }
    sum = total(sum);
    for (int j = lane; j < k; j += WARP) weights[j] /= sum > 0 ? sum : Real(1);
    __syncwarp();
    return sum > 0 ? top + log(sum) : NOTHING;
}

// One query of `queries` in all, `per_batch` of which share keys and values; _batch: elements from one batch's to the next.
template <typename Real>
__device__ void forward(const Real* queries, const Real* keys, const Real* values, const long long* positions,
                        Real* output, Real* lse, long long all, int per_batch, int n, int d, int dv, int k, int start,
                        long long key_batch, long long value_batch, Real scale) {
    __shared__ Real weights[WARPS][MOST];
    __shared__ int slots[WARPS][MOST];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const long long query = (long long)blockIdx.x * WARPS + warp, batch = query / per_batch;
    if (query >= all) return;  // the whole warp leaves, and warps do not wait for one another
    values += batch * value_batch;
    Real logarithm = weigh(queries + query * d, keys + batch * key_batch, positions + query * k, weights[warp],
                           slots[warp], n, d, k, start, scale, lane);
    if (lane == 0) lse[query] = logarithm;
    for (int c = lane; c < dv; c += WARP) {
        Real sum = 0;
        for (int j = 0; j < k; j++)
            if (slots[warp][j] >= 0) sum += weights[warp][j] * values[(long long)slots[warp][j] * dv + c];
        output[query * dv + c] = sum;
    }
}

// From gradients of output and lse to those of queries, and where they are not null, of keys and values (added to what
// is there, in no fixed order: sums of several queries may differ in the last bit from run to run).
//   dscore_j = w_j (doutput·v_j - doutput·output + dlse),  dq = scale sum_j dscore_j k_j,  dk_j += scale dscore_j q,
//   dv_j += w_j doutput
template <typename Real>
__device__ void backward(const Real* queries, const Real* keys, const Real* values, const long long* positions,
                         const Real* output, const Real* doutput, const Real* dlse, Real* dqueries, Real* dkeys,
                         Real* dvalues, long long all, int per_batch, int n, int d, int dv, int k, int start,
                         long long key_batch, long long value_batch, Real scale) {
    __shared__ Real weights[WARPS][MOST], dscores[WARPS][MOST];
    __shared__ int slots[WARPS][MOST];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const long long query = (long long)blockIdx.x * WARPS + warp, batch = query / per_batch;
    if (query >= all) return;
    queries += query * d, output += query * dv, doutput += query * dv;
    keys += batch * key_batch, values += batch * value_batch;
    weigh(queries, keys, positions + query * k, weights[warp], slots[warp], n, d, k, start, scale, lane);
    Real shared = dot(doutput, output, dv, lane) - dlse[query];
    for (int j = 0; j < k; j++) {
        if (slots[warp][j] < 0) continue;
        Real seen = dot(doutput, values + (long long)slots[warp][j] * dv, dv, lane);
        if (lane == 0) dscores[warp][j] = scale * weights[warp][j] * (seen - shared);
    }
    __syncwarp();
    for (int c = lane; c < d; c += WARP) {
        Real sum = 0;
        for (int j = 0; j < k; j++) {
            if (slots[warp][j] < 0) continue;
            sum += dscores[warp][j] * keys[(long long)slots[warp][j] * d + c];
            if (dkeys) atomicAdd(dkeys + batch * key_batch + (long long)slots[warp][j] * d + c, dscores[warp][j] * queries[c]);
        }
        dqueries[query * d + c] = sum;
    }
    if (!dvalues) return;
    for (int c = lane; c < dv; c += WARP)
        for (int j = 0; j < k; j++)
            if (slots[warp][j] >= 0)
                atomicAdd(dvalues + batch * value_batch + (long long)slots[warp][j] * dv + c, weights[warp][j] * doutput[c]);
}

#define ATTEND(Real, suffix)                                                                                          \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP)                                                         \
    attend_##suffix(const Real* queries, const Real* keys, const Real* values, const long long* positions,             \
                    Real* output, Real* lse, long long all, int per_batch, int n, int d, int dv, int k, int start,     \
                    long long key_batch, long long value_batch, Real scale) {                                          \
        forward(queries, keys, values, positions, output, lse, all, per_batch, n, d, dv, k, start, key_batch,          \
                value_batch, scale);                                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP)                                                         \
    attend_backward_##suffix(const Real* queries, const Real* keys, const Real* values, const long long* positions,    \
                             const Real* output, const Real* doutput, const Real* dlse, Real* dqueries, Real* dkeys,   \
                             Real* dvalues, long long all, int per_batch, int n, int d, int dv, int k, int start,      \
                             long long key_batch, long long value_batch, Real scale) {                                 \
        backward(queries, keys, values, positions, output, doutput, dlse, dqueries, dkeys, dvalues, all, per_batch,    \
                 n, d, dv, k, start, key_batch, value_batch, scale);                                                   \
    }

ATTEND(float, float32)
ATTEND(double, float64)
