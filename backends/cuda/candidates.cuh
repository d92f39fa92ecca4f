// A score and a position in one number, and the best k of many.

typedef unsigned long long Candidate;  // compares as (score, position): the larger the better, 0 is none

constexpr int WARP = 32;
constexpr int MOST = 64;           // the largest k
constexpr int FRESH = 64;          // candidates that come at once, at most
constexpr int LIST = MOST + FRESH;  // a list that can be sorted: those kept, and fresh ones
#define NOTHING __uint_as_float(0xff800000u)  // -infinity, the score of no key

// The bits of a float, so that unsigned numbers compare as the floats do. +0 makes one zero of two.
__device__ unsigned ordered(float score) {
    unsigned bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float number(unsigned bits) { return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits); }

__device__ Candidate candidate(float score, int position) {
    return (Candidate)ordered(score) << 32 | (unsigned)position;
}

__device__ float score_of(Candidate c) { return number((unsigned)(c >> 32)); }

// Sorts a list, best first, by the lanes of one warp: a bitonic network, LIST / 2 exchanges a step.
__device__ void sort(Candidate* list, int lane) {
#pragma unroll 1
    for (int size = 2; size <= LIST; size *= 2)
#pragma unroll 1
        for (int stride = size / 2; stride > 0; stride /= 2) {
            for (int pair = lane; pair < LIST / 2; pair += WARP) {
                int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
                bool rising = (low & size) != 0;
                Candidate a = list[low], b = list[high];
                if ((a < b) != rising) list[low] = b, list[high] = a;
            }
            __syncwarp();
        }
}

// Puts the best of `count` candidates first, in order; returns the k-th, 0 where there are fewer.
__device__ Candidate settle(Candidate* list, int count, int k, int lane) {
    for (int i = count + lane; i < LIST; i += WARP) list[i] = 0;
    __syncwarp();
    sort(list, lane);
    return list[k - 1];
}

// Writes the k best of a sorted list as scores and positions.
__device__ void write_out(const Candidate* list, float* scores, long long* positions, int k, int lane) {
    for (int i = lane; i < k; i += WARP) {
        scores[i] = list[i] ? score_of(list[i]) : NOTHING;
        positions[i] = list[i] ? (long long)(list[i] & 0xffffffffu) : -1;
    }
}
