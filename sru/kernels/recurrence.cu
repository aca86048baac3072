// The SRU recurrence on NVIDIA GPUs: one source for every dtype and option. sru/kernels/cuda.py compiles and launches it.
//
// What decides the speed is how many reads are under way: memory answers after some 600 ns, while a step of the chain of
// states takes 30. There are three ways to read far enough ahead, for three kinds of shapes (LOOK):
//   0  registers: a thread owns LANES neighbouring columns and holds STEPS steps. Many columns, wide reads.
//   1  a ring: a thread copies into its own slots of shared memory, STAGES x STEPS steps, without waiting. Fewer columns.
//   2  tiles: a block owns COLUMNS columns and TILE steps. All threads compute what does not depend on the state, one warp
//      runs the chain, all threads compute the rest. Few columns, long sequences.
// Gates are never stored: the backward pass computes them again from c, which costs less than reading them. It is linear
// in the gradient of c, so that its chain is two operations a step.
//
// Macros, all set by cuda.py:
//   U_TYPE, X_TYPE   float, double, Half or Bfloat: the type of u, h and their gradients; of x and its gradient
//   WIDE             float or double: what is computed in, and the type of v, b, c, the mask and their gradients
//   BACKWARD         0 for the kernel forward, 1 for backward
//   LOOK, LANES, STEPS, STAGES, THREADS, COLUMNS   the cut of the work; COLUMNS is THREADS but with tiles
//   BLOCKS           how many of them a multiprocessor must have registers for
//   SKIP, PAD, KEEP, ZONEOUT   whether there is a skip, padding, a backward pass to keep c for, and zoneout
//   ACTIVATION       0 identity, 1 tanh, 2 relu

struct Half { unsigned short bits; };
struct Bfloat { unsigned short bits; };

#ifndef ON_CPU  // where a test brings its own, to run this file without a GPU

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

// SIZE is 4, 8 or 16. Before sm_80 there is no asynchronous copy: the thread waits, and the result is the same.
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

// Wait until at most OPEN of the groups are under way.
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
    // To the nearest, ties to even; a NaN keeps a bit of its fraction.
    const unsigned bits = float_to_bits(number);
    result.bits = number != number ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#endif
}

// FOLD times the argument of a gate goes into `gate`: what base 2 costs is paid once, in v and b.
#define LOG2E 1.4426950408889634f
template <class T> struct Fold;
template <> struct Fold<float> { static constexpr float value = -LOG2E; };
template <> struct Fold<double> { static constexpr double value = -1.0; };
constexpr WIDE FOLD = Fold<WIDE>::value;

// 1 / (1 + exp(-z)) of y = FOLD * z. Where the power overflows, its inverse is 0, as it should be.
__device__ __forceinline__ float gate(float y) { return inverse(1.0f + exp2_of(y)); }
__device__ __forceinline__ double gate(double y) { return 1.0 / (1.0 + exp(y)); }

// g(c)
__device__ __forceinline__ WIDE activate(WIDE c) {
#if ACTIVATION == 1
    return 2 * gate(2 * FOLD * c) - 1;
#elif ACTIVATION == 2
    return c <= 0 ? WIDE(0) : c;  // NaN stays
#else
    return c;
#endif
}

// g'(c) where y = g(c)
__device__ __forceinline__ WIDE slope(WIDE c, WIDE y) {
#if ACTIVATION == 1
    return 1 - y * y;
#elif ACTIVATION == 2
    return c <= 0 ? WIDE(0) : WIDE(1);
#else
    return 1;
#endif
}

// What a thread reads or writes at once.
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

// In the order in which cuda.py packs them. Strides are in elements; those of columns are 1 where none is given.
struct Arguments {
    const U_TYPE* u;            // (T, B, K, D)
    const X_TYPE* x;            // (T, B, D), or the fourth part of u
    const WIDE* v;              // (2, D)
    const WIDE* b;              // (2, D)
    const WIDE* c0;             // (B, D)
    const WIDE* mask;           // (B, D) or null
    const unsigned char* pad;   // (T, B)
    U_TYPE* h;                  // (T, B, D)
    WIDE* c;                    // (T, B, D), where it is kept
    WIDE* c_last;               // (B, D)
    const U_TYPE* gh;           // (T, B, D)
    const WIDE* gc_last;        // (B, D)
    U_TYPE* gu;                 // (T, B, K, D)
    X_TYPE* gx;                 // (T, B, D), or the fourth part of gu; null where it is not wanted
    WIDE* gc0;                  // (B, D)
    WIDE* sums;                 // (B, 4, D): a sequence's share of the gradients of v and b
    long long T, B, D, halves;
    long long u_t, u_b, u_k, u_d, x_t, x_b, x_d, v_k, b_k, c0_b, mask_b;
    long long gh_t, gh_b, gc_last_b, gu_t, gu_b, gu_k, gx_t, gx_b;
    double scale, zoneout;
};

