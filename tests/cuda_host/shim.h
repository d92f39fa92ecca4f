// Enough of CUDA to run a kernel on the CPU: a block's threads are fibers, which wait for one another at barriers.
//
// Between two barriers the fibers run one after the other, in an order drawn anew each time: a kernel that relies on an
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

static int max(int a, int b) { return a > b ? a : b; }  // NVRTC has these by itself
static int min(int a, int b) { return a < b ? a : b; }

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
    std::vector<char> stack;
    State state;
    unsigned long long handed;  // to the other lanes
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static unsigned running;
static void (*body)(void* call);
static void* call;

static void enter() {
    body(call);
    fibers[running].state = DONE;
    swapcontext(&fibers[running].context, &scheduler);
}

static void wait(State at) {
    fibers[running].state = at;
    swapcontext(&fibers[running].context, &scheduler);
}

// Lets waiting threads go on: a warp of which all wait for the warp, or a block of which all that are left wait for it.
static bool release(unsigned threads) {
    bool some = false, left = false, all = true;
    for (unsigned first = 0; first < threads; first += WARP) {
        bool whole = true;
        for (unsigned i = first; i < first + WARP; i++) {
            whole &= fibers[i].state == AT_WARP;
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
        for (unsigned i = 0; i < threads; i++) {
            order[i] = i;
            Fiber& fiber = fibers[i];
            fiber.stack.resize(STACK);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = STACK;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, enter, 0);
            fiber.state = READY;
        }
        do {
            for (unsigned i = threads - 1; i > 0; i--) {
                random = random * 6364136223846793005u + 1442695040888963407u;  // Knuth's generator; its high bits
                std::swap(order[i], order[(random >> 33) % (i + 1)]);
            }
            for (unsigned i : order)
                if (fibers[i].state == READY) {
                    running = i, threadIdx = {i, 0, 0};
                    swapcontext(&scheduler, &fibers[i].context);
                }
        } while (release(threads));
        for (unsigned i = 0; i < threads; i++)
            if (fibers[i].state != DONE) return 1;
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

template <typename T>
static T __shfl_xor_sync(unsigned, T x, int offset) {
    using namespace host;
    memcpy(&fibers[running].handed, &x, sizeof x);
    __syncwarp();
    memcpy(&x, &fibers[running / WARP * WARP + (running % WARP ^ offset)].handed, sizeof x);
    __syncwarp();
    return x;
}

template <typename T>
static T atomicAdd(T* at, T x) {
    T before = *at;
    *at += x;
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
