// Enough of CUDA to run a kernel on the CPU: a block's threads are fibers, which wait for one another at barriers.
//
// Between two barriers the fibers run one after the other, in an order drawn anew each time, and warps get ahead of one
// another as far as barriers let them: a kernel that relies on an
// order its barriers do not give goes wrong here. A barrier that some threads never reach is an error. What this cannot
// show: races inside one statement, memory models, alignment, limits of registers, and anything about time.

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__ static
#define __shared__ static
#define __launch_bounds__(...)
#define __noinline__

static int max(int a, int b) { return a > b ? a : b; }  // NVRTC has these by itself
static int min(int a, int b) { return a < b ? a : b; }
static unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum State { READY, AT_BLOCK, AT_WARP, DONE };
constexpr int WARP = 32;
constexpr size_t STACK = 64 * 1024;

struct Fiber {
    ucontext_t context;
    void* place[5];  // where it goes on, once begun: unlike swapcontext, a jump asks nothing of the system
    std::vector<char> stack;
    State state;
    bool begun;
    unsigned long long handed;  // to the other lanes
    const void* shown;          // likewise, something larger, until the warp has met again
};
static std::vector<Fiber> fibers;
static ucontext_t start;
static void* scheduler[5];
static unsigned running;
static void (*body)(void* call);
static void* call;

// Sanitizers take a jump for the end of frames that live on, and clear up after them at length.
#define JUMPS __attribute__((noinline, no_sanitize("address")))

JUMPS static void jump(void** to) { __builtin_longjmp(to, 1); }

JUMPS static void wait(State at) {
    fibers[running].state = at;
    if (!__builtin_setjmp(fibers[running].place)) jump(scheduler);
}

static void enter() {  // a thread of every block, and of every grid
    for (;;) {
        body(call);
        wait(DONE);
    }
}

JUMPS static void resume(Fiber& fiber) {
    if (__builtin_setjmp(scheduler)) return;
    if (fiber.begun) jump(fiber.place);
    fiber.begun = true;
    fiber.stack.resize(STACK);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    swapcontext(&start, &fiber.context);
}

// Lets waiting threads go on: a warp of which all wait for the warp, or a block of which all that are left wait for it.
// Whether any can.
static bool release(unsigned threads) {
    bool some = false, left = false, all = true;
    for (unsigned first = 0; first < threads; first += WARP) {
        bool whole = true;
        for (unsigned i = first; i < first + WARP; i++) {
            whole &= fibers[i].state == AT_WARP;
            some |= fibers[i].state == READY;
            left |= fibers[i].state != DONE;
            all &= fibers[i].state == AT_BLOCK || fibers[i].state == DONE;
        }
        for (unsigned i = first; whole && i < first + WARP; i++) fibers[i].state = READY, some = true;
    }
    for (unsigned i = 0; all && left && i < threads; i++)
        if (fibers[i].state == AT_BLOCK) fibers[i].state = READY, some = true;
    return some;
}

// Runs a grid; 0, or 1 where threads wait for one another forever.
static int grid(const unsigned* blocks, unsigned threads, unsigned seed) {
    unsigned long long random = seed;
    std::vector<unsigned> order(threads);
    if (fibers.size() < threads) fibers.resize(threads);
    gridDim = {blocks[0], blocks[1], blocks[2]}, blockDim = {threads, 1, 1};
    for (unsigned block = 0; block < blocks[0] * blocks[1] * blocks[2]; block++) {
        blockIdx = {block % blocks[0], block / blocks[0] % blocks[1], block / blocks[0] / blocks[1]};
        for (unsigned i = 0; i < threads; i++) order[i] = i, fibers[i].state = READY;
        do {
            for (unsigned i = threads - 1; i > 0; i--) {
                random = random * 6364136223846793005u + 1442695040888963407u;  // Knuth's generator; its high bits
                std::swap(order[i], order[(random >> 33) % (i + 1)]);
            }
            const unsigned held = random >> 33;  // warps that wait for no reason, as any may that is not made to go on
            for (unsigned i : order)
                if (fibers[i].state == READY && held >> i / WARP % WARP & 1) {
                    running = i, threadIdx = {i, 0, 0};
                    resume(fibers[i]);
                }
        } while (release(threads));
        for (unsigned i = 0; i < threads; i++)
            if (fibers[i].state != DONE) return fibers.clear(), 1;
    }
    return 0;
}

template <typename... Types>
struct Call {
    void (*kernel)(Types...);
    void** given;
    template <size_t... I>
    void unpack(std::index_sequence<I...>) {
        kernel(*static_cast<Types*>(given[I])...);
    }
};