// Which columns a thread owns, and which way they run.
struct Place {
    long long sequence, column, first, step;
    bool exists;

    // The thread that has no columns of its own gets the last ones, and must not write.
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

// A pointer that walks through time, in the direction of its columns.
template <class T>
struct Walk {
    T* at;
    long long stride;

    __device__ __forceinline__ Walk(T* start, long long stride_t, const Place& place)
        : at(start + place.first * stride_t), stride(place.step * stride_t) {}
    __device__ __forceinline__ T* after(long long steps) const { return at + steps * stride; }
    __device__ __forceinline__ void advance() { at += stride; }
};

// The inputs of one step: of both passes, then of the backward pass alone.
struct Step {
    Lanes<U_TYPE> u0, u1, u2;
    Lanes<X_TYPE> x;
    bool pad;
    Lanes<WIDE> c;  // before the step
    Lanes<U_TYPE> gh;

    __device__ __forceinline__ WIDE skip(const Arguments& a, int i) const {
        return SKIP ? WIDE(a.scale) * wide(x.number[i]) : WIDE(0);
    }
};

// Reads step after step.
struct Reader {
    long long left, u_k;
    Walk<const U_TYPE> u, gh;
    Walk<const X_TYPE> x;
    Walk<const unsigned char> pad;
    Walk<const WIDE> c;
    const WIDE* c0;

    __device__ __forceinline__ Reader(const Arguments& a, const Place& p)
        : left(a.T), u_k(a.u_k),
          u(a.u + p.sequence * a.u_b + p.column * a.u_d, a.u_t, p),
          gh(a.gh + p.sequence * a.gh_b + p.column, a.gh_t, p),
          x(a.x + p.sequence * a.x_b + p.column * a.x_d, a.x_t, p),
          pad(a.pad + p.sequence, a.B, p),
          c(a.c + p.sequence * a.D + p.column + p.step * a.B * a.D, a.B * a.D, p),
          c0(a.c0 + p.sequence * a.c0_b + p.column) {}

    // The step that comes after so many.
    __device__ __forceinline__ Step after(long long steps) const {
        Step step;
        const U_TYPE* at = u.after(steps);
        step.u0 = read(at);
        step.u1 = read(at + u_k);
        step.u2 = read(at + 2 * u_k);
        if (SKIP) step.x = read(x.after(steps));
        step.pad = PAD && *pad.after(steps);
        if (BACKWARD) {
            step.c = read(steps + 1 < left ? c.after(steps) : c0);
            step.gh = read(gh.after(steps));
        }
        return step;
    }

    __device__ __forceinline__ void advance() {
        u.advance();
        x.advance();
        pad.advance();
        c.advance();
        gh.advance();
        --left;
    }

    __device__ __forceinline__ Step next() {
        const Step step = after(0);
        advance();
        return step;
    }

    // Where the arrays of a step lie among a thread's bytes of a slot; those of a block's threads lie side by side.
    static constexpr int U_SIZE = sizeof(Lanes<U_TYPE>), X_SIZE = sizeof(Lanes<X_TYPE>), C_SIZE = sizeof(Lanes<WIDE>);
    static constexpr int X_AT = 3 * U_SIZE, PAD_AT = X_AT + SKIP * X_SIZE, C_AT = PAD_AT + 8 * PAD;
    static constexpr int GH_AT = C_AT + BACKWARD * C_SIZE, BYTES = GH_AT + BACKWARD * U_SIZE;

    template <class T>
    static __device__ __forceinline__ T* place(int slot, int offset) {
        return reinterpret_cast<T*>(shared_memory + (slot * BYTES + offset) * THREADS) + threadIdx.x;
    }

