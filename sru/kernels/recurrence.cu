// The SRU recurrence on NVIDIA GPUs, one source for all dtypes and options: the parts of its kernels. The kernels are in
// columns.cu and tiles.cu; sru/kernels/cuda.py appends one of them to this file, compiles and launches it.
//
// The number of reads in flight decides the speed: memory takes about 600 ns to answer, one step of the chain of states
// takes 30 ns. There are three ways to read ahead, for three kinds of shapes (LOOK):
//   0  registers: a thread owns LANES neighbouring columns and holds STEPS steps. Many columns, wide reads.
//   1  a ring: a thread copies STAGES x STEPS steps asynchronously into its slots of shared memory. Fewer columns.
//   2  tiles: a block owns COLUMNS columns and TILE steps. All threads compute everything independent of the state, one
//      warp runs the chain, all threads compute the rest. Few columns, long sequences.
// Gates are never stored: the backward pass computes them again from c, which is cheaper than reading them. It is linear
// in the gradient of c, so its chain is two operations per step.
//
// Macros, all set by cuda.py:
//   U_TYPE, X_TYPE   float, double, Half or Bfloat: the type of u, h and their gradients; of x and its gradient
//   WIDE             float or double: the type of all computations, and of v, b, c, the mask and their gradients
//   BACKWARD         0 for the kernel forward, 1 for backward
//   LOOK, LANES, STEPS, STAGES, THREADS, COLUMNS   how the work is divided; COLUMNS is THREADS except with tiles
//   BLOCKS           number of blocks that must fit the registers of a multiprocessor
//   SKIP, PAD, KEEP, ZONEOUT   whether there is a skip, padding, a backward pass that needs c, and zoneout
//   ACTIVATION       0 identity, 1 tanh, 2 relu

struct Half { unsigned short bits; };
struct Bfloat { unsigned short bits; };

#ifndef ON_CPU  // a test supplies its own definitions to run this file without a GPU

__device__ __forceinline__ float exp2_of(float y) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
    return power;
}

__device__ __forceinline__ float inverse(float y) {
    float quotient;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(y));
    return quotient;
}

__device__ __forceinline__ float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ unsigned float_to_bits(float number) { return __float_as_uint(number); }

__device__ __forceinline__ float wide(Half number) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(number.bits));
    return result;
}

__device__ __forceinline__ void narrow(float number, Half& result) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(number));
}

// SIZE is 4, 8 or 16. Before sm_80 there is no asynchronous copy: the thread waits; the result is the same.
template <int SIZE>
__device__ __forceinline__ void copy_ahead(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (SIZE == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(SIZE) : "memory");
#else
    for (int i = 0; i < SIZE / 4; ++i) static_cast<unsigned*>(to)[i] = static_cast<const unsigned*>(from)[i];
#endif
}

__device__ __forceinline__ void close_group() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most OPEN groups are in flight.
template <int OPEN>
__device__ __forceinline__ void wait_for_groups() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
#endif
}

extern __shared__ __align__(16) char shared_memory[];

#endif  // ON_CPU

__device__ __forceinline__ float wide(float number) { return number; }
__device__ __forceinline__ double wide(double number) { return number; }
__device__ __forceinline__ float wide(Bfloat number) { return bits_to_float(unsigned(number.bits) << 16); }

__device__ __forceinline__ void narrow(float number, float& result) { result = number; }
__device__ __forceinline__ void narrow(double number, double& result) { result = number; }
__device__ __forceinline__ void narrow(float number, Bfloat& result) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(number));
#else
    // Round to nearest, ties to even; NaN keeps a bit of its fraction.
    const unsigned bits = float_to_bits(number);
    result.bits = number != number ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#endif
}

// `gate` takes FOLD times its argument, so that the change to base 2 happens once, in v and b.
#define LOG2E 1.4426950408889634f
template <class T> struct Fold;
template <> struct Fold<float> { static constexpr float value = -LOG2E; };
template <> struct Fold<double> { static constexpr double value = -1.0; };
constexpr WIDE FOLD = Fold<WIDE>::value;

// 1 / (1 + exp(-z)), given y = FOLD * z. If the power overflows, its inverse is 0, which is correct.
__device__ __forceinline__ float gate(float y) { return inverse(1.0f + exp2_of(y)); }
__device__ __forceinline__ double gate(double y) { return 1.0 / (1.0 + exp(y)); }

