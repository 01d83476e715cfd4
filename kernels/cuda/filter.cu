// Top-k and top-p: logits of which those that sampling never draws are minus infinity.
//
// In:  logits_RV, the temperature, top_k (0: none), top_p (1 or more: none).
// Out: a copy of them, without the tokens that are left out: first all that are less likely than
//      the k-th, then, in the order of their probabilities and of their numbers, all after the one
//      with which the sum reaches top_p. As decode/distribution.py, probabilities. What is left is
//      distributed as there: a softmax sees no difference between left out and minus infinity.
// Floor: a row once from memory and once into it. In between it is read from the L2 cache twice or
//      three times for each of both (float32: four or five times), and once more where tokens that
//      tie are parted.
//
// The place where a row is cut is found step by step: tokens are counted, or weighed, into 256 bins,
// and what lies in the bin with the cut into 256 again. The first bins are distances to the largest
// logit, on which tokens spread well; those after it are of the bits in which its logits can differ.
// Weights are integers, whose sums depend on no order: a mass of less than 2^-40 counts as none.
//
// entry      grid         block       needs
// filter_C   (C, N, B)    32..1024    C > 1: sm_90 (a cluster of C blocks a row)

#include "draw.cuh"

// All fields take 8 bytes. Strides count elements.
struct Arguments {
    const Logit* logits_BNV;
    long long logits_stride_b, logits_stride_n;
    Logit* filtered_BNV;  // out
    long long filtered_stride_b, filtered_stride_n;
    long long vocab_size, top_k;
    double scale;  // log2(e) / temperature
    double top_p;
};

typedef unsigned long long Weight;

constexpr int BINS = 256;
constexpr float BINS_PER_HALVING = 4.0f;  // of probability
constexpr int AHEAD = 8;                  // loads in flight in each thread
constexpr float UNIT = 549755813888.0f;   // 2^39: a mass of 1, and 2^24 of them fit into a Weight
#if defined(LOGIT_FLOAT32)
constexpr int UNUSED = 0;  // of the bits of a float, the last, which no logit of this type has
#elif defined(LOGIT_FLOAT16)
constexpr int UNUSED = 13;
#else
constexpr int UNUSED = 16;
#endif
constexpr unsigned UNUSED_BITS = (1u << UNUSED) - 1u;

struct Scratch {
    Slices slices;
    unsigned low[2][BINS], high[2][BINS];  // of this block's weights; passes take turns
    Weight total[BINS + BINS / 8];         // of the row's; see place_of
    Weight goal;
    int bin;  // that was found, with the weight before it and its own
    Weight above, own;
    Crossing crossing;
};

__device__ __forceinline__ Logit minus_infinity() {
#if defined(LOGIT_FLOAT32)
    return NEGATIVE_INFINITY;
#else
    return (Logit)(FILL & 0xffffu);
#endif
}

// ---- order -------------------------------------------------------------------------------------

// The larger a logit, the lower; equal ones have the same. NaN counts as minus infinity.
__device__ __forceinline__ unsigned order_of(float x) {
    unsigned bits = (unsigned)__float_as_int(x);  // no arithmetic: it would flush the smallest to 0
    if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;
    if (bits == 0x80000000u) bits = 0u;
    return bits >> 31 ? bits : bits ^ 0x7fffffffu;
}

// Bins in the order of logits, by how far they are below the largest.
__device__ __forceinline__ int distance_bin(float x, float largest, float scale) {
    if (x == largest) return 0;  // infinite ones, too
    return (int)fminf((largest - x) * scale * BINS_PER_HALVING, (float)(BINS - 1));
}

// A row, and the slice of it that this warp reads.
struct Row {
    const Logit* logits;
    int vocab_size, from, to;
    float largest, scale;

    template <class Body>
    __device__ __forceinline__ void each(Body body) const {
#pragma unroll 1
        for (int base = from + (int)(threadIdx.x & 31); base < to; base += 32 * AHEAD) {
            Logit raw[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; ++k)
                if (base + 32 * k < to) raw[k] = logits[base + 32 * k];
#pragma unroll
            for (int k = 0; k < AHEAD; ++k)
                if (base + 32 * k < to) body(to_float(raw[k]), raw[k], base + 32 * k);
        }
    }
};

__device__ __forceinline__ float logit_of(unsigned order) {
    return __int_as_float((int)(order >> 31 ? order : order ^ 0x7fffffffu));
}

// ---- finding the cut ---------------------------------------------------------------------------

// A row is cut among the tokens of an order.
struct Cut {
    unsigned order;
    Weight above, own, goal;  // the weight of lower orders, and of this one; what has to be reached
};

// What a thread puts into bins. Where a bin has nearly all tokens, they would wait for each other:
// so a thread goes there only when it has one for another bin.
struct Putting {
    unsigned* low;
    unsigned* high;
    int bin;
    Weight weight;

