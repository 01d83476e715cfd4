// The token at a place of a row's masses, laid end to end, of which something may be taken away.
//
// A Rest is what is left of a row:
//     int vocab_size;
//     float mass_at(int token) const;           // not negative
//     unsigned taken_among(int first) const;    // which of 32 tokens from `first` on have none, bits
//
// The row is cut into slices of slice_length (rows.cuh), whose masses are known. One of them is read
// again, from the L2 cache: the one that holds the place.

#pragma once
#include "rows.cuh"

// Which of 32 tokens from `first` on are among those that are taken?
__device__ __forceinline__ unsigned among(const int* taken, int num_taken, int first) {
    unsigned found = 0;
#pragma unroll 1
    for (int i = 0; i < num_taken; ++i) {
        const int place = taken[i] - first;
        if (place >= 0 && place < 32) found |= 1u << place;
    }
    return found;
}

struct Crossing {
    float warp_mass[32];
    int thread;    // whose interval holds what is looked for; -1: none
    float before;  // the mass before that thread's
    int token;
};

// Of all threads' masses, laid end to end: which one's holds `target`? Into at.thread and at.before;
// returns the sum of all. All threads call this.
//
// The sums of a scan round in an order of each lane's own: they may fall from one lane to the next,
// or rise where there is no mass. So a warp's first lane to pass the target has it, and never one
// without mass. Warps are added up in turn: exactly one of them holds a target below the sum.
__device__ __forceinline__ float find_crossing(Crossing& at, float mass, float target) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = blockDim.x >> 5;
    float end = mass;
    for (int step = 1; step < 32; step <<= 1) {
        const float before = __shfl_up_sync(0xffffffffu, end, step);
        if (lane >= step) end += before;
    }
    float start = __shfl_up_sync(0xffffffffu, end, 1);
    if (lane == 0) start = 0.0f;
    __syncthreads();  // everyone has read the last call's outcome
    if (lane == 31) at.warp_mass[warp] = end;
    if (threadIdx.x == 0) at.thread = -1;
    __syncthreads();
    float total = 0.0f, before = 0.0f, past = 0.0f;
#pragma unroll 1
    for (int i = 0; i < num_warps; ++i) {
        if (i == warp) before = total;
        total += at.warp_mass[i];
        if (i == warp) past = total;
    }
    const unsigned massive = __ballot_sync(0xffffffffu, mass > 0.0f);
    const unsigned passing = __ballot_sync(0xffffffffu, target < before + end) & massive;
    const int holder = passing ? __ffs(passing) - 1 : 31 - __clz((int)massive);
    if (before <= target && target < past && lane == holder) {
        at.thread = threadIdx.x;
        at.before = before + start;
    }
    __syncthreads();
    return total;
}

// The mass of the tokens of [from, to) that are left; names the last that has any.
template <class Rest>
__device__ __forceinline__ float mass_between(const Rest& rest, int from, int to, int& last) {
    float sum = 0.0f;
#pragma unroll 1
    for (int first = from; first < to; first += 32) {
        const unsigned taken = rest.taken_among(first);
#pragma unroll 4
        for (int i = 0; i < 32; ++i) {
            const bool is_left = first + i < to && !(taken >> i & 1);
            const float mass = is_left ? rest.mass_at(first + i) : 0.0f;
            if (mass > 0.0f) last = first + i;
            sum += mass;
        }
    }
    return sum;
}

// The token of [from, to) at which `sum` and the masses up to it pass `target`, else `last`.
template <class Rest>
__device__ __forceinline__ int token_at(const Rest& rest, int from, int to, float sum, float target,
                                        int last) {
#pragma unroll 1
    for (int token = from; token < to; ++token) {
        const float mass = rest.taken_among(token) & 1u ? 0.0f : rest.mass_at(token);
        sum += mass;
        if (mass > 0.0f && sum > target) return token;
    }
    return last;
}

// Find the token whose mass holds `target`; thread i brings the mass of slice i. Of the tokens that
// are left the last, if rounding leaves a target behind them; -1 if none is left. All threads call
// this.
template <class Rest>
__device__ __forceinline__ int draw(const Rest& rest, Crossing& at, float mass, int num_slices,
                                    int length, float target) {
    find_crossing(at, mass, target);
    int slice = at.thread;
    if (slice >= 0) target = fmaxf(target - at.before, 0.0f);
    // A slice found by sums may, by rounding, end just before the target: then the next has it.
#pragma unroll 1
    for (; slice >= 0 && slice < num_slices; ++slice) {
        const int start = min(slice * length, rest.vocab_size);
        const int stop = min(start + length, rest.vocab_size);
        const int share = (stop - start + (int)blockDim.x - 1) / (int)blockDim.x;
        const int from = min(start + (int)threadIdx.x * share, stop), to = min(from + share, stop);
        int token = -1;
        const float own = mass_between(rest, from, to, token);
        const float total = find_crossing(at, own, target);
        if (at.thread >= 0) {
            if (at.thread == (int)threadIdx.x)
                at.token = token_at(rest, from, to, at.before, target, token);
            __syncthreads();
            return at.token;
        }
        target = fmaxf(target - total, 0.0f);
    }
    if (threadIdx.x == 0) at.token = -1;
    __syncthreads();
    const int share = (rest.vocab_size + (int)blockDim.x - 1) / (int)blockDim.x;
    const int from = min((int)threadIdx.x * share, rest.vocab_size);
    int token = -1;
    mass_between(rest, from, min(from + share, rest.vocab_size), token);
    atomicMax(&at.token, token);
    __syncthreads();
    return at.token;
}
