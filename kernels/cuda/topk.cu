// Draft tokens: the likeliest of the heads' logits, put on their nodes of the draft tree.
//
// In:  logits_BMW; places_N, which of the M * R draft tokens each node has, or -1 where it has none of
//      them; token_map_W, the token id of each of the W, null where they are the same.
// Out: tokens_BN of those nodes. Draft token m * R + r is the one of rank r in row m: the likeliest
//      first, of those that tie the first in the row. NaN counts as minus infinity. But for ties
//      and NaN, these are torch.topk's.
// Floor: a row once from memory. Slices of it that have a token among the R likeliest are read again,
//      once for each of those, from the L2 cache.
//
// Each warp finds the best token of its slice. A token is among the R best of the row only if fewer
// than R are better. Known to be better are those of its own slice, and of each other slice its best,
// if that is: where these come to R, the token is out. Some R to 2 R are left, and one block puts
// them in order.
//
// entry    grid         block       needs
// topk_C   (C, M, B)    32..1024    C > 1: sm_90 (a cluster of C blocks a row)
//
// Compile with one of the macros of logits.cuh.
// B batch, M rows of a sequence, W tokens that heads can propose, R ranks (at most MAX_RANKS), N nodes.

#include "rows.cuh"

constexpr int MAX_RANKS = 32;

// All fields take 8 bytes. Strides count elements.
struct Arguments {
    const Logit* logits_BMW;
    long long logits_stride_b, logits_stride_m;
    const long long* places_N;
    const long long* token_map_W;
    long long* tokens_BN;  // out, contiguous
    long long num_tokens, num_ranks, num_nodes;
};

// A token and its logit in one number: the better, the smaller.
typedef unsigned long long Candidate;

constexpr Candidate NO_CANDIDATE = ~0ull;  // behind all

struct Scratch {
    Candidate best[MAX_SLICES];              // of each warp's slice
    Candidate listed[MAX_RANKS][MAX_RANKS];  // of the best slices, those that may be among the R best
    int top[MAX_RANKS];
};

__device__ __forceinline__ Candidate candidate_of(float x, int token) {
    return (Candidate)key_of(x) << 32 | (unsigned)token;
}

template <int CLUSTER>
__device__ __forceinline__ void put(Candidate* at, int rank, Candidate candidate) {
    if (CLUSTER == 1)
        *at = candidate;
    else
        store_remote(at, rank, candidate);
}

__device__ __forceinline__ Candidate least_of_warp(Candidate candidate) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1)
        candidate = min(candidate, __shfl_xor_sync(0xffffffffu, candidate, step));
    return candidate;
}

// The best candidate of a slice behind another, for all lanes; 0 stands before all.
__device__ __forceinline__ Candidate best_behind(Candidate before, const Logit* row, int from, int to) {
    const int lane = threadIdx.x & 31;
    const int past = (int)(((unsigned long long)(row + from) & 15) / sizeof(Logit));
    const int body = min(from + (PACK - past) % PACK, to);  // where loads of 16 bytes are aligned
    const int num_loads = (to - body) / PACK;
    const uint4* source = (const uint4*)(row + body);
    Candidate best = NO_CANDIDATE;
    const auto see = [&](float x, int token) {
        const Candidate candidate = candidate_of(x, token);
        if (candidate > before) best = min(best, candidate);
    };
    if (from + lane < body) see(to_float(row[from + lane]), from + lane);
#pragma unroll 1
    for (int first = lane; first < num_loads; first += 32 * LOADS) {
        uint4 raw[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; ++k)
            if (first + 32 * k < num_loads) raw[k] = __ldg(source + first + 32 * k);
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            if (first + 32 * k >= num_loads) break;
            float x[PACK];
            unpack(raw[k], x);
#pragma unroll
            for (int i = 0; i < PACK; ++i) see(x[i], body + (first + 32 * k) * PACK + i);
        }
    }
    const int tail = body + num_loads * PACK + lane;
    if (tail < to) see(to_float(row[tail]), tail);
    return least_of_warp(best);
}

