// The part of CUDA C++ that our kernels use, for g++ (see scheduler.h for how it runs).

#pragma once
#include "scheduler.h"

#include <cmath>
#include <type_traits>

#define CUDA_SHIM 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ static __attribute__((section("shim_shared")))

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };

inline uint3 shim_unflat(unsigned thread) {
    const dim3& size = shim::machine.threads;
    return {thread % size.x, thread / size.x % size.y, thread / size.x / size.y};
}
#define threadIdx (shim_unflat(shim::machine.fiber->thread))
#define blockIdx (shim::machine.block->index)
#define blockDim (shim::machine.threads)
#define gridDim (shim::machine.grid)

// ---- barriers and warp operations: each place in the text has a number --------------------------

#define SHIM_SITE (__LINE__ * 1000 + __COUNTER__ % 1000)
#define __syncthreads() ((void)shim::barrier(SHIM_SITE))

template <class T>
uint64_t shim_bits(T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T>
T shim_value(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int shim_lane() { return (int)(shim::machine.fiber->thread % 32); }

template <class T>
T shim_shuffle(unsigned mask, T value, int source) {
    const int from = source >= 0 && source < 32 ? source : shim_lane();
    return shim_value<T>(shim::exchange(mask, shim_bits(value), -1,
                                        [&](const uint64_t* slot) { return slot[from]; }));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) { return shim_shuffle(mask, value, lane & 31); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) { return shim_shuffle(mask, value, shim_lane() ^ step); }
template <class T>
T __shfl_up_sync(unsigned mask, T value, int step) { return shim_shuffle(mask, value, shim_lane() - step); }

inline unsigned __ballot_sync(unsigned mask, int vote) {
    return (unsigned)shim::exchange(mask, vote != 0, -2, [&](const uint64_t* slot) {
        uint64_t votes = 0;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1 && slot[lane]) votes |= 1u << lane;
        return votes;
    });
}

inline void __threadfence() {}

// ---- memory: blocks run one after another, so that plain accesses are atomic --------------------

template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) { return std::exchange(*at, (T)(*at + value)); }
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) { return std::exchange(*at, std::max(*at, value)); }
inline unsigned atomicInc(unsigned* at, unsigned limit) { return std::exchange(*at, *at >= limit ? 0 : *at + 1); }
template <class T>
T __ldg(const T* at) { return *at; }
template <class T>
T __ldcg(const T* at) { return *at; }

// ---- numbers ----------------------------------------------------------------------------------

inline float __int_as_float(int bits) { return shim_value<float>((unsigned)bits); }
inline int __float_as_int(float value) { return (int)shim_bits(value); }
inline int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz((unsigned)bits) : 32; }
using std::max;
using std::min;

// ---- what the kernels say in PTX ----------------------------------------------------------------

inline float exp2_fast(float x) {  // denormal results are zero, as with .ftz
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}

inline float half_to_float(unsigned short bits) {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023u;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
    const unsigned wide = exponent == 31 ? 0xffu : exponent + 112;
    return __int_as_float((int)(sign | wide << 23 | fraction << 13));
}

template <int CLUSTER>
int cluster_rank() { return (int)(blockIdx.x % CLUSTER); }

template <int CLUSTER>
void cluster_sync() {
    if (CLUSTER == 1)
        __syncthreads();
    else
        shim::cluster_barrier(SHIM_SITE);
}

template <class T>
void store_remote(T* at, int rank, const T& value) { *shim::remote(at, (unsigned)rank) = value; }

template <int CLUSTER>
unsigned load_remote(const unsigned* at, int rank) { return *shim::remote(const_cast<unsigned*>(at), (unsigned)rank); }
