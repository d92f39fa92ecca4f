// What queries see of a signal, E[psi(t)]^T B, without a matrix of queries x functions in device memory.
//
// A block takes QUERIES queries and COLUMNS columns of B. The expectations of DEPTH functions at a time are made in
// shared memory, each once, and multiplied there with DEPTH rows of B; the sums stay in registers.

constexpr int QUERIES = 32, COLUMNS = 64, DEPTH = 32, THREADS = 128;

template <typename Real>
__device__ Real inside(Real mean, Real deviation) {  // mass of a normal distribution inside [0, 1]
    Real scale = Real(0.70710678118654752440) / deviation;
    return Real(0.5) * (erf((1 - mean) * scale) + erf(mean * scale));
}

// E[psi] for psi a normal density about `center` of deviation `width`, and t normal; or cut to [0, 1], where `share`,
// the normal's mass inside, is above 0.
template <typename Real>
__device__ Real expectation(Real mean, Real variance, Real share, Real center, Real width) {
    Real sum = variance + width * width, off = mean - center;
    Real seen = exp(Real(-0.5) * off * off / sum) / sqrt(Real(6.28318530717958647693) * sum);
    if (!(share > 0)) return seen;
    Real part = variance / sum;
    return seen * inside(center * part + mean * (1 - part), width * sqrt(part)) / share;
}

template <typename Real>
__device__ void expect(const Real* B, const Real* mean, const Real* variance, const Real* centers, const Real* widths,
                       Real* out, int q, int functions, int e, int truncated, long long B_batch) {
    __shared__ Real psi[DEPTH][QUERIES + 1], rows[DEPTH][COLUMNS];
    __shared__ Real m[QUERIES], v[QUERIES], share[QUERIES];
    const int t = threadIdx.x, row = t / 16 * 4, column = t % 16;  // sums: queries row + i, columns column + 16 j
    const int first_query = blockIdx.x * QUERIES, first_column = blockIdx.y * COLUMNS, batch = blockIdx.z;
    B += batch * B_batch;
    if (t < QUERIES) {
        long long query = (long long)batch * q + min(first_query + t, q - 1);
        m[t] = mean[query], v[t] = variance[query];
        share[t] = truncated ? inside(m[t], sqrt(v[t])) : Real(0);
    }
    Real sums[4][4] = {};
    for (int depth = 0; depth < functions; depth += DEPTH) {
        __syncthreads();  // means are there; the chunk before has been used
        for (int i = t; i < DEPTH * QUERIES; i += THREADS) {
            int c = i / QUERIES, r = i % QUERIES, j = depth + c;
            psi[c][r] = j < functions ? expectation(m[r], v[r], share[r], centers[j], widths[j]) : Real(0);
        }
        for (int i = t; i < DEPTH * COLUMNS; i += THREADS) {
            int c = i / COLUMNS, x = first_column + i % COLUMNS;
            rows[c][i % COLUMNS] = depth + c < functions && x < e ? B[(long long)(depth + c) * e + x] : Real(0);
        }
        __syncthreads();
        for (int c = 0; c < DEPTH; c++)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) sums[i][j] += psi[c][row + i] * rows[c][column + 16 * j];
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            int query = first_query + row + i, x = first_column + column + 16 * j;
            if (query < q && x < e) out[((long long)batch * q + query) * e + x] = sums[i][j];
        }
}

#define EXPECT(Real, suffix)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
    expect_##suffix(const Real* B, const Real* mean, const Real* variance, const Real* centers, const Real* widths,  \
                    Real* out, int q, int functions, int e, int truncated, long long B_batch) {                      \
        expect(B, mean, variance, centers, widths, out, q, functions, e, truncated, B_batch);                        \
    }

EXPECT(float, float32)
EXPECT(double, float64)