    __device__ __forceinline__ void flush() {
        if (weight == 0) return;
        const unsigned part = (unsigned)weight, before = atomicAdd(&low[bin], part);
        const unsigned rest = (unsigned)(weight >> 32) + (before + part < part);
        if (rest) atomicAdd(&high[bin], rest);
    }
    __device__ __forceinline__ void put(int into, Weight more) {
        if (into != bin) {
            flush();
            bin = into;
            weight = 0;
        }
        weight += more;
    }
};

// Where a bin stands in `total`: eight to a lane, on different banks.
__device__ __forceinline__ int place_of(int bin) { return bin + (bin >> 3); }

// Add up the bins of all blocks, and empty those of the next pass: whoever read them, in the last
// pass, has been to a barrier since. All threads call this.
template <int CLUSTER>
__device__ __forceinline__ void gather(Scratch& scratch, int turn) {
    cluster_sync<CLUSTER>();
#pragma unroll 1
    for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) {
        Weight total = 0;
#pragma unroll
        for (int rank = 0; rank < CLUSTER; ++rank) {
            const Weight high = load_remote<CLUSTER>(&scratch.high[turn][bin], rank);
            total += (high << 32) + load_remote<CLUSTER>(&scratch.low[turn][bin], rank);
        }
        scratch.total[place_of(bin)] = total;
        scratch.low[turn ^ 1][bin] = scratch.high[turn ^ 1][bin] = 0;
    }
    __syncthreads();
}

// Find the bin with which the sum, begun at `above`, reaches a goal, or a share of all if that is
// below 1. All threads call this.
__device__ __forceinline__ void find_bin(Scratch& scratch, Weight above, Weight goal, double share) {
    constexpr int EACH = BINS / 32;
    const int lane = threadIdx.x;
    if (lane < 32) {
        Weight own[EACH], sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) sum += own[i] = scratch.total[place_of(lane * EACH) + i];
        Weight end = sum;
        for (int step = 1; step < 32; step <<= 1) {
            const Weight before = __shfl_up_sync(0xffffffffu, end, step);
            if (lane >= step) end += before;
        }
        if (share < 1.0) {
            goal = (Weight)(share * (double)__shfl_sync(0xffffffffu, end, 31));
            goal = goal > 0 ? goal : 1;
        }
        if (lane == 0) scratch.goal = goal;
        above += end - sum;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (above < goal && goal <= above + own[i]) {  // of all bins, one
                scratch.bin = lane * EACH + i;
                scratch.above = above;
                scratch.own = own[i];
            }
            above += own[i];
        }
    }
    __syncthreads();
}

// The orders that a bin of distances may have.
__device__ __forceinline__ void bounds_of(int bin, const Row& row, unsigned& low, unsigned& high) {
    const float width = 1.0f / (row.scale * BINS_PER_HALVING), slack = 0.01f;
    low = order_of(row.largest - ((float)bin - slack) * width);
    high = bin == BINS - 1 ? ~0u : order_of(row.largest - ((float)(bin + 1) + slack) * width);
    low &= ~UNUSED_BITS;
}

// Cut a row where the sum of weigh(logit, order) reaches a number, or a share of it all.
template <int CLUSTER, class Weigh>
__device__ __forceinline__ Cut cut_at(const Row& row, Scratch& scratch, int& turn, Weight goal,
                                      double share, Weigh weigh) {
    Putting first = {scratch.low[turn], scratch.high[turn], 0, 0};
    row.each([&](float x, Logit, int) {
        first.put(distance_bin(x, row.largest, row.scale), weigh(x, order_of(x)));
    });
    first.flush();
    gather<CLUSTER>(scratch, turn);
    find_bin(scratch, 0, goal, share);
    goal = scratch.goal;
    const int distance = scratch.bin;
    unsigned low, high;
    bounds_of(distance, row, low, high);
    int shift = max(24 - __clz((int)(high - low)), UNUSED);
    for (;; shift = max(shift - 8, UNUSED)) {
        turn ^= 1;
        Putting next = {scratch.low[turn], scratch.high[turn], 0, 0};
        row.each([&](float x, Logit, int) {
            const unsigned order = order_of(x), bin = (order - low) >> shift;
            if (bin < BINS && distance_bin(x, row.largest, row.scale) == distance)
                next.put((int)bin, weigh(x, order));
        });
        next.flush();
        const Weight above = scratch.above;
        gather<CLUSTER>(scratch, turn);
        find_bin(scratch, above, goal, 1.0);
        low += (unsigned)scratch.bin << shift;
        if (shift == UNUSED) break;
    }
    turn ^= 1;
    // The unused bits are 0, and turned where a logit is not negative.
    return {low >> 31 ? low : low | UNUSED_BITS, scratch.above, scratch.own, goal};
}

