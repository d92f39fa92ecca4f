// Vectors at norm 1; zero vectors stay zero. A warp takes a vector.
//
// Scaled by the largest component first, so that neither tiny nor huge norms lose their direction.

constexpr int WARP = 32, WARPS = 4;
constexpr unsigned ALL = 0xffffffffu;

template <typename Real>
__device__ void unit(const Real* vectors, Real* out, long long all, int d) {
    const int lane = threadIdx.x % WARP;
    const long long vector = (long long)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (vector >= all) return;  // the whole warp leaves
    vectors += vector * d, out += vector * d;
    Real largest = 0, square = 0;
    for (int c = lane; c < d; c += WARP) largest = fmax(largest, fabs(vectors[c]));
    for (int offset = WARP / 2; offset > 0; offset /= 2) largest = fmax(largest, __shfl_xor_sync(ALL, largest, offset));
    if (!(largest > 0)) largest = 1;
    for (int c = lane; c < d; c += WARP) {
        Real scaled = vectors[c] / largest;
        square += scaled * scaled;
    }
    for (int offset = WARP / 2; offset > 0; offset /= 2) square += __shfl_xor_sync(ALL, square, offset);
    Real norm = square > 0 ? sqrt(square) : Real(1);
    for (int c = lane; c < d; c += WARP) out[c] = vectors[c] / largest / norm;
}

#define UNIT(Real, suffix)                                                 \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP)              \
    unit_##suffix(const Real* vectors, Real* out, long long all, int d) {   \
        unit(vectors, out, all, d);                                         \
    }

UNIT(float, float32)
UNIT(double, float64)
