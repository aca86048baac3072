// Kernels in which a block owns tiles (LOOK 2), with LANES 1; follows recurrence.cu.

#define ROWS (THREADS / COLUMNS)
#define TILE (ROWS * STEPS)

// A tile of shared memory, (TILE, COLUMNS).
__device__ __forceinline__ WIDE* tile(int number) {
    return reinterpret_cast<WIDE*>(shared_memory) + number * TILE * COLUMNS + threadIdx.x % COLUMNS;
}

// The steps of a thread, from step `first`, ROWS apart, like the strides of the reader.
__device__ __forceinline__ void read_rows(const Arguments& a, Reader& reader, long long first, Step (&steps)[STEPS]) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        const long long i = first + ROWS * k;
        if (i < a.T) steps[k] = reader.here(i == a.T - 1);
        else steps[k].pad = true;  // the state does not change after the end
        reader.advance();
    }
}

#if !BACKWARD

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward(const __grid_constant__ Arguments a) {
    const Place place(a);
    const int row = threadIdx.x / COLUMNS;
    const Gate f_gate(a.v, a.b, place), r_gate(a.v + a.D, a.b + a.D, place);
    const Weights weights(a, place);
    Reader reader(a, place);
    reader.share(row, ROWS);
    Walk<U_TYPE> h(a.h + place.sequence * a.D + place.column, a.B * a.D, place);
    Walk<WIDE> states(a.c + place.sequence * a.D + place.column, a.B * a.D, place);
    h.share(row, ROWS);
    states.share(row, ROWS);
    // If all v of the block are 0 (the cell of 2017), gates do not depend on states.
    const bool waits = __syncthreads_or(a.v[place.column] != 0);
    WIDE *gates = tile(0), *candidates = tile(1), *after = tile(2), c = a.c0[place.sequence * a.c0_b + place.column];
    Step ahead[STEPS];
    read_rows(a, reader, row, ahead);
    for (long long first = 0; first < a.T; first += TILE) {
        Step steps[STEPS];
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            steps[k] = ahead[k];
            const WIDE ready = f_gate.ready(0, steps[k].u1.number[0]);
            // At padding the gate is 1 and the candidate 0, which keeps the state exactly.
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
            if (first + row + ROWS * k >= a.T || !place.exists) break;
            const int at = (row + ROWS * k) * COLUMNS;
            const WIDE x = steps[k].skip(weights.scale, 0), state = after[at + COLUMNS];
            const WIDE r = r_gate.open(0, steps[k].u2.number[0], after[at]);
            const WIDE result = weights.mask[0] * r * (activate(state) - x) + x;
            narrow(steps[k].pad ? WIDE(0) : result, *h.at);
            h.advance();
            if (KEEP) *states.at = state;
            states.advance();
        }
    }
    if (row == 0 && place.exists) a.c_last[place.sequence * a.D + place.column] = c;
}

#else

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward(const __grid_constant__ Arguments a) {
    const Place place(a);
    const int row = threadIdx.x / COLUMNS;
    const Gate f_gate(a.v, a.b, place), r_gate(a.v + a.D, a.b + a.D, place);
    const Weights weights(a, place);
    Reader reader(a, place);
    reader.share(row, ROWS);
    Walk<U_TYPE> gu(a.gu + place.sequence * a.gu_b + place.column, a.gu_t, place);
    Walk<X_TYPE> gx(a.gx + place.sequence * a.gx_b + place.column, a.gx_t, place);
    gu.share(row, ROWS);
    gx.share(row, ROWS);
    Walk<U_TYPE> gu2 = gu;  // one phase ahead of the others
    gu2.at += 2 * a.gu_k;
    const WIDE v_f = a.v[place.column], v_r = a.v[a.D + place.column];
    WIDE *totals = tile(0), *jacobians = tile(1), *from_resets = tile(2);
    WIDE lambda = a.gc_last[place.sequence * a.gc_last_b + place.column], sums[4] = {};
    Step ahead[STEPS];
    read_rows(a, reader, row, ahead);
    for (long long first = 0; first < a.T; first += TILE) {
        WIDE to_u0[STEPS], to_forget[STEPS], before[STEPS];
        bool padded[STEPS];
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            const Step& in = ahead[k];
            const Parts parts(a, in, 0, f_gate, r_gate, weights, v_f, v_r);
            const long long i = first + row + ROWS * k;
            const int at = (row + ROWS * k) * COLUMNS;
            const WIDE g2 = in.pad ? WIDE(0) : parts.g2;
            totals[at] = in.pad ? WIDE(0) : parts.own;
            jacobians[at] = in.pad ? WIDE(1) : parts.jacobian;
            from_resets[at] = in.pad ? WIDE(0) : parts.from_reset;
            padded[k] = in.pad;
            to_u0[k] = parts.to_u0;
            to_forget[k] = parts.to_forget;
            before[k] = i < a.T ? in.c.number[0] : WIDE(0);
            sums[1] += g2 * before[k];
            sums[3] += g2;
            if (i < a.T && place.exists) {
                narrow(g2, *gu2.at);
                if (SKIP && a.gx) narrow(in.pad ? WIDE(0) : parts.gx, *gx.at);
            }
            gu2.advance();
            gx.advance();
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
            const WIDE total = totals[(row + ROWS * k) * COLUMNS], g1 = padded[k] ? WIDE(0) : total * to_forget[k];
            sums[0] += g1 * before[k];
            sums[2] += g1;
            if (i < a.T && place.exists) {
                narrow(padded[k] ? WIDE(0) : total * to_u0[k], gu.at[0]);
                narrow(g1, gu.at[a.gu_k]);
            }
            gu.advance();
        }
    }
    // Sum over the rows, always in the same order.
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
