// Typical acceptance (Medusa, section 2.3.1): LOSSY by design.
//
// In:  logits_BNV after each node, tokens_BN, parents_BN, the temperature, epsilon, alpha (tree.cuh).
// Out: path_BL, num_accepted_B, next_token_B. A draft token is accepted if its probability after its parent
//      is above min(epsilon, alpha * exp(-entropy)). Of the paths of accepted nodes the longest
//      counts, of these the likeliest, of these the one whose end comes first. The token after it
//      is the argmax. Equal to decode/verify.py, rule typical.
// Floor: as greedy.cu, of the rows of accepted nodes with children, and of one more. Largest, sum and
//      entropy come from one pass: about 10 instructions a logit, one of them an exponential.

#include "tree.cuh"

constexpr float LN_2 = 0.69314718f;

struct Scratch {
    unsigned char has_children[MAX_NODES];  // the root counts as if: its row is always needed
    unsigned char is_accepted[MAX_NODES];   // and all its ancestors are
    float log_p[MAX_NODES];
    int end, length;
};

// A path, as far as it decides between paths.
struct Candidate {
    int length;
    double log_p;
    int end;
};

__device__ __forceinline__ bool is_better(const Candidate& a, const Candidate& b) {
    if (a.length != b.length) return a.length > b.length;
    if (a.log_p != b.log_p) return a.log_p > b.log_p;
    return a.end < b.end;
}

__device__ __forceinline__ void judge(const Arguments& a, const Tree& tree, Scratch& scratch, int n,
                                      const Statistics& row, float scale) {
    const float entropy = LN_2 * (log2f(row.sum) - row.slope / row.sum);
    const float threshold = fminf((float)a.epsilon, (float)a.alpha * expf(-entropy));
    const float p = probability(tree, n, row, scale);
    scratch.is_accepted[n] = p > threshold;
    scratch.log_p[n] = logf(p);
}

// Find which nodes have children: known of the root at once, of the others after the next barrier.
__device__ __forceinline__ void find_parents(const Arguments& a, const Tree& tree, Scratch& scratch) {
    for (int n = threadIdx.x; n < (int)a.num_nodes; n += blockDim.x)
        scratch.has_children[n] = scratch.is_accepted[n] = n == 0;
    __syncthreads();
    for (int n = threadIdx.x; n < (int)a.num_nodes; n += blockDim.x)
        if (tree.parent[n] >= 0) scratch.has_children[tree.parent[n]] = 1;
}

// Judge the children of every accepted node. All threads call this.
template <int CLUSTER>
__device__ __forceinline__ void judge_all(const Arguments& a, Shared& shared, Scratch& scratch, int sequence,
                          float scale, int& turn) {
    const Tree& tree = shared.tree;
    const int num_nodes = (int)a.num_nodes;
    for (int node = 0; node < num_nodes; ++node) {  // the root's row is read by all: a barrier
        if (!scratch.is_accepted[node] || !scratch.has_children[node]) continue;
        const Statistics row =
            read_row<true, CLUSTER>(a, shared, sequence, node, turn, scale);
        for (int n = node + 1 + threadIdx.x; n < num_nodes; n += blockDim.x)
            if (tree.parent[n] == node) judge(a, tree, scratch, n, row, scale);
        __syncthreads();
    }
}

// The path to n, if all of it is accepted.
__device__ __forceinline__ Candidate path_to(const Tree& tree, const Scratch& scratch, int n) {
    Candidate path = {1, 0.0, n};
    for (int node = n; node > 0; node = tree.parent[node]) {
        if (!scratch.is_accepted[node]) return {0, 0.0, n};  // padding, too
        path.log_p += scratch.log_p[node];
        ++path.length;
    }
    return path;
}

// Find the best path; the first warp calls this.
__device__ __forceinline__ void choose_path(const Arguments& a, Tree& tree, Scratch& scratch) {
    Candidate best = {1, 0.0, 0};
    for (int n = threadIdx.x; n < (int)a.num_nodes; n += 32) {
        const Candidate path = path_to(tree, scratch, n);
        if (path.length <= (int)a.path_length && is_better(path, best)) best = path;
    }
    for (int step = 16; step > 0; step >>= 1) {
        Candidate other;
        other.length = __shfl_xor_sync(0xffffffffu, best.length, step);
        other.log_p = __shfl_xor_sync(0xffffffffu, best.log_p, step);
        other.end = __shfl_xor_sync(0xffffffffu, best.end, step);
        if (is_better(other, best)) best = other;
    }
    if (threadIdx.x > 0) return;
    scratch.end = best.end;
    scratch.length = best.length;
    for (int place = best.length - 1, node = best.end; place >= 0; --place) {
        tree.path[place] = node;
        node = tree.parent[node];
    }
}

template <int CLUSTER>
__device__ __forceinline__ void walk(const Arguments& a, Shared& shared, Scratch& scratch, int sequence) {
    Tree& tree = shared.tree;
    const float scale = (float)a.scale;
    int turn = 0;
    load_tree<true, CLUSTER>(a, tree, sequence);
    find_parents(a, tree, scratch);
    judge_all<CLUSTER>(a, shared, scratch, sequence, scale, turn);
    if (threadIdx.x < 32) choose_path(a, tree, scratch);
    __syncthreads();
    int next_token = tree.row[scratch.end].argmax;
    if (!scratch.has_children[scratch.end])
        next_token = read_row<false, CLUSTER>(a, shared, sequence, scratch.end, turn, scale).argmax;
    if (cluster_rank<CLUSTER>() == 0)
        write_verdict(a, tree, sequence, scratch.length, next_token);
}

#include "entries.cuh"
