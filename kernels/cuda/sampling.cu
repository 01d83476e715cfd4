// Target-only sampling: lossless verification of draft tokens that are not random.
//
// In:  logits_BNV after each node, tokens_BN, parents_BN, the temperature, and uniforms_BN, a number in
//      [0, 1) for each node (tree.cuh, Arguments).
// Out: path_BL, num_accepted_B, next_token_B. The token after a node is drawn from p = softmax(logits /
//      temperature) with the children's tokens first in the order of the draw: child c is accepted
//      where u < p(c) + the elder children's; if none is, the next token is drawn with what is left
//      of u from the other tokens. Its law is p, whatever the draft is. Equal to
//      decode/verify.py, rule sampling without top_k and top_p.
// Floor: as greedy.cu. The draw reads one slice of one row again, from the L2 cache: its mass
//      is known, the rest of the row's too, so that nothing is summed twice.

#include "tree.cuh"

struct Scratch {
    float uniform[MAX_NODES];
    float spent;            // how much of [0, 1) the children of the path's end take
    int taken[MAX_NODES];   // their tokens
    int num_taken;
    float warp_mass[32];
    int crossing;           // the thread whose interval holds what is looked for; -1: none
    float before;           // the mass before that thread's
    int token;
};

__device__ __forceinline__ void load_uniforms(const Arguments& a, Scratch& scratch, int sequence) {
    for (int n = threadIdx.x; n < (int)a.num_nodes; n += blockDim.x)
        scratch.uniform[n] = a.uniforms_BN[sequence * a.uniforms_stride_b + n];
}

// ---- accepting a draft token -------------------------------------------------------------------

// The child that is drawn after a node, or -1. The first warp calls this.
__device__ __forceinline__ int choose_child(const Arguments& a, const Tree& tree, Scratch& scratch, int node,
                            const Statistics& row, float scale) {
    const int lane = threadIdx.x, num_nodes = (int)a.num_nodes;
    const float u = scratch.uniform[node];
    float spent = 0.0f;
#pragma unroll 1
    for (int first = node + 1; first < num_nodes; first += 32) {
        const int n = first + lane;
        const float p =
            is_child(tree, n, num_nodes, node) ? probability(tree, n, row, scale) : 0.0f;
        float end = p;  // of the child's interval
        for (int step = 1; step < 32; step <<= 1) {
            const float elder = __shfl_up_sync(0xffffffffu, end, step);
            if (lane >= step) end += elder;
        }
        const unsigned drawn = __ballot_sync(0xffffffffu, p > 0.0f && u < spent + end);
        if (drawn) {
            if (lane == 0) scratch.spent = 0.0f;  // a walk that is cut short here draws afresh
            return first + __ffs(drawn) - 1;
        }
        spent += __shfl_sync(0xffffffffu, end, 31);
    }
    if (lane == 0) scratch.spent = spent;
    return -1;
}

// ---- drawing from the other tokens -------------------------------------------------------------

// Of all threads' masses, laid end to end: which one's holds `target`? Into scratch.crossing and
// scratch.before; returns the sum of all. All threads call this.
//
// The sums of a scan round in an order of each lane's own: they may fall from one lane to the next,
// or rise where there is no mass. So a warp's first lane to pass the target has it, and never one
// without mass. Warps are added up in turn: exactly one of them holds a target below the sum.
__device__ __forceinline__ float find_crossing(Scratch& scratch, float mass, float target) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = blockDim.x >> 5;
    float end = mass;
    for (int step = 1; step < 32; step <<= 1) {
        const float before = __shfl_up_sync(0xffffffffu, end, step);
        if (lane >= step) end += before;
    }
    float start = __shfl_up_sync(0xffffffffu, end, 1);
    if (lane == 0) start = 0.0f;
    __syncthreads();  // everyone has read the last call's outcome
    if (lane == 31) scratch.warp_mass[warp] = end;
    if (threadIdx.x == 0) scratch.crossing = -1;
    __syncthreads();
    float total = 0.0f, before = 0.0f, past = 0.0f;
#pragma unroll 1
    for (int i = 0; i < num_warps; ++i) {
        if (i == warp) before = total;
        total += scratch.warp_mass[i];
        if (i == warp) past = total;
    }
    const unsigned massive = __ballot_sync(0xffffffffu, mass > 0.0f);
    const unsigned passing = __ballot_sync(0xffffffffu, target < before + end) & massive;
    const int holder = passing ? __ffs(passing) - 1 : 31 - __clz((int)massive);
    if (before <= target && target < past && lane == holder) {
        scratch.crossing = threadIdx.x;
        scratch.before = before + start;
    }
    __syncthreads();
    return total;
}

// A row from which some tokens are taken.
struct Rest {
    const Logit* row;
    int vocab_size;
    float largest, scale;
};

__device__ __forceinline__ float mass_at(const Rest& rest, int token) {
    return mass_of(to_float(rest.row[token]), token, rest.largest, rest.scale);
}

// Which of 32 tokens from `first` on are taken?
__device__ __forceinline__ unsigned taken_among(const Scratch& scratch, int first) {
    unsigned taken = 0;
#pragma unroll 1
    for (int i = 0; i < scratch.num_taken; ++i) {
        const int place = scratch.taken[i] - first;
        if (place >= 0 && place < 32) taken |= 1u << place;
    }
    return taken;
}