// ---- tokens that tie at the cut ----------------------------------------------------------------

// The tokens of an order, each with a mass of 1; see draw.cuh.
struct Tied {
    const Logit* logits;
    int vocab_size;
    unsigned order;

    __device__ __forceinline__ float mass_at(int token) const {
        return order_of(to_float(logits[token])) == order ? 1.0f : 0.0f;
    }
    __device__ __forceinline__ unsigned taken_among(int) const { return 0u; }
};

// The n-th token of an order, counted from 0. All threads call this.
template <int CLUSTER>
__device__ __forceinline__ int tied_token(const Row& row, Scratch& scratch, unsigned order, float n) {
    float count = 0.0f;
    row.each([&](float x, Logit, int) { count += order_of(x) == order; });
    exchange<true, CLUSTER>(scratch.slices, {0.0f, count, 0.0f, 0}, 1, 1.0f);
    const int num_slices = CLUSTER * (int)(blockDim.x >> 5), slice = threadIdx.x;
    const float mass = slice < num_slices ? scratch.slices.of[1][slice].sum : 0.0f;
    const Tied tied = {row.logits, row.vocab_size, order};
    return draw(tied, scratch.crossing, mass, num_slices, slice_length(row.vocab_size, num_slices), n);
}

// ---- the whole ---------------------------------------------------------------------------------

template <int CLUSTER>
__device__ __forceinline__ void filter(const Arguments& a, Scratch& scratch) {
    const long long n = blockIdx.y, b = blockIdx.z;
    const int num_warps = blockDim.x >> 5, vocab_size = (int)a.vocab_size;
    const int slot = cluster_rank<CLUSTER>() * num_warps + (threadIdx.x >> 5);
    const int length = slice_length(vocab_size, CLUSTER * num_warps);
    Row row = {a.logits_BNV + b * a.logits_stride_b + n * a.logits_stride_n, vocab_size};
    row.from = min(slot * length, vocab_size);
    row.to = min(row.from + length, vocab_size);
    row.scale = (float)a.scale;
    for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x)
        scratch.low[0][bin] = scratch.high[0][bin] = 0;
    cluster_sync<CLUSTER>();  // before one block writes to another, both must run
    int exchanges = 1, turn = 0;
    row.largest = row_statistics<false, CLUSTER>(scratch.slices, exchanges, row.logits, vocab_size,
                                                 row.scale)
                      .largest;
    unsigned order = 0xffffffffu;  // after all
    int last = NO_TOKEN;
    const bool has_some = row.largest > NEGATIVE_INFINITY;  // else all is token 0's
    if (has_some && a.top_k > 0)
        order = cut_at<CLUSTER>(row, scratch, turn, (Weight)a.top_k, 1.0,
                                [](float, unsigned) { return (Weight)1; })
                    .order;
    if (has_some && a.top_p < 1.0) {
        const auto mass = [&](float x) {
            const bool is_largest = x == row.largest;
            const float part = is_largest ? 1.0f : mass_of(x, 1, row.largest, row.scale);
            return (Weight)(fmaxf(part, 0.0f) * UNIT + 0.5f);
        };
        const unsigned kept = order;
        const Cut cut = cut_at<CLUSTER>(
            row, scratch, turn, 0, a.top_p,
            [&](float x, unsigned of) { return of <= kept ? mass(x) : (Weight)0; });
        order = cut.order;
        const Weight each = mass(logit_of(order)), missing = cut.goal - cut.above;
        const Weight needed = missing / each + (missing % each > 0);
        if (needed < cut.own / each)
            last = tied_token<CLUSTER>(row, scratch, order, (float)(needed - 1));
    }
    cluster_sync<CLUSTER>();  // no block ends while another reads its bins
    Logit* filtered_V = a.filtered_BNV + b * a.filtered_stride_b + n * a.filtered_stride_n;
    row.each([&](float x, Logit raw, int token) {
        const unsigned other = order_of(x);
        const bool is_kept = other < order || (other == order && token <= last);
        filtered_V[token] = is_kept ? raw : minus_infinity();
    });
}

#define ENTRY(CLUSTER, ATTRIBUTE)                                                                  \
    extern "C" __global__ void __launch_bounds__(1024, 1) ATTRIBUTE filter_##CLUSTER(              \
        const __grid_constant__ Arguments a) {                                                     \
        __shared__ Scratch scratch;                                                                \
        filter<CLUSTER>(a, scratch);                                                               \
    }

ENTRY(1, )
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
ENTRY(2, __cluster_dims__(2, 1, 1))
ENTRY(4, __cluster_dims__(4, 1, 1))
ENTRY(8, __cluster_dims__(8, 1, 1))
#endif
