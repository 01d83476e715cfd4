// Target-only sampling: lossless verification of draft tokens that are not random.
//
// In:  logits_BNV after each node, tokens_BN, parents_BN, the temperature, and uniforms_BN, a number in
//      [0, 1) for each node (tree.cuh, Arguments).
// Out: path_BL, num_accepted_B, next_token_B. The token after a node is drawn from p = softmax(logits /
//      temperature) with the children's tokens first in the order of the draw: child c is accepted
//      where u < p(c) + the elder children's; if none is, the next token is drawn with what is left
//      of u from the other tokens. Its law is p, whatever the draft is. Equal to
//      decode/verify.py, rule sampling without top_k and top_p (filter.cu comes before).
// Floor: as greedy.cu. The draw reads one slice of one row again, from the L2 cache: its mass
//      is known, the rest of the row's too, so that nothing is summed twice.

#include "draw.cuh"
#include "tree.cuh"

struct Scratch {
    float uniform[MAX_NODES];
    float spent;  // how much of [0, 1) the children of the path's end take
    int taken[MAX_NODES];  // their tokens
    int num_taken;
    Crossing crossing;
};

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

// A row from which some tokens are taken; see draw.cuh.
struct Rest {
    const Logit* row;
    int vocab_size;
    float largest, scale;
    const Scratch& scratch;

    __device__ __forceinline__ float mass_at(int token) const {
        return mass_of(to_float(row[token]), token, largest, scale);
    }
    __device__ __forceinline__ unsigned taken_among(int first) const {
        return among(scratch.taken, scratch.num_taken, first);
    }
    // A slice's mass, without what is taken of it.
    __device__ __forceinline__ float slice_mass(const Statistics& slice, int begin, int end) const {
        const Statistics none = {largest, 0.0f, 0.0f, 0};
        float mass = begin < end ? merge<true>(none, slice, scale).sum : 0.0f;
        if (!(largest > NEGATIVE_INFINITY)) mass = begin == 0 ? 1.0f : 0.0f;
#pragma unroll 1
        for (int i = 0; i < scratch.num_taken; ++i)
            if (scratch.taken[i] >= begin && scratch.taken[i] < end)
                mass -= mass_at(scratch.taken[i]);
        return fmaxf(mass, 0.0f);
    }
};

// ---- the walk ---------------------------------------------------------------------------------

template <int CLUSTER>
__device__ __forceinline__ void walk(const Arguments& a, Shared& shared, Scratch& scratch, int sequence) {
    Tree& tree = shared.tree;
    const float scale = (float)a.scale;
    const int num_nodes = (int)a.num_nodes, vocab_size = (int)a.vocab_size;
    load_uniforms(a, scratch.uniform, sequence);
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
    const Rest rest = {row_of(a, sequence, node), vocab_size, tree.row[node].largest, scale,
                       scratch};
    const int length = slice_length(vocab_size, num_slices), slice = threadIdx.x;
    const int begin = min(slice * length, vocab_size), end = min(begin + length, vocab_size);
    float mass = 0.0f;
    if (slice < num_slices) mass = rest.slice_mass(shared.slices.of[turn][slice], begin, end);
    const float place = fmaxf(scratch.uniform[node] - scratch.spent, 0.0f);
    int token = draw(rest, scratch.crossing, mass, num_slices, length, place * tree.row[node].sum);
    if (token < 0) token = tree.row[node].argmax;
    if (cluster_rank<CLUSTER>() == 0) write_verdict(a, tree, sequence, path_length, token);
}

#include "entries.cuh"