    __device__ __forceinline__ void next_into(int slot) {
#pragma unroll
        for (int k = 0; k < 3; ++k) copy_ahead<U_SIZE>(place<Lanes<U_TYPE>>(slot, k * U_SIZE), u.at + k * u_k);
        if (SKIP) copy_ahead<X_SIZE>(place<Lanes<X_TYPE>>(slot, X_AT), x.at);
        // No copy is smaller than four bytes: the aligned four among which the one is.
        if (PAD) copy_ahead<4>(place<unsigned>(slot, PAD_AT), (const void*)(size_t(pad.at) & ~size_t(3)));
        if (BACKWARD) {
            copy_ahead<C_SIZE>(place<Lanes<WIDE>>(slot, C_AT), left > 1 ? c.at : c0);
            copy_ahead<U_SIZE>(place<Lanes<U_TYPE>>(slot, GH_AT), gh.at);
        }
        advance();
    }

    // The step in a slot, whose byte of padding came from an address that ended in these two bits.
    static __device__ __forceinline__ Step from(int slot, unsigned pad_bits) {
        Step step;
        step.u0 = *place<Lanes<U_TYPE>>(slot, 0);
        step.u1 = *place<Lanes<U_TYPE>>(slot, U_SIZE);
        step.u2 = *place<Lanes<U_TYPE>>(slot, 2 * U_SIZE);
        if (SKIP) step.x = *place<Lanes<X_TYPE>>(slot, X_AT);
        step.pad = PAD && *place<unsigned>(slot, PAD_AT) >> 8 * pad_bits & 255;
        if (BACKWARD) {
            step.c = *place<Lanes<WIDE>>(slot, C_AT);
            step.gh = *place<Lanes<U_TYPE>>(slot, GH_AT);
        }
        return step;
    }
};

// Hand all steps to `body`, with more of them on their way.
template <class Body>
__device__ __forceinline__ void walk(const Arguments& a, const Place& place, Body body) {
    Reader reader(a, place);
#if LOOK == 0
    Step ahead[STEPS];
#pragma unroll
    for (int k = 0; k < STEPS; ++k)
        if (k < a.T) ahead[k] = reader.next();
    long long t = 0;
    // Without a question in the hot loop.
    for (; t + 2 * STEPS <= a.T; t += STEPS) {
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            body(ahead[k]);
            ahead[k] = reader.next();
        }
    }
    for (; t < a.T; t += STEPS) {
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            if (t + k >= a.T) break;
            body(ahead[k]);
            if (reader.left) ahead[k] = reader.next();
        }
    }
#elif LOOK == 1
    const unsigned pad_start = unsigned(size_t(reader.pad.at)), pad_stride = unsigned(reader.pad.stride);
    auto copy_stage = [&](int stage) {
        if (reader.left >= STEPS) {
#pragma unroll
            for (int k = 0; k < STEPS; ++k) reader.next_into(stage * STEPS + k);
        } else {
            for (int k = 0; reader.left > 0; ++k) reader.next_into(stage * STEPS + k);
        }
        close_group();  // an empty one at the end, so that groups can be counted
    };
    for (int stage = 0; stage < STAGES - 1; ++stage) copy_stage(stage);
    int stage = 0;
    for (long long t = 0; t < a.T; t += STEPS) {
        wait_for_groups<STAGES - 2>();
        copy_stage((stage + STAGES - 1) % STAGES);
        const unsigned pad_at = pad_start + unsigned(t) * pad_stride;
        if (t + STEPS <= a.T) {
#pragma unroll
            for (int k = 0; k < STEPS; ++k)
                body(Reader::from(stage * STEPS + k, (pad_at + k * pad_stride) & 3));
        } else {
            for (int k = 0; t + k < a.T; ++k)
                body(Reader::from(stage * STEPS + k, (pad_at + k * pad_stride) & 3));
        }
        stage = (stage + 1) % STAGES;
    }
#endif
}

// A gate's numbers: the folded v and b of a thread's columns.
struct Gate {
    WIDE v[LANES], b[LANES];

    __device__ __forceinline__ Gate(const WIDE* v_row, const WIDE* b_row, const Place& place) {
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            v[i] = FOLD * v_row[place.column + i];
            b[i] = FOLD * b_row[place.column + i];
        }
    }
    // What of the gate does not depend on the state, and so is no part of the chain of states.
    __device__ __forceinline__ WIDE ready(int i, U_TYPE u) const { return FOLD * wide(u) + b[i]; }
    __device__ __forceinline__ WIDE open(int i, U_TYPE u, WIDE c) const { return gate(v[i] * c + ready(i, u)); }
};

