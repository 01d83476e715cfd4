// Statistics of one row of logits, known to every thread of a block or of a cluster of blocks.
//
// One warp streams a slice of a row; the warps of a block, or of a cluster of blocks, take one slice
// each. Every logit is read once, 16 bytes a load, four loads in flight in each thread: a block of
// 1024 threads keeps 64 KB in flight, where an H100 needs 16 KB in each multiprocessor for its 3 TB/s.

#pragma once
#include "logits.cuh"

constexpr int LOADS = 4;         // in flight in each thread
constexpr int MAX_SLICES = 256;  // of a row, one to a warp: 32 warps, 8 blocks

// ---- streaming ------------------------------------------------------------------------------

// Length of each of `parts` slices of `count` logits, in whole cache lines; the last may be empty.
__device__ __forceinline__ int slice_length(int count, int parts) {
    return ((count + parts - 1) / parts + LINE - 1) / LINE * LINE;
}

// One warp reads row[begin, end); each lane returns what it saw.
template <bool SUMS>
__device__ __forceinline__ Statistics stream(const Logit* row, int begin, int end, float scale) {
    Statistics s = nothing();
    if (begin >= end) return s;
    const int lane = threadIdx.x & 31;
    const int past = (int)(((unsigned long long)(row + begin) & 15) / sizeof(Logit));
    const int body = min(begin + (PACK - past) % PACK, end);  // where loads are aligned
    const int num_loads = (end - body) / PACK;
    const uint4* source = (const uint4*)(row + body);
    if (begin + lane < body) add<SUMS>(s, to_float(row[begin + lane]), begin + lane, scale);
    for (int first = lane; first < num_loads; first += 32 * LOADS) {
        uint4 raw[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            raw[k] = {FILL, FILL, FILL, FILL};
            if (first + 32 * k < num_loads) raw[k] = __ldg(source + first + 32 * k);
        }
        float largest = NEGATIVE_INFINITY;
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            float x[PACK];
            unpack(raw[k], x);
#pragma unroll
            for (int i = 0; i < PACK; ++i) largest = fmaxf(largest, x[i]);
        }
        if (largest > s.largest) {  // rare: where it is, is looked up only here
            raise<SUMS>(s, largest, scale);
#pragma unroll
            for (int k = LOADS - 1; k >= 0; --k) {
                float x[PACK];
                unpack(raw[k], x);
#pragma unroll
                for (int i = PACK - 1; i >= 0; --i)
                    if (x[i] == largest) s.argmax = body + (first + 32 * k) * PACK + i;
            }
        }
#pragma unroll
        for (int k = 0; SUMS && k < LOADS; ++k) {
            float x[PACK];
            unpack(raw[k], x);
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                const float y = exponent(x[i], s.largest, scale);
                const float mass = exp2_fast(y);
                s.sum += mass;
                s.slope += y * mass;
            }
        }
    }
    const int tail = body + num_loads * PACK + lane;
    if (tail < end) add<SUMS>(s, to_float(row[tail]), tail, scale);
    return s;
}

// ---- a block, or a cluster of them, on one row ---------------------------------------------

struct Slices {
    Statistics of[2][MAX_SLICES];  // of each warp's slice; exchanges take turns
    int turn;
};

