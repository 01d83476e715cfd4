// What the rules of verification share: arguments, the draft tree, the walk, the entries' form.
//
// A block, or a cluster of blocks, takes a sequence. It reads the root's row of logits, chooses a
// child, reads that child's row, and so on: only rows on the path are read (typical.cu: the rows of
// all nodes that are accepted and have children; traversal.cu: of all that it tries). README.md in
// this folder is the contract.
//
// Whatever the input, a walk goes from a node to one with a higher number, or back to one whose
// children it has tried: it ends.
// B batch, N tree nodes, V vocabulary, L path length, Q distributions of W tokens.

#pragma once
#include "rows.cuh"

constexpr int MAX_NODES = 256;

// All fields take 8 bytes: the host packs them without padding. Strides count elements.
struct Arguments {
    const Logit* logits_BNV;
    long long logits_stride_b, logits_stride_n;
    const long long* tokens_BN;  // the root's is never read
    long long tokens_stride_b;
    const long long* parents_BN;  // -1 of the root and of padding
    long long parents_stride_b;
    const float* uniforms_BN;  // in [0, 1); of sampling.cu and traversal.cu, else null
    long long uniforms_stride_b;
    const float* q_BQW;  // what draft tokens were drawn from; this and the next four: of traversal.cu
    long long q_stride_b, q_stride_q;
    const long long* q_index_N;  // which of the Q each node's children come from
    const int* places_V;  // of each token among the W, or -1; null: W = V, each at its own
    long long* path_BL;        // out: nodes from the root down, then -1
    long long* num_accepted_B;  // out: nodes of the path without the root
    long long* next_token_B;    // out
    long long num_nodes, vocab_size, path_length;
    double scale;           // log2(e) / temperature
    double epsilon, alpha;  // of typical.cu
};

struct Tree {
    int parent[MAX_NODES];  // -1 where there is none that stands before the node
    int token[MAX_NODES];   // -1 where the vocabulary has none such
    unsigned char is_copy[MAX_NODES];  // an elder sibling has this token
    float logit[MAX_NODES];            // of the node's token, after its parent
    Statistics row[MAX_NODES];         // of the nodes whose row is known
    int path[MAX_NODES + 1];           // with -1 behind its end
};

// What every block has of its own, in shared memory.
struct Shared {
    Tree tree;
    Slices slices;
};

__device__ __forceinline__ const Logit* row_of(const Arguments& a, int sequence, int node) {
    return a.logits_BNV + sequence * a.logits_stride_b + node * a.logits_stride_n;
}

// Read parents, tokens and, for the rules that need them, the tokens' logits; find copies. All threads
// call this, and a barrier has to come before is_copy is used.
template <bool SUMS, int CLUSTER>
__device__ __forceinline__ void load_tree(const Arguments& a, Tree& tree, int sequence) {
    const int num_nodes = (int)a.num_nodes;
    const long long* parents_N = a.parents_BN + sequence * a.parents_stride_b;
    const long long* tokens_N = a.tokens_BN + sequence * a.tokens_stride_b;
    for (int n = threadIdx.x; n < num_nodes; n += blockDim.x) {
        const long long parent = parents_N[n], token = tokens_N[n];
        tree.parent[n] = parent >= 0 && parent < n ? (int)parent : -1;
        tree.token[n] = token >= 0 && token < a.vocab_size ? (int)token : -1;
        tree.is_copy[n] = 0;
        if (SUMS && tree.parent[n] >= 0 && tree.token[n] >= 0)
            tree.logit[n] = to_float(row_of(a, sequence, tree.parent[n])[tree.token[n]]);
    }
    cluster_sync<CLUSTER>();  // of the cluster: before one block writes to another, both must run
#pragma unroll 1
    for (int pair = threadIdx.x; SUMS && pair < num_nodes * num_nodes; pair += blockDim.x) {
        const int n = pair / num_nodes, elder = pair % num_nodes;
        if (elder < n && tree.parent[elder] == tree.parent[n] && tree.token[elder] == tree.token[n])
            tree.is_copy[n] = 1;
    }
}

__device__ __forceinline__ void load_uniforms(const Arguments& a, float* uniform, int sequence) {
    for (int n = threadIdx.x; n < (int)a.num_nodes; n += blockDim.x)
        uniform[n] = a.uniforms_BN[sequence * a.uniforms_stride_b + n];
}

// A draft token's probability after its parent, whose row is known.
__device__ __forceinline__ float probability(const Tree& tree, int n, const Statistics& row,
                                             float scale) {
    if (tree.token[n] < 0 || tree.is_copy[n]) return 0.0f;
    return mass_of(tree.logit[n], tree.token[n], row.largest, scale) / row.sum;
}

// Is n a child of `node`?
__device__ __forceinline__ bool is_child(const Tree& tree, int n, int num_nodes, int node) {
    return n < num_nodes && tree.parent[n] == node;
}

// Read a node's row, for all threads and for tree.row. All threads call this.
template <bool SUMS, int CLUSTER>
__device__ __forceinline__ Statistics read_row(const Arguments& a, Shared& shared, int sequence,
                                               int node, int& turn, float scale) {
    const Statistics row = finished(row_statistics<SUMS, CLUSTER>(
        shared.slices, turn, row_of(a, sequence, node), (int)a.vocab_size, scale));
    if (threadIdx.x == 0) shared.tree.row[node] = row;
    return row;
}

// Go down from the root; all threads call this. choose(node, row) is called by the first warp and
// returns, in all of its lanes, a child, or -1 to end. Returns how many nodes of tree.path are the
// path; the last one's row is in tree.row, its slices' statistics in shared.slices.of[turn].
template <bool SUMS, int CLUSTER, class Choose>
__device__ __forceinline__ int descend(const Arguments& a, Shared& shared, int sequence, int& turn,
                                       float scale, Choose choose) {
    Tree& tree = shared.tree;
    if (threadIdx.x == 0) tree.path[0] = 0;
    __syncthreads();  // after load_tree, too
    for (int length = 1;; ++length) {
        const int node = tree.path[length - 1];
        const Statistics row = read_row<SUMS, CLUSTER>(a, shared, sequence, node, turn, scale);
        if (threadIdx.x < 32) {
            const int child = choose(node, row);
            if (threadIdx.x == 0) tree.path[length] = length < (int)a.path_length ? child : -1;
        }
        __syncthreads();
        if (tree.path[length] < 0) return length;
    }
}

// Write the path that stands in tree.path, and the token after it.
__device__ __forceinline__ void write_verdict(const Arguments& a, const Tree& tree, int sequence, int length,
                              int next_token) {
    const int width = (int)a.path_length;
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        a.path_BL[(long long)sequence * width + i] = i < length ? tree.path[i] : -1;
    if (threadIdx.x == 0) {
        a.num_accepted_B[sequence] = length - 1;
        a.next_token_B[sequence] = next_token;
    }
}