// How many slices have a better candidate as their best; all lanes get it.
__device__ __forceinline__ int num_better(const Candidate* best, int num_slices, Candidate candidate) {
    int count = 0;
#pragma unroll 1
    for (int first = 0; first < num_slices; first += 32) {
        const int slice = first + (int)(threadIdx.x & 31);
        count += __popc(__ballot_sync(0xffffffffu, slice < num_slices && best[slice] < candidate));
    }
    return count;
}

// List what of a warp's slice may be among the best of the row, in block 0. Each of the best R slices
// has a list of its own, by its rank.
template <int CLUSTER>
__device__ __forceinline__ void list_slice(Scratch& scratch, const Logit* row, int from, int to,
                                           Candidate candidate, int num_ranks) {
    const int num_slices = CLUSTER * (int)(blockDim.x >> 5);
    int list = 0;
#pragma unroll 1
    for (int own = 0; own < num_ranks && candidate != NO_CANDIDATE; ++own) {
        const int better = num_better(scratch.best, num_slices, candidate);
        if (own == 0) list = better;
        // From the second token on, its own slice is one of those whose best is better.
        if (better + max(own - 1, 0) >= num_ranks) return;
        if ((threadIdx.x & 31) == 0) put<CLUSTER>(&scratch.listed[list][own], 0, candidate);
        if (own + 1 < num_ranks) candidate = best_behind(candidate, row, from, to);
    }
}

// Put what is listed in order.
__device__ __forceinline__ void rank_listed(Scratch& scratch, int num_ranks) {
    for (int i = threadIdx.x; i < num_ranks * num_ranks; i += blockDim.x) {
        const Candidate candidate = scratch.listed[i / num_ranks][i % num_ranks];
        if (candidate == NO_CANDIDATE) continue;
        int rank = 0;
        for (int list = 0; list < num_ranks && rank < num_ranks; ++list)
            for (int n = 0; n < num_ranks && scratch.listed[list][n] < candidate; ++n) ++rank;
        if (rank < num_ranks) scratch.top[rank] = (int)(unsigned)candidate;
    }
}

template <int CLUSTER>
__device__ __forceinline__ void topk(const Arguments& a, Scratch& scratch) {
    const long long m = blockIdx.y, b = blockIdx.z;
    const int num_warps = blockDim.x >> 5, lane = threadIdx.x & 31;
    const int num_tokens = (int)a.num_tokens, num_ranks = (int)a.num_ranks;
    const int slot = cluster_rank<CLUSTER>() * num_warps + (threadIdx.x >> 5);
    const int length = slice_length(num_tokens, CLUSTER * num_warps);
    const int from = min(slot * length, num_tokens), to = min(from + length, num_tokens);
    const Logit* row = a.logits_BMW + b * a.logits_stride_b + m * a.logits_stride_m;
    for (int i = threadIdx.x; i < num_ranks * num_ranks; i += blockDim.x)
        scratch.listed[i / num_ranks][i % num_ranks] = NO_CANDIDATE;
    const Candidate best = best_behind(0, row, from, to);
    cluster_sync<CLUSTER>();  // before one block writes to another, both must run
    if (lane < CLUSTER) put<CLUSTER>(&scratch.best[slot], lane, best);
    cluster_sync<CLUSTER>();
    list_slice<CLUSTER>(scratch, row, from, to, best, num_ranks);
    cluster_sync<CLUSTER>();
    if (cluster_rank<CLUSTER>() > 0) return;
    rank_listed(scratch, num_ranks);
    __syncthreads();
    for (int n = threadIdx.x; n < (int)a.num_nodes; n += blockDim.x) {
        const long long place = a.places_N[n];
        if (place < 0 || place / num_ranks != m) continue;
        const int found = scratch.top[place % num_ranks];
        a.tokens_BN[b * a.num_nodes + n] = a.token_map_W ? a.token_map_W[found] : found;
    }
}

#define ENTRY(CLUSTER, ATTRIBUTE)                                                                  \
    extern "C" __global__ void __launch_bounds__(1024, 1) ATTRIBUTE topk_##CLUSTER(                \
        const __grid_constant__ Arguments a) {                                                     \
        __shared__ Scratch scratch;                                                                \
        topk<CLUSTER>(a, scratch);                                                                 \
    }

FOR_EACH_CLUSTER(ENTRY)
