// Traversal verification: draft tokens that were drawn from the heads' distributions. Lossless.
//
// In:  logits_BNV after each node, tokens_BN, parents_BN, the temperature, uniforms_BN, a number in
//      [0, 1) for each node, and what the children of each node were drawn from, in the order of
//      their numbers and without replacement: q_BQW, q_index_N, places_V (tree.cuh, Arguments).
// Out: path_BL, num_accepted_B, next_token_B. decode/traversal.py has the rule, with its source, and
//      decode/sampled.py (Rejection) its numbers, whose names are kept: a node's weight a, and of
//      the p and q of its children the factor c and both sums, as children fail. Equal to
//      decode/verify.py, rule sampling with drawn drafts and without top_k and top_p (filter.cu comes before).
// Floor: the rows of logits of all nodes that are tried and have children, and of the path's end,
//      once; and for each child that failed, its parent's row once more, from the L2 cache, with
//      its q: 6 bytes a token in bfloat16, 10 where heads have a vocabulary of their own.
//
// The tree is walked depth first. All threads know the same of where it stands; `Frame` keeps what
// a node above is left with while its descendants are tried.

#include "draw.cuh"
#include "tree.cuh"

// What a node is left with: p's and q's sums are 1 before a child has failed.
struct Left {
    float weight, factor, p_sum, q_sum;
};

struct Frame {
    Left left;
    int at;  // the child that is tried, by its place in Scratch.child
};

constexpr float LARGEST = 3.402823466e38f;  // times a q of 0 it is 0, as infinity is not

struct Scratch {
    float uniform[MAX_NODES];
    float q[MAX_NODES];        // of the node's token after its parent, before a child has failed
    int child[MAX_NODES];      // all nodes by their parents' numbers, siblings by their own
    int start[MAX_NODES + 1];  // where each node's children begin there, and the one before's end
    Frame frame[MAX_NODES];
    Crossing crossing;
};

// What is left of p after a node, not normalized; see draw.cuh.
struct Rest {
    const Logit* row;
    const float* q_W;
    const int* places_V;
    int vocab_size;
    float largest, scale, per_mass;  // of p: the last is 1 over the row's sum
    float factor;

    // Never NaN, never negative.
    __device__ __forceinline__ float q_of(int token) const {
        const int place = places_V == nullptr ? token : places_V[token];
        return place >= 0 ? fmaxf(q_W[place], 0.0f) : 0.0f;
    }
    __device__ __forceinline__ float left_of(float logit, int token, float q) const {
        const float p = mass_of(logit, token, largest, scale) * per_mass;
        return fmaxf(fmaf(-factor, q, p), 0.0f);
    }
    __device__ __forceinline__ float mass_at(int token) const {
        return left_of(to_float(row[token]), token, q_of(token));
    }
    __device__ __forceinline__ unsigned taken_among(int) const { return 0u; }
};

__device__ __forceinline__ Rest rest_of(const Arguments& a, const Tree& tree, int sequence, int node,
                                        float factor) {
    const float* q_W = a.q_BQW + sequence * a.q_stride_b + a.q_index_N[node] * a.q_stride_q;
    const Statistics& row = tree.row[node];
    return {row_of(a, sequence, node), q_W, a.places_V, (int)a.vocab_size, row.largest,
            (float)a.scale, 1.0f / row.sum, factor};
}

// Find children, and q of their tokens; load_tree comes before, and a barrier has to come after.
__device__ __forceinline__ void load_draws(const Arguments& a, const Tree& tree, Scratch& scratch,
                                           int sequence) {
    const int num_nodes = (int)a.num_nodes;
    for (int n = threadIdx.x; n < num_nodes; n += blockDim.x) {
        const int parent = tree.parent[n], token = tree.token[n];
        scratch.q[n] = parent >= 0 && token >= 0
                           ? rest_of(a, tree, sequence, parent, 0.0f).q_of(token)
                           : 0.0f;
        int before = 0, start = 0;
#pragma unroll 1
        for (int m = 0; m < num_nodes; ++m) {
            before += tree.parent[m] < parent || (tree.parent[m] == parent && m < n);
            start += tree.parent[m] < n;
        }
        scratch.child[before] = n;
        scratch.start[n] = start;
    }
    if (threadIdx.x == 0) scratch.start[num_nodes] = num_nodes;
}

// Sum what is left of p, and q without the tokens of the children from `first` to `last`. All
// threads call this; all get both, as Statistics.sum and .slope. Afterwards slices.of[turn] has the
// sums of the warps' slices.
template <int CLUSTER>
__device__ __forceinline__ Statistics sums_of(const Rest& rest, const Tree& tree,
                                              const Scratch& scratch, Slices& slices, int& turn,
                                              int first, int last) {
    const int lane = threadIdx.x & 31, num_warps = blockDim.x >> 5;
    const int slot = cluster_rank<CLUSTER>() * num_warps + (threadIdx.x >> 5);
    const int length = slice_length(rest.vocab_size, CLUSTER * num_warps);
    const int from = min(slot * length, rest.vocab_size), to = min(from + length, rest.vocab_size);
    float p_left = 0.0f, q_left = 0.0f;
#pragma unroll 1
    for (int base = from; base < to; base += 32 * LOADS) {
        unsigned tried = 0;  // which of this lane's tokens
#pragma unroll 1
        for (int i = first; i <= last; ++i) {
            const int place = tree.token[scratch.child[i]] - base;
            if (place >= 0 && place < 32 * LOADS && (place & 31) == lane) tried |= 1u << (place >> 5);
        }
        float logit[LOADS], q[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int token = base + 32 * k + lane;
            logit[k] = q[k] = 0.0f;
            if (token < to) {
                logit[k] = to_float(rest.row[token]);
                q[k] = rest.q_of(token);
            }
        }
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int token = base + 32 * k + lane;
            if (token < to) p_left += rest.left_of(logit[k], token, q[k]);
            if (!(tried >> k & 1)) q_left += q[k];
        }
    }
    turn ^= 1;
    return exchange<true, CLUSTER>(slices, {0.0f, p_left, q_left, 0}, turn, 1.0f);
}

