// A rule's walk(arguments, shared, scratch, sequence) in; its kernels in three forms, out.
//
// entry      grid               block        needs
// read_rows  (splits, N, B)     32..1024
// walk_tree  (1, 1, B)          32..1024     read_rows before it; splits <= threads of the block
// fused      (splits, N, B)     32..512      counters that are zero; splits <= threads
// lazy_C     (C, 1, B)          32..1024     C > 1: sm_90 (a cluster of C blocks a sequence)

#pragma once
#include "tree.cuh"

// Read one split of one row, if the row matters. Return whether it does. All threads call this.
template <bool SUMS>
__device__ __forceinline__ bool read_split(const Arguments& a, Shared& shared) {
    const int split = blockIdx.x, node = blockIdx.y, sequence = blockIdx.z;
    const int num_splits = (int)a.num_splits, vocab_size = (int)a.vocab_size;
    load_parents(a, shared.tree, sequence);
    if (!shared.tree.has_children[node]) return false;
    const int length = slice_length(vocab_size, num_splits);
    const int begin = min(split * length, vocab_size), end = min(begin + length, vocab_size);
    int turn = 0;
    const Statistics s = row_statistics<SUMS, 1>(
        shared.slices, turn, row_of(a, sequence, node), begin, end, (float)a.scale);
    if (threadIdx.x == 0)
        a.partials_BNS[(sequence * a.num_nodes + node) * num_splits + split] = s;
    return true;
}

// Is this the last of the sequence's blocks? The counter wraps to zero by itself, so that a graph
// can be replayed. All threads call this, after thread 0 has written its partial.
__device__ __forceinline__ bool is_last_block(const Arguments& a, Tree& tree, int sequence) {
    if (threadIdx.x == 0) {
        __threadfence();  // the partial before the count
        const unsigned last = (unsigned)(tree.num_rows * a.num_splits - 1);
        tree.is_last = atomicInc(a.counters_B + sequence, last) == last;
    }
    __syncthreads();
    __threadfence();  // the count before the others' partials
    return tree.is_last;
}

// __launch_bounds__(..., 1): one block a multiprocessor is enough. Without the 1, ptxas spills to make
// room for two.
#define LAZY_ENTRY(CLUSTER, ATTRIBUTE)                                                             \
    extern "C" __global__ void __launch_bounds__(1024, 1) ATTRIBUTE lazy_##CLUSTER(                   \
        const __grid_constant__ Arguments a) {                                                     \
        __shared__ Shared shared;                                                                  \
        __shared__ Scratch scratch;                                                                \
        load_parents(a, shared.tree, blockIdx.z);                                                  \
        cluster_sync<CLUSTER>(); /* before one block writes to another, both must run */           \
        walk<true, CLUSTER>(a, shared, scratch, blockIdx.z);                                       \
    }

extern "C" __global__ void __launch_bounds__(1024, 1) read_rows(const __grid_constant__ Arguments a) {
    __shared__ Shared shared;
    read_split<NEEDS_SUMS>(a, shared);
}

extern "C" __global__ void __launch_bounds__(1024, 1) walk_tree(const __grid_constant__ Arguments a) {
    __shared__ Shared shared;
    __shared__ Scratch scratch;
    load_parents(a, shared.tree, blockIdx.z);
    walk<false, 1>(a, shared, scratch, blockIdx.z);
}

extern "C" __global__ void __launch_bounds__(512, 1) fused(const __grid_constant__ Arguments a) {
    __shared__ Shared shared;
    __shared__ Scratch scratch;
    if (!read_split<NEEDS_SUMS>(a, shared)) return;
    if (!is_last_block(a, shared.tree, blockIdx.z)) return;
    walk<false, 1>(a, shared, scratch, blockIdx.z);
}

LAZY_ENTRY(1, )
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
LAZY_ENTRY(2, __cluster_dims__(2, 1, 1))
LAZY_ENTRY(4, __cluster_dims__(4, 1, 1))
LAZY_ENTRY(8, __cluster_dims__(8, 1, 1))
#endif
