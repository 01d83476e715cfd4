// Top-k and top-p: logits of which those that are left out are minus infinity. A radix select.
//
// In:  logits_BNV, the temperature, top_k (0: none), top_p (1 or more: none).
// Out: a copy of them, without the tokens that are left out: first all that are less likely than
//      the k-th, then, in the order of their probabilities and of their numbers, all after the one
//      with which the sum reaches top_p. With the temperature, decode/distribution.py's
//      probabilities of the copy are those of the logits with top_k and top_p.
// Floor: a row once from memory and once into it; then once more for the copy, for each filter 2 or 3
//      times (float16 up to 4, float32 3 to 5), and once where tokens that tie are parted. From the
//      L2 cache, as long as the rows that are being read fit.
//
// The place where a row is cut is found by histograms of 256 bins: tokens are counted, or weighed, into
// bins, and those of the bin with the cut into bins again. The first are distances to the largest
// logit, on which tokens spread well; those after it are of the bits in which its logits can differ.
// Weights are integers, whose sums depend on no order: a mass of less than 2^-40 counts as none.
//
// entry      grid         block       needs
// filter_C   (C, N, B)    32..1024    C > 1: sm_90 (a cluster of C blocks a row)
//
// Compile with one of the macros of logits.cuh.
// B batch, N places, V vocabulary, C blocks. A row is the V logits of a place.

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
constexpr int AHEAD = 8;                  // loads of a thread before it looks at the first
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
    // This block's bins, each a Weight in two words, for shared memory adds no longer ones. Passes
    // take turns.
    unsigned low[2][BINS], high[2][BINS];
    Weight total[BINS + BINS / 8];  // the row's bins; see place_of
    int bin;                        // that was found
    Weight before, own, goal;       // the weight of all bins before it, and its own; see find_bin
    Crossing crossing;
};

__device__ __forceinline__ Logit minus_infinity() {
#if defined(LOGIT_FLOAT32)
    return NEGATIVE_INFINITY;
#else
    return (Logit)(FILL & 0xffffu);
#endif
}

// ---- a row in the order of its logits -----------------------------------------------------------

__device__ __forceinline__ float logit_of(unsigned key) {
    return __int_as_float((int)(key >> 31 ? key : key ^ 0x7fffffffu));
}

// By how far a logit is below the largest, which is in the order of keys.
__device__ __forceinline__ int distance_bin(float x, float largest, float scale) {
    if (x == largest) return 0;  // infinite ones, too
    return (int)fminf((largest - x) * scale * BINS_PER_HALVING, (float)(BINS - 1));
}

// A row, and the slice of it that this warp reads.
struct Row {
    const Logit* logits;
    int vocab_size, from, to;
    float largest, scale;

    // body(logit, as it is stored, token). Each lane has its own: what is done for one of them costs
    // far more than its load.
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

// ---- finding the cut ---------------------------------------------------------------------------

// A row is cut among the tokens of a key.
struct Cut {
    unsigned key;
    Weight before, own, goal;  // of lower keys, and of this one; the sum that has to be reached
};

// A thread adds up what it has for one bin, and writes it when another bin comes: atomics on a bin
// that most tokens are for would queue.
struct HistogramWriter {
    unsigned* low;
    unsigned* high;
    int bin;
    Weight weight;

