// Systematic resampling: positions on [0, 1] spread as the mass of a histogram is. A block takes a histogram.
//
// The cumulative mass is summed in the order of the bins, as the formula does, and read backwards by bisection.

constexpr int THREADS = 128, MOST = 1024;  // bins

template <typename Real>
__device__ void systematic(const Real* histogram, const Real* shift, Real* out, int bins, int samples) {
    __shared__ Real mass[MOST], ends[MOST];
    const int t = threadIdx.x;
    histogram += (long long)blockIdx.x * bins, out += (long long)blockIdx.x * samples;
    for (int i = t; i < bins; i += THREADS) mass[i] = histogram[i];
    __syncthreads();
    if (t == 0) {
        Real peak = 0, sum = 0;
        for (int i = 0; i < bins; i++) peak = mass[i] > peak ? mass[i] : peak;
        for (int i = 0; i < bins; i++) {
            mass[i] = peak > 0 ? mass[i] / peak : Real(1);  // no sum of it overflows
            ends[i] = sum += mass[i];
        }
    }
    __syncthreads();
    for (int m = t; m < samples; m += THREADS) {
        const Real wanted = (m + shift[blockIdx.x]) / samples * ends[bins - 1];
        int bin = 0, after = bins - 1;  // the bin is the number of ends, but the last, that are not above
        while (bin < after) {
            int middle = (bin + after) / 2;
            if (wanted >= ends[middle]) bin = middle + 1;
            else after = middle;
        }
        const Real width = mass[bin], inside = (wanted - (ends[bin] - width)) / (width > 0 ? width : Real(1));
        out[m] = (bin + (inside < 0 ? Real(0) : inside > 1 ? Real(1) : inside)) / bins;
    }
}

#define SYSTEMATIC(Real, suffix)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
    systematic_##suffix(const Real* histogram, const Real* shift, Real* out, int bins, int samples) {                  \
        systematic(histogram, shift, out, bins, samples);                                                              \
    }

SYSTEMATIC(float, float32)
SYSTEMATIC(double, float64)
