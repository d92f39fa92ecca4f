// Where queries looked: the mass of their densities between neighbouring edges, summed over queries.
//
// A block takes one batch and a run of queries; a thread has a bin, or several. Blocks write sums of their own, which
// are added in a fixed order afterwards: the result is the same in every run.

constexpr int THREADS = 128;
enum Density { TRUNCATED_GAUSSIAN, GAUSSIAN, SPARSEMAX, BIWEIGHT };

// Mass below an edge, but for a constant that differences lose. `unit` is sqrt(2 s²) or the half-width a.
template <typename Real>
__device__ Real below(Real edge, Real mean, Real unit, int density) {
    Real u = (edge - mean) / unit;
    if (density <= GAUSSIAN) return Real(0.5) * erf(u);
    u = u < -1 ? Real(-1) : u > 1 ? Real(1) : u;
    if (density == SPARSEMAX) return u * (Real(0.75) - u * u / 4);
    return u * (Real(0.9375) + u * u * (Real(-0.625) + u * u * Real(0.1875)));
}

template <typename Real>
__device__ void histogram(const Real* mean, const Real* variance, const Real* edges, Real* sums, int q, int bins,
                          int length, int density) {
    const int run = blockIdx.x, batch = blockIdx.y;
    mean += (long long)batch * q, variance += (long long)batch * q;
    sums += ((long long)batch * gridDim.x + run) * bins;
    const int last = min((run + 1) * length, q);
    for (int bin = threadIdx.x; bin < bins; bin += THREADS) {
        Real sum = 0;
        for (int i = run * length; i < last; i++) {
            Real m = mean[i], s2 = variance[i], unit, whole = 1;
            if (density == SPARSEMAX) unit = cbrt(Real(1.5) * s2);
            else if (density == BIWEIGHT) unit = pow(15 * s2 * s2, Real(0.2));
            else unit = sqrt(2 * s2);
            if (density == TRUNCATED_GAUSSIAN) whole = Real(0.5) * (erf((1 - m) / unit) + erf(m / unit));
            sum += (below(edges[bin + 1], m, unit, density) - below(edges[bin], m, unit, density)) / whole;
        }
        sums[bin] = sum;
    }
}

#define HISTOGRAM(Real, suffix)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
    histogram_##suffix(const Real* mean, const Real* variance, const Real* edges, Real* sums, int q, int bins,       \
                       int length, int density) {                                                                    \
        histogram(mean, variance, edges, sums, q, bins, length, density);                                            \
    }

HISTOGRAM(float, float32)
HISTOGRAM(double, float64)
