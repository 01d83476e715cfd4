// The entries of a rule's file, which has defined walk(arguments, shared, scratch, sequence).
//
// entry      grid         block       needs
// verify_C   (C, 1, B)    32..1024    C > 1: sm_90 (a cluster of C blocks a sequence)

#pragma once
#include "tree.cuh"

// __launch_bounds__(..., 1): one block a multiprocessor is enough. Without the 1, ptxas spills to make
// room for two.
#define ENTRY(CLUSTER, ATTRIBUTE)                                                                  \
    extern "C" __global__ void __launch_bounds__(1024, 1) ATTRIBUTE verify_##CLUSTER(              \
        const __grid_constant__ Arguments a) {                                                     \
        __shared__ Shared shared;                                                                  \
        __shared__ Scratch scratch;                                                                \
        walk<CLUSTER>(a, shared, scratch, blockIdx.z);                                             \
    }

FOR_EACH_CLUSTER(ENTRY)
