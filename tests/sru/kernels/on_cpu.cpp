// sru/kernels/recurrence.cu as a program for a CPU, which tests run where there is no GPU.
//
// A block's threads are fibers that take turns at barriers, first to last or last to first (a missing barrier then gives
// other numbers). Copies into shared memory arrive only when they are waited for.

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#define ON_CPU
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)

struct { unsigned x; } threadIdx, blockIdx;
alignas(16) char shared_memory[1 << 16];


// As inexact as a GPU's: up to 2 units in the last place of a power, 1 of an inverse, whatever the number's bits say.
float off_by(float number, float units) {
    unsigned bits;
    memcpy(&bits, &number, 4);
    return number * (1 + units * 1.2e-7f * (float(bits * 2654435761u >> 8) / (1 << 23) - 1));
}
float exp2_of(float y) { return off_by(exp2f(y), 2); }
float inverse(float y) { return off_by(1.0f / y, 1); }

float bits_to_float(unsigned bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

unsigned float_to_bits(float number) {
    unsigned bits;
    memcpy(&bits, &number, 4);
    return bits;
}

struct Half;
float wide(Half number);
void narrow(float number, Half& result);

struct Copy { void* to; const void* from; int size; };
struct Fiber {
    ucontext_t context;
    std::deque<std::vector<Copy>> groups;  // closed ones, the oldest first
    std::vector<Copy> open;
    bool done;
};
std::vector<Fiber> fibers;
ucontext_t scheduler;
int misaligned;

template <int SIZE> void copy_ahead(void* to, const void* from) {
    misaligned += size_t(to) % SIZE || size_t(from) % SIZE;
    fibers[threadIdx.x].open.push_back({to, from, SIZE});
}

void close_group() {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

template <int OPEN> void wait_for_groups() {
    auto& groups = fibers[threadIdx.x].groups;
    for (; groups.size() > OPEN; groups.pop_front())
        for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.size);
}

void __syncthreads() {
    const unsigned thread = threadIdx.x;
    swapcontext(&fibers[thread].context, &scheduler);
    threadIdx.x = thread;
}

int votes;

int __syncthreads_or(int vote) {
    votes |= vote;
    __syncthreads();
    const int result = votes;
    __syncthreads();
    votes = 0;
    return result;
}

#include RECURRENCE

float wide(Half number) {
    _Float16 half;
    memcpy(&half, &number, 2);
    return half;
}

void narrow(float number, Half& result) {
    const _Float16 half = number;
    memcpy(&result, &half, 2);
}

static const Arguments* arguments;

static void fiber_main() {
#if BACKWARD
    backward(*arguments);
#else
    forward(*arguments);
#endif
    fibers[threadIdx.x].done = true;
}

// Run all blocks; the threads of a block in reverse where asked. Not 0 where the kernel copies from or to an address that
// a GPU would refuse, or writes beyond the shared memory that it asked for.
extern "C" int run(const Arguments* given, long long blocks, int shared, int reverse) {
    int beyond = misaligned = 0;
    arguments = given;
    if (fibers.empty()) fibers = std::vector<Fiber>(THREADS);
    // Of this run alone: a process loads dozens of kernels, and would keep megabytes for each.
    const std::unique_ptr<char[]> stacks(new char[THREADS << 16]);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        memset(shared_memory, 0xff, sizeof shared_memory);  // NaN
        for (size_t i = 0; i < fibers.size(); ++i) {
            Fiber& fiber = fibers[i];
            fiber.groups.clear();
            fiber.done = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack = {stacks.get() + (i << 16), 0, 1 << 16};
            fiber.context.uc_link = &scheduler;
            makecontext(&fiber.context, fiber_main, 0);
        }
        for (bool alive = true; alive;) {
            alive = false;
            for (int i = 0; i < THREADS; ++i) {
                threadIdx.x = reverse ? THREADS - 1 - i : i;
                Fiber& fiber = fibers[threadIdx.x];
                if (fiber.done) continue;
                swapcontext(&scheduler, &fiber.context);
                alive |= !fiber.done;
            }
        }
        for (size_t i = shared; i < sizeof shared_memory; ++i) beyond += shared_memory[i] != char(0xff);
    }
    return misaligned + beyond;
}