    __device__ __forceinline__ void put(int into, Weight more) {
        if (more == 0) return;
        if (into != bin) {
            flush();
            bin = into;
            weight = 0;
        }
        weight += more;
    }
    __device__ __forceinline__ void flush() {
        if (weight == 0) return;
        const unsigned part = (unsigned)weight, there = atomicAdd(&low[bin], part);
        const unsigned carry = there + part < part;
        const unsigned rest = (unsigned)(weight >> 32) + carry;
        if (rest) atomicAdd(&high[bin], rest);
    }
};

__device__ __forceinline__ HistogramWriter writer_of(Scratch& scratch, int turn) {
    return {scratch.low[turn], scratch.high[turn], 0, 0};
}

// Where a bin stands in `total`: eight to a lane, on different banks.
__device__ __forceinline__ int place_of(int bin) { return bin + (bin >> 3); }

// Add up the bins of all blocks, and empty those of the next pass: whoever read them, in the last
// pass, has been to a barrier since. All threads call this.
template <int CLUSTER>
__device__ __forceinline__ void sum_bins(Scratch& scratch, int turn) {
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

// Find the bin with which the sum, begun at `before`, reaches goal_of(the sum of all bins). All
// threads call this.
template <class Goal>
__device__ __forceinline__ void find_bin(Scratch& scratch, Weight before, Goal goal_of) {
    constexpr int EACH = BINS / 32;
    const int lane = threadIdx.x;
    if (lane < 32) {
        const Weight* own = scratch.total + place_of(lane * EACH);
        Weight sum = 0;
        for (int i = 0; i < EACH; ++i) sum += own[i];
        Weight end = sum;
        for (int step = 1; step < 32; step <<= 1) {
            const Weight lower = __shfl_up_sync(0xffffffffu, end, step);
            if (lane >= step) end += lower;
        }
        const Weight goal = goal_of(__shfl_sync(0xffffffffu, end, 31));
        if (lane == 0) scratch.goal = goal;
        before += end - sum;
#pragma unroll 1
        for (int i = 0; i < EACH; ++i) {
            if (before < goal && goal <= before + own[i]) {  // of all bins, one
                scratch.bin = lane * EACH + i;
                scratch.before = before;
                scratch.own = own[i];
            }
            before += own[i];
        }
    }
    __syncthreads();
}

// The keys that a bin of distances may have. By rounding, a logit may lie a little outside of where
// its bin should end: so they reach a hundredth of a bin further. Who uses them looks at the bin too.
__device__ __forceinline__ void keys_of(int bin, const Row& row, unsigned& low, unsigned& high) {
    const float width = 1.0f / (row.scale * BINS_PER_HALVING), slack = 0.01f;
    low = key_of(row.largest - ((float)bin - slack) * width) & ~UNUSED_BITS;
    high = bin == BINS - 1 ? ~0u : key_of(row.largest - ((float)(bin + 1) + slack) * width);
}

// Cut a row where the sum of weigh(logit, key) reaches goal_of(the sum of all).
template <int CLUSTER, class Goal, class Weigh>
__device__ __forceinline__ Cut cut_at(const Row& row, Scratch& scratch, int& turn, Goal goal_of,
                                      Weigh weigh) {
    HistogramWriter first = writer_of(scratch, turn);
    row.each([&](float x, Logit, int) {
        first.put(distance_bin(x, row.largest, row.scale), weigh(x, key_of(x)));
    });
    first.flush();
    sum_bins<CLUSTER>(scratch, turn);
    find_bin(scratch, 0, goal_of);
    const int distance = scratch.bin;
    const Weight goal = scratch.goal;
    unsigned low, high;
    keys_of(distance, row, low, high);
    int shift = max(24 - __clz((int)(high - low)), UNUSED);
    for (;; shift = max(shift - 8, UNUSED)) {
        turn ^= 1;
        HistogramWriter next = writer_of(scratch, turn);
        row.each([&](float x, Logit, int) {
            const unsigned key = key_of(x), bin = (key - low) >> shift;
            if (bin < BINS && distance_bin(x, row.largest, row.scale) == distance)
                next.put((int)bin, weigh(x, key));
        });
        next.flush();
        const Weight before = scratch.before;
        sum_bins<CLUSTER>(scratch, turn);
        find_bin(scratch, before, [=](Weight) { return goal; });
        low += (unsigned)scratch.bin << shift;
        if (shift == UNUSED) break;
    }
    turn ^= 1;
    // The unused bits of `low` are 0; those of the key of a logit that is not negative are 1.
    return {low >> 31 ? low : low | UNUSED_BITS, scratch.before, scratch.own, goal};
}

// ---- tokens that tie at the cut ----------------------------------------------------------------

// The tokens of a key, each with a mass of 1; see draw.cuh.
struct Tied {
    const Logit* logits;
    int vocab_size;
    unsigned key;

    __device__ __forceinline__ float mass_at(int token) const {
        return key_of(to_float(logits[token])) == key ? 1.0f : 0.0f;
    }
    __device__ __forceinline__ unsigned taken_among(int) const { return 0u; }
};

// The n-th token of a key, counted from 0. All threads call this.
template <int CLUSTER>
__device__ __forceinline__ int tied_token(const Row& row, Scratch& scratch, int& exchanges,
                                          unsigned key, float n) {
    float count = 0.0f;
    row.each([&](float x, Logit, int) { count += key_of(x) == key; });
    exchanges ^= 1;  // counts travel as the sums of statistics
    exchange<true, CLUSTER>(scratch.slices, {0.0f, count, 0.0f, 0}, exchanges, 1.0f);
    const int num_slices = CLUSTER * (int)(blockDim.x >> 5), slice = threadIdx.x;
    const float mass = slice < num_slices ? scratch.slices.of[exchanges][slice].sum : 0.0f;
    const Tied tied = {row.logits, row.vocab_size, key};
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
    int exchanges = 0, turn = 0;
    row.largest = row_statistics<false, CLUSTER>(scratch.slices, exchanges, row.logits, vocab_size,
                                                 row.scale)
                      .largest;
    unsigned key = ~0u;   // no token has a higher one: nothing is cut yet
    int last = NO_TOKEN;  // of those that have this key, the last that is kept: all
    const bool has_some = row.largest > NEGATIVE_INFINITY;  // a row without a number stays as it is
    if (has_some && a.top_k > 0)
        key = cut_at<CLUSTER>(
                  row, scratch, turn, [&](Weight) { return (Weight)a.top_k; },
                  [](float, unsigned) { return (Weight)1; })
                  .key;
    if (has_some && a.top_p < 1.0) {
        const auto mass = [&](float x) {  // at the smallest temperatures 0 times infinity, too: none
            const float part = mass_of(x, NO_TOKEN, row.largest, row.scale);
            return (Weight)(fmaxf(x == row.largest ? 1.0f : part, 0.0f) * UNIT + 0.5f);
        };
        const unsigned kept = key;
        const Cut cut = cut_at<CLUSTER>(
            row, scratch, turn, [&](Weight all) { return (Weight)ceil(a.top_p * (double)all); },
            [&](float x, unsigned of) { return of <= kept ? mass(x) : (Weight)0; });
        key = cut.key;
        const Weight each = mass(logit_of(key)), missing = cut.goal - cut.before;
        const Weight needed = missing / each + (missing % each > 0);
        if (needed < cut.own / each)  // only the first of those that tie
            last = tied_token<CLUSTER>(row, scratch, exchanges, key, (float)(needed - 1));
    }
    cluster_sync<CLUSTER>();  // no block ends while another reads its bins
    Logit* filtered_V = a.filtered_BNV + b * a.filtered_stride_b + n * a.filtered_stride_n;
    row.each([&](float x, Logit raw, int token) {
        const unsigned own = key_of(x);
        const bool is_kept = own < key || (own == key && token <= last);
        filtered_V[token] = is_kept ? raw : minus_infinity();
    });
}

#define ENTRY(CLUSTER, ATTRIBUTE)                                                                  \
    extern "C" __global__ void __launch_bounds__(1024, 1) ATTRIBUTE filter_##CLUSTER(              \
        const __grid_constant__ Arguments a) {                                                     \
        __shared__ Scratch scratch;                                                                \
        filter<CLUSTER>(a, scratch);                                                               \
    }

FOR_EACH_CLUSTER(ENTRY)