// g(c)
__device__ __forceinline__ WIDE activate(WIDE c) {
#if ACTIVATION == 1
    return 2 * gate(2 * FOLD * c) - 1;
#elif ACTIVATION == 2
    return c <= 0 ? WIDE(0) : c;  // keeps NaN
#else
    return c;
#endif
}

// g'(c), given y = g(c)
__device__ __forceinline__ WIDE slope(WIDE c, WIDE y) {
#if ACTIVATION == 1
    return 1 - y * y;
#elif ACTIVATION == 2
    return c <= 0 ? WIDE(0) : WIDE(1);
#else
    return 1;
#endif
}

// The numbers that a thread reads or writes at once.
template <class T>
struct alignas(sizeof(T) * LANES < 16 ? sizeof(T) * LANES : 16) Lanes {
    T number[LANES];
};

template <class T>
__device__ __forceinline__ Lanes<T> read(const T* from) {
    return *reinterpret_cast<const Lanes<T>*>(from);
}

template <class T>
__device__ __forceinline__ void write(T* to, const WIDE (&numbers)[LANES]) {
    Lanes<T> lanes;
#pragma unroll
    for (int i = 0; i < LANES; ++i) narrow(numbers[i], lanes.number[i]);
    *reinterpret_cast<Lanes<T>*>(to) = lanes;
}

// In the order of cuda.py. Strides are in elements; without one, the stride of columns is 1.
struct Arguments {
    const U_TYPE* u;            // (T, B, K, D)
    const X_TYPE* x;            // (T, B, D), or the fourth part of u
    const WIDE* v;              // (2 * D): forget gate, then reset gate
    const WIDE* b;              // (2 * D)
    const WIDE* c0;             // (B, D)
    const WIDE* mask;           // (B, D) or null
    const unsigned char* pad;   // (T, B)
    const WIDE* scale;          // one number, or null for 1
    U_TYPE* h;                  // (T, B, D)
    WIDE* c;                    // (T, B, D), if KEEP
    WIDE* c_last;               // (B, D)
    const U_TYPE* gh;           // (T, B, D)
    const WIDE* gc_last;        // (B, D)
    U_TYPE* gu;                 // (T, B, K, D)
    X_TYPE* gx;                 // (T, B, D), or the fourth part of gu; null if not wanted
    WIDE* gc0;                  // (B, D)
    WIDE* sums;                 // (B, 4, D): each sequence's part of the gradients of v and b
    long long T, B, D, halves;
    long long u_t, u_b, u_k, u_d, x_t, x_b, x_d, c0_b, mask_b;
    long long gh_t, gh_b, gc_last_b, gu_t, gu_b, gu_k, gx_t, gx_b;
    WIDE zoneout;
};

// The columns of a thread, and their direction.
struct Place {
    long long sequence, column, first, step;
    bool exists;

    // A thread without columns of its own gets the last ones, and must not write.
    __device__ __forceinline__ explicit Place(const Arguments& a) {
        const long long groups = a.D / LANES, last = groups * a.B - 1;
        const long long own = (long long)blockIdx.x * COLUMNS + threadIdx.x % COLUMNS, group = own < last ? own : last;
        exists = own <= last;
        sequence = group / groups;
        column = group % groups * LANES;
        const bool reverse = (column >= a.D / a.halves) != BACKWARD;
        first = reverse ? a.T - 1 : 0;
        step = reverse ? -1 : 1;
    }
};

// A pointer that moves through time in the direction of its columns.
template <class T>
struct Walk {
    T* at;
    long long stride;

    __device__ __forceinline__ Walk(T* start, long long stride_t, const Place& place)
        : at(start + place.first * stride_t), stride(place.step * stride_t) {}
    __device__ __forceinline__ void advance() { at += stride; }
    // From here on, one of `rows` pointers that divide the steps among them.
    __device__ __forceinline__ void share(int row, int rows) {
        at += row * stride;
        stride *= rows;
    }
};

// The inputs of one step: those of both passes, then those of the backward pass only.
struct Step {
    Lanes<U_TYPE> u0, u1, u2;
    Lanes<X_TYPE> x;
    bool pad;
    Lanes<WIDE> c;  // before the step
    Lanes<U_TYPE> gh;

    __device__ __forceinline__ WIDE skip(WIDE scale, int i) const {
        return SKIP ? scale * wide(x.number[i]) : WIDE(0);
    }
};

// The addresses of the inputs of a step.
struct Reader {
    long long u_k;
    Walk<const U_TYPE> u, gh;
    Walk<const X_TYPE> x;
    Walk<const unsigned char> pad;
    Walk<const WIDE> c;
    const WIDE* c0;

