// Statistics of logits: largest, argmax, sum of exponentials, entropy; of a row, or of a part of one.
//
// Compile with one of -DLOGIT_FLOAT32, -DLOGIT_FLOAT16, -DLOGIT_BFLOAT16. No header is needed.
// NaN counts as minus infinity. V vocabulary.

#pragma once

#define NEGATIVE_INFINITY __int_as_float(0xff800000)
#define POSITIVE_INFINITY __int_as_float(0x7f800000)

constexpr int NO_TOKEN = 0x7fffffff;
constexpr float SMALLEST_EXPONENT = -126.0f;  // 2^-126 beside a sum of at least 1 is nothing

#if defined(LOGIT_FLOAT32)
typedef float Logit;
constexpr unsigned FILL = 0xff800000u;  // minus infinity, in every part of the word
#elif defined(LOGIT_FLOAT16)
typedef unsigned short Logit;  // the bits
constexpr unsigned FILL = 0xfc00fc00u;
#elif defined(LOGIT_BFLOAT16)
typedef unsigned short Logit;
constexpr unsigned FILL = 0xff80ff80u;
#else
#error "define LOGIT_FLOAT32, LOGIT_FLOAT16 or LOGIT_BFLOAT16"
#endif

constexpr int PACK = 16 / sizeof(Logit);   // logits to a load of 16 bytes
constexpr int LINE = 128 / sizeof(Logit);  // logits to a cache line

// ---- numbers --------------------------------------------------------------------------------

#ifndef CUDA_SHIM
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}
#endif

__device__ __forceinline__ float to_float(Logit x) {
#if defined(LOGIT_FLOAT32)
    return x;
#elif defined(LOGIT_FLOAT16)
    return half_to_float(x);
#else
    return __int_as_float((int)((unsigned)x << 16));
#endif
}

__device__ __forceinline__ void unpack(unsigned word, float* x) {
#if defined(LOGIT_FLOAT32)
    x[0] = __int_as_float((int)word);
#elif defined(LOGIT_FLOAT16)
    x[0] = half_to_float((unsigned short)(word & 0xffffu));
    x[1] = half_to_float((unsigned short)(word >> 16));
#else
    x[0] = __int_as_float((int)(word << 16));
    x[1] = __int_as_float((int)(word & 0xffff0000u));
#endif
}

__device__ __forceinline__ void unpack(const uint4& words, float* x) {
    unpack(words.x, x);
    unpack(words.y, x + PACK / 4);
    unpack(words.z, x + PACK / 2);
    unpack(words.w, x + PACK * 3 / 4);
}

// A sort key: the larger a logit, the lower; equal ones have the same. NaN counts as minus infinity.
__device__ __forceinline__ unsigned key_of(float x) {
    unsigned bits = (unsigned)__float_as_int(x);  // no arithmetic: it would flush the smallest to 0
    if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;
    if (bits == 0x80000000u) bits = 0u;
    return bits >> 31 ? bits : bits ^ 0x7fffffffu;
}

// ---- what is known of a row, or of a part of one ----------------------------------------------

// With y = (x - largest) * scale and scale = log2(e) / temperature, so that 2^y is a token's mass:
struct alignas(16) Statistics {
    float largest;  // minus infinity: nothing above it was seen, and the sums mean nothing
    float sum;      // of 2^y
    float slope;    // of y 2^y: the entropy in bits is log2(sum) - slope / sum
    int argmax;     // the lowest token of the largest logit
};

__device__ __forceinline__ Statistics nothing() {
    return {NEGATIVE_INFINITY, 0.0f, 0.0f, NO_TOKEN};
}

__device__ __forceinline__ float exponent(float x, float largest, float scale) {
    return fmaxf((x - largest) * scale, SMALLEST_EXPONENT);  // of NaN and a number, the number
}

// Take a new largest logit: the sums so far shrink.
template <bool SUMS>
__device__ __forceinline__ void raise(Statistics& s, float largest, float scale) {
    if (SUMS) {
        const float y = exponent(s.largest, largest, scale);
        const float shrink = s.largest > NEGATIVE_INFINITY ? exp2_fast(y) : 0.0f;
        s.slope = shrink * (s.slope + y * s.sum);
        s.sum = shrink * s.sum;
    }
    s.largest = largest;
}

template <bool SUMS>
__device__ __forceinline__ void add(Statistics& s, float x, int token, float scale) {
    if (x > s.largest) {
        raise<SUMS>(s, x, scale);
        s.argmax = token;
    }
    if (SUMS) {
        const float y = exponent(x, s.largest, scale);
        const float mass = exp2_fast(y);
        s.sum += mass;
        s.slope += y * mass;
    }
}

template <bool SUMS>
__device__ __forceinline__ Statistics merge(Statistics a, Statistics b, float scale) {
    if (b.largest > a.largest || (b.largest == a.largest && b.argmax < a.argmax)) {
        const Statistics c = a;
        a = b;
        b = c;
    }
    if (SUMS && b.largest > NEGATIVE_INFINITY) {
        const float y = a.largest == b.largest ? 0.0f : exponent(b.largest, a.largest, scale);
        const float shrink = exp2_fast(y);
        a.sum += shrink * b.sum;
        a.slope += shrink * (b.slope + y * b.sum);
    }
    return a;
}

template <bool SUMS>
__device__ __forceinline__ Statistics merge_warp(Statistics s, float scale) {
#pragma unroll 1
    for (int step = 16; step > 0; step >>= 1) {
        Statistics other = nothing();
        other.largest = __shfl_xor_sync(0xffffffffu, s.largest, step);
        other.argmax = __shfl_xor_sync(0xffffffffu, s.argmax, step);
        if (SUMS) {
            other.sum = __shfl_xor_sync(0xffffffffu, s.sum, step);
            other.slope = __shfl_xor_sync(0xffffffffu, s.slope, step);
        }
        s = merge<SUMS>(s, other, scale);
    }
    return s;
}

// A row of nothing but minus infinity has its mass, 1, on token 0.
__device__ __forceinline__ Statistics finished(Statistics s) {
    if (!(s.largest > NEGATIVE_INFINITY)) return {NEGATIVE_INFINITY, 1.0f, 0.0f, 0};
    return s;
}

// A token's share of `finished(...).sum`; exactly 0 where its probability is.
__device__ __forceinline__ float mass_of(float x, int token, float largest, float scale) {
    if (!(largest > NEGATIVE_INFINITY)) return token == 0 ? 1.0f : 0.0f;
    if (largest == POSITIVE_INFINITY) return x == largest ? 1.0f : 0.0f;
    return x > NEGATIVE_INFINITY ? exp2_fast((x - largest) * scale) : 0.0f;
}