// As cuLaunchKernel does: a pointer to each argument.
template <typename... Types>
int launch(void (*kernel)(Types...), const unsigned* blocks, unsigned threads, unsigned seed, void** given) {
    Call<Types...> made{kernel, given};
    body = [](void* c) { static_cast<Call<Types...>*>(c)->unpack(std::index_sequence_for<Types...>{}); };
    call = &made;
    return grid(blocks, threads, seed);
}

// What kind of thing each argument is: p a pointer, f a floating number, i an integer; and its bytes.
template <typename Type>
void describe(char*& out) {
    *out++ = std::is_pointer_v<Type> ? 'p' : std::is_floating_point_v<Type> ? 'f' : 'i';
    *out++ = '0' + sizeof(Type);
}
template <typename... Types>
void signature(void (*)(Types...), char* out) {
    (describe<Types>(out), ...);
    *out = 0;
}

}  // namespace host

static void __syncthreads() { host::wait(host::AT_BLOCK); }
static void __syncwarp() { host::wait(host::AT_WARP); }

// What a lane of this warp hands over, once all have handed over something.
template <typename T>
static T from_lane(T x, int lane) {
    using namespace host;
    memcpy(&fibers[running].handed, &x, sizeof x);
    __syncwarp();
    memcpy(&x, &fibers[running / WARP * WARP + lane].handed, sizeof x);
    __syncwarp();
    return x;
}
template <typename T>
static T __shfl_xor_sync(unsigned, T x, int offset) {
    return from_lane(x, host::running % host::WARP ^ offset);
}
template <typename T>
static T __shfl_sync(unsigned, T x, int lane) {
    return from_lane(x, lane);
}
static unsigned __ballot_sync(unsigned, bool vote) {
    using namespace host;
    fibers[running].handed = vote;
    __syncwarp();
    unsigned votes = 0;
    for (unsigned lane = 0; lane < WARP; lane++) votes |= (unsigned)fibers[running / WARP * WARP + lane].handed << lane;
    __syncwarp();
    return votes;
}
static int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename T>
static T atomicAdd(T* at, T x) {
    T before = *at;
    *at += x;
    return before;
}
template <typename T>
static T atomicMax(T* at, T x) {
    T before = *at;
    *at = before > x ? before : x;
    return before;
}

static unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
using std::exp, std::log, std::sqrt, std::erf, std::pow, std::cbrt, std::fmax, std::fabs;

// ---- tensor cores: the layout of fragments over lanes is theirs, the sums are a CPU's ---------------------------------

#define TENSOR_CORES
#define HALF_AS_FLOAT

static float half_as_float(unsigned short bits) {
    int exponent = bits >> 10 & 31;
    float size = exponent == 31 ? (bits & 1023 ? NAN : INFINITY)
                                : std::ldexp((float)(exponent ? bits & 1023 | 1024 : bits & 1023), (exponent ? exponent : 1) - 25);
    return bits & 0x8000 ? -size : size;
}
static unsigned brain(float x) {
    unsigned bits = __float_as_uint(x);
    return x == x ? bits + 0x7fff + (bits >> 16 & 1) >> 16 : 0x7fff;
}
static unsigned rounded(float low, float high) { return brain(low) | brain(high) << 16; }

// mma.m16n8k16: the sums of this lane are of rows g and g + 8, columns 2t and 2t + 1; what they are made of lies in the
// fragments of the lanes of those rows and columns.
static void multiply(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    using namespace host;
    struct Fragments {
        const unsigned *a, *b;
    } own = {a, b};
    fibers[running].shown = &own;
    __syncwarp();
    auto of = [](int lane) { return *(const Fragments*)fibers[running / WARP * WARP + lane].shown; };
    auto part = [](unsigned word, int i) { return __uint_as_float(i ? word & 0xffff0000u : word << 16); };
    const int g = running % WARP / 4, t = running % 4;
    for (int pair = 0; pair < 4; pair++) {
        const unsigned *rows = of(4 * g + pair).a;
        for (int j = 0; j < 2; j++) {
            const unsigned *column = of(4 * (2 * t + j) + pair).b;
            for (int high = 0; high < 2; high++)  // components 2 pair, 2 pair + 1, and the same plus 8
                for (int i = 0; i < 2; i++)
                    for (int below = 0; below < 2; below++)
                        sums[2 * below + j] += part(rows[2 * high + below], i) * part(column[high], i);
        }
    }
    __syncwarp();
}