// The forget gate f of s, what the sigmoid gives.
__device__ __forceinline__ WIDE forget(const Arguments& a, WIDE s) {
    return ZONEOUT ? WIDE(a.zoneout) + WIDE(1 - a.zoneout) * s : s;
}

// The dropout mask of a thread's columns.
struct Dropout {
    WIDE mask[LANES];

    __device__ __forceinline__ Dropout(const Arguments& a, const Place& place) {
#pragma unroll
        for (int i = 0; i < LANES; ++i)
            mask[i] = a.mask ? a.mask[place.sequence * a.mask_b + place.column + i] : WIDE(1);
    }
};

// What the gradient of c_t is made of and goes to, apart from itself: total = own + the gradient from the step after.
struct Parts {
    WIDE own, jacobian, from_reset;  // the gradient for the step before: jacobian * total + from_reset
    WIDE g2, gx, to_u0, to_forget;   // gu0 = to_u0 * total, gu1 = to_forget * total

    __device__ __forceinline__ Parts(
        const Arguments& a, const Step& in, int i, const Gate& f_gate, const Gate& r_gate, WIDE mask, WIDE v_f, WIDE v_r
    ) {
        const WIDE cp = in.c.number[i], u0 = wide(in.u0.number[i]), gh = wide(in.gh.number[i]), x = in.skip(a, i);
        const WIDE s = f_gate.open(i, in.u1.number[i], cp), f = forget(a, s), c = (cp - u0) * f + u0;
        const WIDE r = r_gate.open(i, in.u2.number[i], cp), y = activate(c), kept = gh * mask * r;
        own = kept * slope(c, y);
        g2 = kept * (y - x) * (1 - r);
        gx = WIDE(a.scale) * (gh - kept);
        to_u0 = 1 - f;
        to_forget = (ZONEOUT ? WIDE(1 - a.zoneout) : WIDE(1)) * s * (1 - s) * (cp - u0);
        jacobian = f + to_forget * v_f;
        from_reset = g2 * v_r;
    }
};

#if LOOK != 2 && !BACKWARD

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward(const __grid_constant__ Arguments a) {
    const Place place(a);
    if (!place.exists) return;
    const long long row = place.sequence * a.D + place.column;
    const Gate f_gate(a.v, a.b, place), r_gate(a.v + a.v_k, a.b + a.b_k, place);
    const Dropout dropout(a, place);
    Walk<U_TYPE> h(a.h + row, a.B * a.D, place);
    Walk<WIDE> states(a.c + row, a.B * a.D, place);
    WIDE c[LANES];
#pragma unroll
    for (int i = 0; i < LANES; ++i) c[i] = a.c0[place.sequence * a.c0_b + place.column + i];
    walk(a, place, [&](const Step& in) {
        WIDE out[LANES];
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            const WIDE u0 = wide(in.u0.number[i]), x = in.skip(a, i);
            const WIDE f = forget(a, f_gate.open(i, in.u1.number[i], c[i]));
            const WIDE r = r_gate.open(i, in.u2.number[i], c[i]);
            const WIDE state = (c[i] - u0) * f + u0;
            const WIDE result = dropout.mask[i] * r * (activate(state) - x) + x;
            c[i] = in.pad ? c[i] : state;
            out[i] = in.pad ? WIDE(0) : result;
        }
        write(h.at, out);
        h.advance();
        if (KEEP) {
            write(states.at, c);
            states.advance();
        }
    });
#pragma unroll
    for (int i = 0; i < LANES; ++i) a.c_last[row + i] = c[i];
}

