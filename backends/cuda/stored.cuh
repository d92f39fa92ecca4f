// Vectors as they are stored, in float32, bfloat16, float16 or int8 with a scale a vector: read as float32 numbers.

struct Brain {
    unsigned short bits;  // the upper half of a float
};
struct Half {
    unsigned short bits;
};
typedef signed char Code;

#ifndef HALF_AS_FLOAT  // tests that run this on a CPU bring their own
__device__ float half_as_float(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
#endif

__device__ float plain(float x) { return x; }
__device__ float plain(Brain x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ float plain(Half x) { return half_as_float(x.bits); }
__device__ float plain(Code x) { return x; }

template <typename Stored>
struct alignas(4 * sizeof(Stored)) Four {  // that are read at once
    Stored x[4];
};

// Vectors (n, d), a ring: the one at position p, the oldest being 0, stands in slot p + start, less n where that is n or
// more.
template <typename Stored>
struct Ring {
    const Stored* vectors;
    const float* scales;  // one a vector, or null
    int n, d, start;
};

template <typename Stored>
__device__ long long slot_of(const Ring<Stored>& ring, int position) {
    long long slot = (long long)position + ring.start;
    return slot < ring.n ? slot : slot - ring.n;
}

// Components c .. c + 3 of the vector in a slot; zeros beyond d.
template <typename Stored>
__device__ void four(const Ring<Stored>& ring, long long slot, int c, float (&out)[4]) {
    const Stored* at = ring.vectors + slot * ring.d + c;
    float scale = ring.scales ? ring.scales[slot] : 1.0f;
    if (c + 4 <= ring.d && (size_t)at % sizeof(Four<Stored>) == 0) {
        Four<Stored> whole = *(const Four<Stored>*)at;
        for (int i = 0; i < 4; i++) out[i] = plain(whole.x[i]) * scale;
    } else {
        for (int i = 0; i < 4; i++) out[i] = c + i < ring.d ? plain(at[i]) * scale : 0.0f;
    }
}

// The product with a query, summed in the order of the components, as retrieve.cu does.
template <typename Stored>
__device__ __noinline__ float full_score(const Ring<Stored>& ring, const float* query, int position) {
    const long long slot = slot_of(ring, position);
    float sum = 0, x[4];
#pragma unroll 4
    for (int c = 0; c < ring.d; c += 4) {
        four(ring, slot, c, x);
        for (int i = 0; i < 4; i++)
            if (c + i < ring.d) sum = fmaf(query[c + i], x[i], sum);
    }
    return sum;
}