#ifndef CUDA_SHIM
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <int CLUSTER>
__device__ __forceinline__ int cluster_rank() {
    unsigned rank = 0;
    if (CLUSTER > 1) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return (int)rank;
}
template <int CLUSTER>
__device__ __forceinline__ void cluster_sync() {
    if (CLUSTER == 1) {
        __syncthreads();
    } else {
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
}
// Write to the same place in another block's shared memory.
__device__ __forceinline__ void store_remote(Statistics* at, int rank, const Statistics& s) {
    unsigned address = (unsigned)__cvta_generic_to_shared(at), there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(there),
                 "r"(__float_as_int(s.largest)), "r"(__float_as_int(s.sum)),
                 "r"(__float_as_int(s.slope)), "r"(s.argmax)
                 : "memory");
}
__device__ __forceinline__ void store_remote(unsigned long long* at, int rank,
                                             unsigned long long value) {
    unsigned address = (unsigned)__cvta_generic_to_shared(at), there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(there), "l"(value) : "memory");
}
// Read the same place in a block's shared memory; a barrier of the cluster has to come before.
template <int CLUSTER>
__device__ __forceinline__ unsigned load_remote(const unsigned* at, int rank) {
    if (CLUSTER == 1) return *at;
    unsigned address = (unsigned)__cvta_generic_to_shared(at), there, value;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(there) : "memory");
    return value;
}
#else  // no clusters before sm_90: the entries that need them are not compiled
template <int CLUSTER>
__device__ __forceinline__ int cluster_rank() { return 0; }
template <int CLUSTER>
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ void store_remote(Statistics*, int, const Statistics&) {}
__device__ __forceinline__ void store_remote(unsigned long long*, int, unsigned long long) {}
template <int CLUSTER>
__device__ __forceinline__ unsigned load_remote(const unsigned* at, int) { return *at; }
#endif
#endif

// ENTRY(blocks, attribute) for each size of a cluster that there is.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FOR_EACH_CLUSTER(ENTRY)           \
    ENTRY(1, )                            \
    ENTRY(2, __cluster_dims__(2, 1, 1))   \
    ENTRY(4, __cluster_dims__(4, 1, 1))   \
    ENTRY(8, __cluster_dims__(8, 1, 1))
#else
#define FOR_EACH_CLUSTER(ENTRY) ENTRY(1, )
#endif

// Give every thread what all warps saw. Each call writes where the one before it did not, so that
// one barrier is enough: a warp that is still reading is at most one call behind.
template <bool SUMS, int CLUSTER>
__device__ __forceinline__ Statistics exchange(Slices& slices, Statistics s, int turn, float scale) {
    const int lane = threadIdx.x & 31, num_warps = blockDim.x >> 5;
    const int slot = cluster_rank<CLUSTER>() * num_warps + (threadIdx.x >> 5);
    s = merge_warp<SUMS>(s, scale);
    if (CLUSTER == 1) {
        if (lane == 0) slices.of[turn][slot] = s;
    } else if (lane < CLUSTER) {
        store_remote(&slices.of[turn][slot], lane, s);
    }
    cluster_sync<CLUSTER>();
    s = nothing();
#pragma unroll 1
    for (int i = lane; i < CLUSTER * num_warps; i += 32)
        s = merge<SUMS>(s, slices.of[turn][i], scale);
    return merge_warp<SUMS>(s, scale);
}

// Infinite logits share all the mass: count them.
__device__ __forceinline__ Statistics count_infinite(const Logit* row, int begin, int end) {
    Statistics s = nothing();
#pragma unroll 1
    for (int i = begin + (int)(threadIdx.x & 31); i < end; i += 32)
        if (to_float(row[i]) == POSITIVE_INFINITY)
            s = {POSITIVE_INFINITY, s.sum + 1.0f, 0.0f, min(s.argmax, i)};
    return s;
}

// All threads of the block (or cluster) call this; all get the statistics of the row.
// Afterwards slices.of[turn] has those of the warps' slices.
template <bool SUMS, int CLUSTER>
__device__ __forceinline__ Statistics row_statistics(Slices& slices, int& turn, const Logit* row,
                                                     int vocab_size, float scale) {
    const int num_warps = blockDim.x >> 5;
    const int slot = cluster_rank<CLUSTER>() * num_warps + (threadIdx.x >> 5);
    const int length = slice_length(vocab_size, CLUSTER * num_warps);
    const int from = min(slot * length, vocab_size), to = min(from + length, vocab_size);
    turn ^= 1;
    Statistics s = exchange<SUMS, CLUSTER>(slices, stream<SUMS>(row, from, to, scale), turn, scale);
    if (SUMS && s.largest == POSITIVE_INFINITY) {
        turn ^= 1;
        s = exchange<SUMS, CLUSTER>(slices, count_infinite(row, from, to), turn, scale);
    }
    return s;
}