    __device__ __forceinline__ Reader(const Arguments& a, const Place& p)
        : u_k(a.u_k),
          u(a.u + p.sequence * a.u_b + p.column * a.u_d, a.u_t, p),
          gh(a.gh + p.sequence * a.gh_b + p.column, a.gh_t, p),
          x(a.x + p.sequence * a.x_b + p.column * a.x_d, a.x_t, p),
          pad(a.pad + p.sequence, a.B, p),
          c(a.c + p.sequence * a.D + p.column + p.step * a.B * a.D, a.B * a.D, p),
          c0(a.c0 + p.sequence * a.c0_b + p.column) {}

    // The backward pass ends at the first step; the state before it is c0.
    __device__ __forceinline__ Step here(bool last) const {
        Step step;
        step.u0 = read(u.at);
        step.u1 = read(u.at + u_k);
        step.u2 = read(u.at + 2 * u_k);
        if (SKIP) step.x = read(x.at);
        step.pad = PAD && *pad.at;
        if (BACKWARD) {
            step.c = read(last ? c0 : c.at);
            step.gh = read(gh.at);
        }
        return step;
    }

    __device__ __forceinline__ void advance() {
        u.advance();
        x.advance();
        pad.advance();
        c.advance();
        gh.advance();
    }

    __device__ __forceinline__ void share(int row, int rows) {
        u.share(row, rows);
        x.share(row, rows);
        pad.share(row, rows);
        c.share(row, rows);
        gh.share(row, rows);
    }
};

// The parameters of a gate: the folded v and b of a thread's columns.
struct Gate {
    WIDE v[LANES], b[LANES];

    __device__ __forceinline__ Gate(const WIDE* v_row, const WIDE* b_row, const Place& place) {
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            v[i] = FOLD * v_row[place.column + i];
            b[i] = FOLD * b_row[place.column + i];
        }
    }
    // The part of the gate that does not depend on the state, and so is outside the chain of states.
    __device__ __forceinline__ WIDE ready(int i, U_TYPE u) const { return FOLD * wide(u) + b[i]; }
    __device__ __forceinline__ WIDE open(int i, U_TYPE u, WIDE c) const { return gate(v[i] * c + ready(i, u)); }
};

// The forget gate f from the value s of the sigmoid.
__device__ __forceinline__ WIDE forget(const Arguments& a, WIDE s) {
    return ZONEOUT ? a.zoneout + (1 - a.zoneout) * s : s;
}

// The factors of the output: the dropout mask of a thread's columns, and the scale of the highway. Read once, here: the
// host knows the address of the scale, not its value.
struct Weights {
    WIDE mask[LANES], scale;

    __device__ __forceinline__ Weights(const Arguments& a, const Place& place) : scale(SKIP && a.scale ? *a.scale : WIDE(1)) {
#pragma unroll
        for (int i = 0; i < LANES; ++i)
            mask[i] = a.mask ? a.mask[place.sequence * a.mask_b + place.column + i] : WIDE(1);
    }
};

// The factors around the gradient of c_t, with total = own + the gradient from the following step.
struct Parts {
    WIDE own, jacobian, from_reset;  // gradient for the previous step: jacobian * total + from_reset
    WIDE g2, gx, to_u0, to_forget;   // gu0 = to_u0 * total, gu1 = to_forget * total

    __device__ __forceinline__ Parts(
        const Arguments& a, const Step& in, int i, const Gate& f_gate, const Gate& r_gate, const Weights& weights, WIDE v_f,
        WIDE v_r
    ) {
        const WIDE cp = in.c.number[i], u0 = wide(in.u0.number[i]), gh = wide(in.gh.number[i]);
        const WIDE x = in.skip(weights.scale, i);
        const WIDE s = f_gate.open(i, in.u1.number[i], cp), f = forget(a, s), c = (cp - u0) * f + u0;
        const WIDE r = r_gate.open(i, in.u2.number[i], cp), y = activate(c), kept = gh * weights.mask[i] * r;
        own = kept * slope(c, y);
        g2 = kept * (y - x) * (1 - r);
        gx = weights.scale * (gh - kept);
        to_u0 = 1 - f;
        to_forget = (ZONEOUT ? 1 - a.zoneout : WIDE(1)) * s * (1 - s) * (cp - u0);
        jacobian = f + to_forget * v_f;
        from_reset = g2 * v_r;
    }
};
