// Kernels in which a thread owns columns (LOOK 0 and 1); follows recurrence.cu.

// Reads step by step, directly or into slots of shared memory.
struct Ahead : Reader {
    long long left;

    __device__ __forceinline__ Ahead(const Arguments& a, const Place& p) : Reader(a, p), left(a.T) {}

    __device__ __forceinline__ Step next() {
        const Step step = here(left == 1);
        advance();
        --left;
        return step;
    }

    // Bytes of a number in a slot: at least four, the minimum of an asynchronous copy. For a two-byte number, the aligned
    // pair that contains it is copied; rows start at multiples of four bytes, so the parity of the column tells which half
    // it is.
    template <class T> static constexpr int SIZE = sizeof(Lanes<T>) < 4 ? 4 : sizeof(Lanes<T>);
    // Offsets of a step's arrays in a thread's part of a slot; the parts of a block's threads are adjacent.
    static constexpr int X_AT = 3 * SIZE<U_TYPE>, PAD_AT = X_AT + SKIP * SIZE<X_TYPE>, C_AT = PAD_AT + 8 * PAD;
    static constexpr int GH_AT = C_AT + BACKWARD * SIZE<WIDE>, BYTES = GH_AT + BACKWARD * SIZE<U_TYPE>;

    template <int SIZE>
    static __device__ __forceinline__ char* place(int slot, int offset) {
        return shared_memory + (slot * BYTES + offset) * THREADS + threadIdx.x * SIZE;
    }

    template <class T>
    static __device__ __forceinline__ void copy(int slot, int offset, const T* from) {
        const size_t at = sizeof(Lanes<T>) < 4 ? size_t(from) & ~size_t(3) : size_t(from);
        copy_ahead<SIZE<T>>(place<SIZE<T>>(slot, offset), reinterpret_cast<const void*>(at));
    }

    template <class T>
    static __device__ __forceinline__ Lanes<T> take(int slot, int offset, bool odd) {
        const char* at = place<SIZE<T>>(slot, offset);
        if constexpr (sizeof(Lanes<T>) < 4) {
            const unsigned pair = *reinterpret_cast<const unsigned*>(at);
            Lanes<T> lanes;
            lanes.number[0].bits = (unsigned short)(odd ? pair >> 16 : pair);
            return lanes;
        } else {
            return *reinterpret_cast<const Lanes<T>*>(at);
        }
    }

    __device__ __forceinline__ void next_into(int slot) {
#pragma unroll
        for (int k = 0; k < 3; ++k) copy(slot, k * SIZE<U_TYPE>, u.at + k * u_k);
        if (SKIP) copy(slot, X_AT, x.at);
        if (PAD) copy_ahead<4>(place<4>(slot, PAD_AT), (const void*)(size_t(pad.at) & ~size_t(3)));
        if (BACKWARD) {
            copy(slot, C_AT, left == 1 ? c0 : c.at);
            copy(slot, GH_AT, gh.at);
        }
        advance();
        --left;
    }

    // The step in a slot; `odd` is the parity of its column, pad_bits the last two bits of the address of its padding.
    static __device__ __forceinline__ Step from(int slot, bool odd, unsigned pad_bits) {
        Step step;
        step.u0 = take<U_TYPE>(slot, 0, odd);
        step.u1 = take<U_TYPE>(slot, SIZE<U_TYPE>, odd);
        step.u2 = take<U_TYPE>(slot, 2 * SIZE<U_TYPE>, odd);
        if (SKIP) step.x = take<X_TYPE>(slot, X_AT, odd);
        step.pad = PAD && *reinterpret_cast<const unsigned*>(place<4>(slot, PAD_AT)) >> 8 * pad_bits & 255;
        if (BACKWARD) {
            step.c = take<WIDE>(slot, C_AT, odd);
            step.gh = take<U_TYPE>(slot, GH_AT, odd);
        }
        return step;
    }
};

// Call `body` for all steps while later ones are being read.
template <class Body>
__device__ __forceinline__ void walk(const Arguments& a, const Place& place, Body body) {
    Ahead reader(a, place);
#if LOOK == 0
    Step ahead[STEPS];
#pragma unroll
    for (int k = 0; k < STEPS; ++k)
        if (k < a.T) ahead[k] = reader.next();
    long long t = 0;
    // No branch in the inner loop.
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
#else
    const bool odd = place.column & 1;
    const unsigned pad_start = unsigned(size_t(reader.pad.at)), pad_stride = unsigned(reader.pad.stride);
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        for (int k = 0; k < STEPS && reader.left > 0; ++k) reader.next_into(stage * STEPS + k);
        close_group();  // empty groups at the end keep the count constant
    }
    int stage = 0, free = (STAGES - 1) * STEPS;  // the slots read in the previous round
    for (long long t = 0; t < a.T; t += STEPS) {
        wait_for_groups<STAGES - 2>();
        const unsigned pad_at = pad_start + unsigned(t) * pad_stride;
        if (t + STEPS > a.T) {  // the last block, if it is shorter
#pragma unroll 1
            for (int k = 0; t + k < a.T; ++k) body(Ahead::from(stage * STEPS + k, odd, (pad_at + k * pad_stride) & 3));
            break;
        }
        Step now[STEPS];
#pragma unroll
        for (int k = 0; k < STEPS; ++k)
            now[k] = Ahead::from(stage * STEPS + k, odd, (pad_at + k * pad_stride) & 3);
        if (reader.left >= STEPS) {
#pragma unroll
            for (int k = 0; k < STEPS; ++k) {
                body(now[k]);
                reader.next_into(free + k);  // overlaps with the chain of states
            }
        } else {
#pragma unroll 1
            for (int k = 0; reader.left > 0; ++k) reader.next_into(free + k);
#pragma unroll
            for (int k = 0; k < STEPS; ++k) body(now[k]);
        }
        close_group();
        free = stage * STEPS;
        stage = (stage + 1) % STAGES;
    }
#endif
}

#if !BACKWARD

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward(const __grid_constant__ Arguments a) {
    const Place place(a);
    if (!place.exists) return;
    const long long row = place.sequence * a.D + place.column;
    const Gate f_gate(a.v, a.b, place), r_gate(a.v + a.D, a.b + a.D, place);
    const Weights weights(a, place);
    Walk<U_TYPE> h(a.h + row, a.B * a.D, place);
    Walk<WIDE> states(a.c + row, a.B * a.D, place);
    WIDE c[LANES];
#pragma unroll
    for (int i = 0; i < LANES; ++i) c[i] = a.c0[place.sequence * a.c0_b + place.column + i];
    walk(a, place, [&](const Step& in) {
        WIDE out[LANES];
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            const WIDE u0 = wide(in.u0.number[i]), x = in.skip(weights.scale, i);
            const WIDE f = forget(a, f_gate.open(i, in.u1.number[i], c[i]));
            const WIDE r = r_gate.open(i, in.u2.number[i], c[i]);
            const WIDE state = (c[i] - u0) * f + u0;
            const WIDE result = weights.mask[i] * r * (activate(state) - x) + x;
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

#else

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward(const __grid_constant__ Arguments a) {
    const Place place(a);
    if (!place.exists) return;
    const long long row = place.sequence * a.D + place.column;
    const Gate f_gate(a.v, a.b, place), r_gate(a.v + a.D, a.b + a.D, place);
    const Weights weights(a, place);
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
            const Parts parts(a, in, i, f_gate, r_gate, weights, v_f, v_r);
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

#endif
