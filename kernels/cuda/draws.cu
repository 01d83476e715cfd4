// Draft tokens drawn from the heads' distributions, without replacement, in the order of the draws.
//
// In:  q_BMW, float32 and contiguous along W, of any sum; it may be the same for all M (stride 0).
//      uniforms_BMR, a number in [0, 1) for each draw.
// Out: tokens_BMR, places among the W. Draw r is the token at uniforms[r] of what the draws before it
//      have left, laid end to end: that of decode/sampled.py, draw, but for the last digits of a
//      float32. Where nothing is left, it is the last of the W, which is then never accepted.
// Floor: q once, 4 bytes a token; each draw reads one slice of it again, to find the token and to sum
//      what that leaves. (A sum of all, less what was taken, would round away what is left by a
//      head that is nearly sure.)
//
// Grid (1, M, B): a block draws from one distribution. Block 32..1024. Compile with -DLOGIT_FLOAT32,
// which rows.cuh asks for.
// B batch, M distributions of a depth, W tokens that heads can propose, R draws (at most MAX_DRAWS).

#include "draw.cuh"

constexpr int MAX_DRAWS = 256;

// All fields take 8 bytes. Strides count elements.
struct Arguments {
    const float* q_BMW;
    long long q_stride_b, q_stride_m;
    const float* uniforms_BMR;
    long long uniforms_stride_b, uniforms_stride_m;
    long long* tokens_BMR;
    long long num_tokens, num_draws;
};

struct Rest {
    const float* q_W;
    int vocab_size;
    const int* taken;
    int num_taken;

    __device__ __forceinline__ float mass_at(int token) const { return fmaxf(q_W[token], 0.0f); }
    __device__ __forceinline__ unsigned taken_among(int first) const {
        return among(taken, num_taken, first);
    }
};

struct Scratch {
    int taken[MAX_DRAWS];
    Crossing crossing;
    float slice_mass[32];  // one to a warp
};

// A warp sums its slice anew, without what is taken.
__device__ __forceinline__ void sum_slice(const Rest& rest, Scratch& scratch, int length) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int from = min(warp * length, rest.vocab_size), to = min(from + length, rest.vocab_size);
    float sum = 0.0f;
#pragma unroll 1
    for (int first = from; first < to; first += 32 * LOADS) {
        float mass[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int token = first + 32 * k + lane;
            mass[k] = token < to ? rest.mass_at(token) : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < LOADS; ++k)
            if (!(rest.taken_among(first + 32 * k) >> lane & 1)) sum += mass[k];
    }
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) scratch.slice_mass[warp] = sum;
}

extern "C" __global__ void __launch_bounds__(1024, 1) draws(const __grid_constant__ Arguments a) {
    __shared__ Scratch scratch;
    const long long m = blockIdx.y, b = blockIdx.z;
    const int vocab_size = (int)a.num_tokens, num_draws = (int)a.num_draws;
    const int num_warps = blockDim.x >> 5, warp = threadIdx.x >> 5;
    const int length = slice_length(vocab_size, num_warps);
    const float* q_W = a.q_BMW + b * a.q_stride_b + m * a.q_stride_m;
    const float* uniforms_R = a.uniforms_BMR + b * a.uniforms_stride_b + m * a.uniforms_stride_m;
    long long* tokens_R = a.tokens_BMR + (b * gridDim.y + m) * num_draws;
    sum_slice({q_W, vocab_size, scratch.taken, 0}, scratch, length);
    __syncthreads();
#pragma unroll 1
    for (int r = 0; r < num_draws; ++r) {
        float total = 0.0f;
#pragma unroll 1
        for (int i = 0; i < num_warps; ++i) total += scratch.slice_mass[i];
        const float mass = (int)threadIdx.x < num_warps ? scratch.slice_mass[threadIdx.x] : 0.0f;
        const Rest rest = {q_W, vocab_size, scratch.taken, r};
        int token = draw(rest, scratch.crossing, mass, num_warps, length, uniforms_R[r] * total);
        if (token < 0) token = vocab_size - 1;
        if (threadIdx.x == 0) {
            scratch.taken[r] = token;
            tokens_R[r] = token;
        }
        __syncthreads();
        if (warp == token / length)
            sum_slice({q_W, vocab_size, scratch.taken, r + 1}, scratch, length);
        __syncthreads();
    }
}