// Of a number that 0 / 0 may have made, the number.
__device__ __forceinline__ float or_zero(float x) { return x > 0.0f ? x : 0.0f; }

// Can it have been drawn? Else it is never accepted, and nothing is left to change by it.
__device__ __forceinline__ bool is_drawn(const Tree& tree, const Scratch& scratch, int child) {
    return scratch.q[child] > 0.0f && !tree.is_copy[child];
}

// A child's weight, at its turn.
__device__ __forceinline__ float child_weight(const Arguments& a, const Tree& tree,
                                              const Scratch& scratch, int sequence, int node,
                                              int child) {
    if (!is_drawn(tree, scratch, child)) return 0.0f;
    const Left& left = scratch.frame[node].left;
    const Rest rest = rest_of(a, tree, sequence, node, left.factor);
    const float q = scratch.q[child];
    const float p = rest.left_of(tree.logit[child], tree.token[child], q);
    // Each quotient alone stays far from the numbers that are flushed to zero.
    return fminf(or_zero(left.weight * p / left.p_sum * (left.q_sum / q)), 1.0f);
}

// The child at `at` has failed. Returns, in all threads, whether sums were taken anew.
template <int CLUSTER>
__device__ __forceinline__ bool fail(const Arguments& a, Shared& shared, Scratch& scratch,
                                     int sequence, int node, int at, int& turn) {
    Left left = scratch.frame[node].left;
    if (!(left.weight > 0.0f) || !is_drawn(shared.tree, scratch, scratch.child[at])) return false;
    left.factor = fminf(left.factor + or_zero(left.p_sum / left.weight / left.q_sum), LARGEST);
    const Statistics sums =
        sums_of<CLUSTER>(rest_of(a, shared.tree, sequence, node, left.factor), shared.tree, scratch,
                         shared.slices, turn, scratch.start[node], at);
    if (threadIdx.x == 0) {
        const float p_left = left.weight * sums.sum / left.p_sum;
        // Of a weight of 1 nothing is lost: 0 / 0 would be where p and q are equal.
        if (left.weight < 1.0f) left.weight = or_zero(p_left / (p_left + 1.0f - left.weight));
        left.p_sum = sums.sum;
        left.q_sum = sums.slope;
        scratch.frame[node].left = left;
    }
    __syncthreads();
    return true;
}

template <int CLUSTER>
__device__ __forceinline__ void walk(const Arguments& a, Shared& shared, Scratch& scratch, int sequence) {
    Tree& tree = shared.tree;
    const float scale = (float)a.scale;
    const int most = (int)a.path_length - 1;  // the depth that a path may have
    load_uniforms(a, scratch.uniform, sequence);
    load_tree<true, CLUSTER>(a, tree, sequence);
    load_draws(a, tree, scratch, sequence);
    __syncthreads();
    int node = 0, depth = 0, at = scratch.start[0], turn = 0;
    int summed = -1;  // the node of the last sums
    if (threadIdx.x == 0) scratch.frame[0].left = {1.0f, 0.0f, 1.0f, 1.0f};
    for (bool is_new = true;;) {
        const bool has_more = depth < most && at < scratch.start[node + 1];
        if (is_new && has_more) read_row<true, CLUSTER>(a, shared, sequence, node, turn, scale);
        if (is_new) __syncthreads();
        is_new = false;
        if (has_more) {
            const int child = scratch.child[at];
            const float weight = child_weight(a, tree, scratch, sequence, node, child);
            if (weight > 0.0f) {  // else nothing below it is kept either
                if (threadIdx.x == 0) {
                    scratch.frame[node].at = at;
                    scratch.frame[child].left = {weight, 0.0f, 1.0f, 1.0f};
                }
                node = child;
                at = scratch.start[node];
                ++depth;
                is_new = true;
                continue;
            }
        } else {  // its children have failed, or it has none
            if (node == 0 || scratch.uniform[node] < scratch.frame[node].left.weight) break;
            node = tree.parent[node];
            --depth;
            at = scratch.frame[node].at;
        }
        if (fail<CLUSTER>(a, shared, scratch, sequence, node, at, turn)) summed = node;
        ++at;
    }
    if (threadIdx.x == 0)
        for (int n = node, place = depth; place >= 0; n = tree.parent[n], --place) tree.path[place] = n;
    if (depth == most || scratch.start[node] == scratch.start[node + 1])
        read_row<true, CLUSTER>(a, shared, sequence, node, turn, scale);
    __syncthreads();
    const Left left = scratch.frame[node].left;
    const Rest rest = rest_of(a, tree, sequence, node, left.factor);
    float p_left = left.p_sum;
    if (summed != node)
        p_left = sums_of<CLUSTER>(rest, tree, scratch, shared.slices, turn, 0, -1).sum;
    const int num_slices = CLUSTER * (int)(blockDim.x >> 5), slice = threadIdx.x;
    const float mass = slice < num_slices ? shared.slices.of[turn][slice].sum : 0.0f;
    int token = draw(rest, scratch.crossing, mass, num_slices, slice_length(rest.vocab_size, num_slices),
                     scratch.uniform[0] * p_left);
    if (token < 0) token = tree.row[node].argmax;
    if (cluster_rank<CLUSTER>() == 0) write_verdict(a, tree, sequence, depth + 1, token);
}

#include "entries.cuh"