#elif LOOK != 2

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward(const __grid_constant__ Arguments a) {
    const Place place(a);
    if (!place.exists) return;
    const long long row = place.sequence * a.D + place.column;
    const Gate f_gate(a.v, a.b, place), r_gate(a.v + a.v_k, a.b + a.b_k, place);
    const Dropout dropout(a, place);
    Walk<U_TYPE> gu(a.gu + place.sequence * a.gu_b + place.column, a.gu_t, place);
    Walk<X_TYPE> gx(a.gx + place.sequence * a.gx_b + place.column, a.gx_t, place);
    WIDE lambda[LANES], sums[4][LANES] = {};
#pragma unroll
    for (int i = 0; i < LANES; ++i) lambda[i] = a.gc_last[place.sequence * a.gc_last_b + place.column + i];
    walk(a, place, [&](const Step& in) {
        WIDE out[4][LANES];
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            const WIDE v_f = f_gate.v[i] * (1 / FOLD), v_r = r_gate.v[i] * (1 / FOLD), cp = in.c.number[i];
            const Parts parts(a, in, i, f_gate, r_gate, dropout.mask[i], v_f, v_r);
            const WIDE total = parts.own + lambda[i], g1 = in.pad ? WIDE(0) : total * parts.to_forget;
            const WIDE g2 = in.pad ? WIDE(0) : parts.g2;
            lambda[i] = in.pad ? lambda[i] : parts.jacobian * total + parts.from_reset;
            out[0][i] = in.pad ? WIDE(0) : total * parts.to_u0;
            out[1][i] = g1;
            out[2][i] = g2;
            out[3][i] = in.pad ? WIDE(0) : parts.gx;
            sums[0][i] += g1 * cp;
            sums[1][i] += g2 * cp;
            sums[2][i] += g1;
            sums[3][i] += g2;
        }
#pragma unroll
        for (int k = 0; k < 3; ++k) write(gu.at + k * a.gu_k, out[k]);
        gu.advance();
        if (SKIP && a.gx) {
            write(gx.at, out[3]);
            gx.advance();
        }
    });
#pragma unroll
    for (int i = 0; i < LANES; ++i) {
        a.gc0[row + i] = lambda[i];
#pragma unroll
        for (int k = 0; k < 4; ++k) a.sums[(place.sequence * 4 + k) * a.D + place.column + i] = sums[k][i];
    }
}

#else  // tiles, LANES is 1

#define ROWS (THREADS / COLUMNS)
#define TILE (ROWS * STEPS)

// A tile of shared memory, (TILE, COLUMNS).
__device__ __forceinline__ WIDE* tile(int number) {
    return reinterpret_cast<WIDE*>(shared_memory) + number * TILE * COLUMNS + threadIdx.x % COLUMNS;
}

// The steps of a thread, from step `first` on, ROWS apart.
__device__ __forceinline__ void read_rows(const Arguments& a, const Reader& reader, long long first, Step (&steps)[STEPS]) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        const long long i = first + ROWS * k;
        if (i < a.T) steps[k] = reader.after(i);
        else steps[k].pad = true;  // after the end nothing changes
    }
}