// The mass of the tokens of [from, to) that are left; names the last that has any.
__device__ __forceinline__ float mass_between(const Rest& rest, const Scratch& scratch, int from,
                                              int to, int& last) {
    float sum = 0.0f;
#pragma unroll 1
    for (int first = from; first < to; first += 32) {
        const unsigned taken = taken_among(scratch, first);
#pragma unroll 4
        for (int i = 0; i < 32; ++i) {
            const bool is_left = first + i < to && !(taken >> i & 1);
            const float mass = is_left ? mass_at(rest, first + i) : 0.0f;
            if (mass > 0.0f) last = first + i;
            sum += mass;
        }
    }
    return sum;
}

// The token of [from, to) at which `sum` and the masses up to it pass `target`, else `last`.
__device__ __forceinline__ int token_at(const Rest& rest, const Scratch& scratch, int from, int to,
                                        float sum, float target, int last) {
#pragma unroll 1
    for (int token = from; token < to; ++token) {
        const unsigned taken = taken_among(scratch, token) & 1u;
        const float mass = taken ? 0.0f : mass_at(rest, token);
        sum += mass;
        if (mass > 0.0f && sum > target) return token;
    }
    return last;
}

// A slice's mass, without what is taken of it.
__device__ __forceinline__ float slice_mass(const Rest& rest, const Scratch& scratch, const Statistics& slice,
                            int begin, int end) {
    const Statistics none = {rest.largest, 0.0f, 0.0f, 0};
    float mass = begin < end ? merge<true>(none, slice, rest.scale).sum : 0.0f;
    if (!(rest.largest > NEGATIVE_INFINITY)) mass = begin == 0 ? 1.0f : 0.0f;
#pragma unroll 1
    for (int i = 0; i < scratch.num_taken; ++i)
        if (scratch.taken[i] >= begin && scratch.taken[i] < end)
            mass -= mass_at(rest, scratch.taken[i]);
    return fmaxf(mass, 0.0f);
}

// Find the token whose mass holds `target`, given the statistics of slices of the row; of the
// tokens that are left the last, if rounding leaves a target behind them; -1 if none is left.
__device__ __forceinline__ int draw(const Rest& rest, Scratch& scratch, const Statistics* slices, int num_slices,
                    int length, float target) {
    const int i = threadIdx.x, begin = min(i * length, rest.vocab_size);
    const int end = min(begin + length, rest.vocab_size);
    const float mass = i < num_slices ? slice_mass(rest, scratch, slices[i], begin, end) : 0.0f;
    find_crossing(scratch, mass, target);
    int slice = scratch.crossing;
    if (slice >= 0) target = fmaxf(target - scratch.before, 0.0f);
    // A slice found by sums may, by rounding, end just before the target: then the next has it.
#pragma unroll 1
    for (; slice >= 0 && slice < num_slices; ++slice) {
        const int start = min(slice * length, rest.vocab_size);
        const int stop = min(start + length, rest.vocab_size);
        const int share = (stop - start + (int)blockDim.x - 1) / (int)blockDim.x;
        const int from = min(start + (int)threadIdx.x * share, stop), to = min(from + share, stop);
        int token = -1;
        const float own = mass_between(rest, scratch, from, to, token);
        const float total = find_crossing(scratch, own, target);
        if (scratch.crossing >= 0) {
            if (scratch.crossing == (int)threadIdx.x)
                scratch.token = token_at(rest, scratch, from, to, scratch.before, target, token);
            __syncthreads();
            return scratch.token;
        }
        target = fmaxf(target - total, 0.0f);
    }
    if (threadIdx.x == 0) scratch.token = -1;
    __syncthreads();
    const int share = (rest.vocab_size + (int)blockDim.x - 1) / (int)blockDim.x;
    const int from = min((int)threadIdx.x * share, rest.vocab_size);
    int token = -1;
    mass_between(rest, scratch, from, min(from + share, rest.vocab_size), token);
    atomicMax(&scratch.token, token);
    __syncthreads();
    return scratch.token;
}

// ---- the walk ---------------------------------------------------------------------------------

template <int CLUSTER>
__device__ __forceinline__ void walk(const Arguments& a, Shared& shared, Scratch& scratch, int sequence) {
    Tree& tree = shared.tree;
    const float scale = (float)a.scale;
    const int num_nodes = (int)a.num_nodes, vocab_size = (int)a.vocab_size;
    load_uniforms(a, scratch, sequence);
    if (threadIdx.x == 0) scratch.num_taken = 0;
    load_tree<true, CLUSTER>(a, tree, sequence);
    int turn = 0;
    const int path_length = descend<true, CLUSTER>(
        a, shared, sequence, turn, scale, [&](int node, const Statistics& row) {
            return choose_child(a, tree, scratch, node, row, scale);
        });
    const int node = tree.path[path_length - 1];
    for (int n = node + 1 + threadIdx.x; n < num_nodes; n += blockDim.x)
        if (tree.parent[n] == node && tree.token[n] >= 0 && !tree.is_copy[n])
            scratch.taken[atomicAdd(&scratch.num_taken, 1)] = tree.token[n];
    const int num_slices = CLUSTER * (int)(blockDim.x >> 5);
    __syncthreads();
    const Rest rest = {row_of(a, sequence, node), vocab_size, tree.row[node].largest, scale};
    const float place = fmaxf(scratch.uniform[node] - scratch.spent, 0.0f);
    int token = draw(rest, scratch, shared.slices.of[turn], num_slices,
                     slice_length(vocab_size, num_slices), place * tree.row[node].sum);
    if (token < 0) token = tree.row[node].argmax;
    if (cluster_rank<CLUSTER>() == 0) write_verdict(a, tree, sequence, path_length, token);
}

#include "entries.cuh"