#if !BACKWARD

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward(const __grid_constant__ Arguments a) {
    const Place place(a);
    const int row = threadIdx.x / COLUMNS;
    const Gate f_gate(a.v, a.b, place), r_gate(a.v + a.v_k, a.b + a.b_k, place);
    const Dropout dropout(a, place);
    const Reader reader(a, place);
    const Walk<U_TYPE> h(a.h + place.sequence * a.D + place.column, a.B * a.D, place);
    const Walk<WIDE> states(a.c + place.sequence * a.D + place.column, a.B * a.D, place);
    // Where no column of the block has a v, gates do not wait for states: the cell of 2017.
    bool waits = false;
    for (int i = 0; i < COLUMNS; ++i) waits |= a.v[((long long)blockIdx.x * COLUMNS + i) % a.D] != 0;
    WIDE *gates = tile(0), *candidates = tile(1), *after = tile(2), c = a.c0[place.sequence * a.c0_b + place.column];
    Step ahead[STEPS];
    read_rows(a, reader, row, ahead);
    for (long long first = 0; first < a.T; first += TILE) {
        Step steps[STEPS];
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            steps[k] = ahead[k];
            const WIDE ready = f_gate.ready(0, steps[k].u1.number[0]);
            // At padding the gate is open and the candidate 0, which keeps a state to the bit.
            const int at = (row + ROWS * k) * COLUMNS;
            if (waits) gates[at] = steps[k].pad ? WIDE(-1e30) : ready;
            else gates[at] = steps[k].pad ? WIDE(1) : forget(a, gate(ready));
            candidates[at] = steps[k].pad ? WIDE(0) : wide(steps[k].u0.number[0]);
        }
        read_rows(a, reader, first + TILE + row, ahead);
        __syncthreads();
        if (row == 0) {
            after[0] = c;
            if (waits) {
#pragma unroll 8
                for (int i = 0; i < TILE; ++i) {
                    const WIDE u0 = candidates[i * COLUMNS], f = forget(a, gate(f_gate.v[0] * c + gates[i * COLUMNS]));
                    c = (c - u0) * f + u0;
                    after[(i + 1) * COLUMNS] = c;
                }
            } else {
#pragma unroll 8
                for (int i = 0; i < TILE; ++i) {
                    const WIDE u0 = candidates[i * COLUMNS];
                    c = (c - u0) * gates[i * COLUMNS] + u0;
                    after[(i + 1) * COLUMNS] = c;
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            const long long i = first + row + ROWS * k;
            if (i >= a.T || !place.exists) break;
            const int at = (row + ROWS * k) * COLUMNS;
            const WIDE x = steps[k].skip(a, 0), state = after[at + COLUMNS];
            const WIDE r = r_gate.open(0, steps[k].u2.number[0], after[at]);
            const WIDE result = dropout.mask[0] * r * (activate(state) - x) + x;
            narrow(steps[k].pad ? WIDE(0) : result, *h.after(i));
            if (KEEP) *states.after(i) = state;
        }
    }
    if (row == 0 && place.exists) a.c_last[place.sequence * a.D + place.column] = c;
}

#else

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward(const __grid_constant__ Arguments a) {
    const Place place(a);
    const int row = threadIdx.x / COLUMNS;
    const Gate f_gate(a.v, a.b, place), r_gate(a.v + a.v_k, a.b + a.b_k, place);
    const Dropout dropout(a, place);
    const Reader reader(a, place);
    const Walk<U_TYPE> gu(a.gu + place.sequence * a.gu_b + place.column, a.gu_t, place);
    const Walk<X_TYPE> gx(a.gx + place.sequence * a.gx_b + place.column, a.gx_t, place);
    const WIDE v_f = a.v[place.column], v_r = a.v[a.v_k + place.column];
    WIDE *totals = tile(0), *jacobians = tile(1), *from_resets = tile(2);
    WIDE lambda = a.gc_last[place.sequence * a.gc_last_b + place.column], sums[4] = {};
    Step ahead[STEPS];
    read_rows(a, reader, row, ahead);
    for (long long first = 0; first < a.T; first += TILE) {
        WIDE to_u0[STEPS], to_forget[STEPS], before[STEPS];
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            const Step& in = ahead[k];
            const Parts parts(a, in, 0, f_gate, r_gate, dropout.mask[0], v_f, v_r);
            const long long i = first + row + ROWS * k;
            const int at = (row + ROWS * k) * COLUMNS;
            const WIDE g2 = in.pad ? WIDE(0) : parts.g2;
            totals[at] = in.pad ? WIDE(0) : parts.own;
            jacobians[at] = in.pad ? WIDE(1) : parts.jacobian;
            from_resets[at] = in.pad ? WIDE(0) : parts.from_reset;
            to_u0[k] = in.pad ? WIDE(0) : parts.to_u0;
            to_forget[k] = in.pad ? WIDE(0) : parts.to_forget;
            before[k] = i < a.T ? in.c.number[0] : WIDE(0);
            sums[1] += g2 * before[k];
            sums[3] += g2;
            if (i < a.T && place.exists) {
                narrow(g2, gu.after(i)[2 * a.gu_k]);
                if (SKIP && a.gx) narrow(in.pad ? WIDE(0) : parts.gx, *gx.after(i));
            }
        }
        read_rows(a, reader, first + TILE + row, ahead);
        __syncthreads();
        if (row == 0) {
#pragma unroll 8
            for (int i = 0; i < TILE; ++i) {
                const WIDE total = totals[i * COLUMNS] + lambda;
                lambda = jacobians[i * COLUMNS] * total + from_resets[i * COLUMNS];
                totals[i * COLUMNS] = total;
            }
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            const long long i = first + row + ROWS * k;
            const WIDE total = totals[(row + ROWS * k) * COLUMNS], g1 = total * to_forget[k];
            sums[0] += g1 * before[k];
            sums[2] += g1;
            if (i < a.T && place.exists) {
                narrow(total * to_u0[k], gu.after(i)[0]);
                narrow(g1, gu.after(i)[a.gu_k]);
            }
        }
    }
    // The rows' sums, always in the same order.
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 4; ++k) tile(0)[(k * ROWS + row) * COLUMNS] = sums[k];
    __syncthreads();
    if (row < 4 && place.exists) {
        WIDE sum = 0;
        for (int i = 0; i < ROWS; ++i) sum += tile(0)[(row * ROWS + i) * COLUMNS];
        a.sums[(place.sequence * 4 + row) * a.D + place.column] = sum;
    }
    if (row == 0 && place.exists) a.gc0[place.sequence * a.D + place.column] = lambda;
}

#endif
#endif
