// Greedy verification: which guesses are what step-by-step greedy decoding would have said.
//
// In:  logits_BNV after each node, tokens_BN, parents_BN (tree.cuh, Arguments).
// Out: path_BL, num_accepted_B, next_token_B. The token after a node is its argmax, the lowest where
//      several tie. Of children that hold it, the first is accepted; the token after the last
//      accepted node is the next token. Equal to decode/verify.py, rule greedy.
// Floor: the bytes of the rows of nodes with children, and of one more, at the memory's bandwidth
//      (22 + 1 rows of V = 128256 in bfloat16: 2.0 us at 3.0 TB/s); lazy: of the rows on the path.
//      No exponential is taken: about 3 instructions a logit.

#define NEEDS_SUMS false
#include "tree.cuh"

struct Scratch {};

template <bool IS_LAZY, int CLUSTER>
__device__ __forceinline__ void walk(const Arguments& a, Shared& shared, Scratch&, int sequence) {
    const Tree& tree = shared.tree;
    const int lane = threadIdx.x & 31, num_nodes = (int)a.num_nodes;
    load_tokens<false>(a, shared.tree, sequence);
    if (!IS_LAZY) merge_splits<false>(a, shared.tree, sequence, 0.0f);
    int turn = 0;
    const int length = descend<false, IS_LAZY, CLUSTER>(
        a, shared, sequence, turn, 0.0f, [&](int node, const Statistics& row) {
#pragma unroll 1
            for (int first = node + 1; first < num_nodes; first += 32) {
                const int n = first + lane;
                const bool is_right =
                    is_child(tree, n, num_nodes, node) && tree.token[n] == row.argmax;
                const unsigned right = __ballot_sync(0xffffffffu, is_right);
                if (right) return first + __ffs(right) - 1;
            }
            return -1;
        });
    if (cluster_rank<CLUSTER>() == 0)
        write_verdict(a, tree, sequence, length, tree.row[tree.path[length - 1]].argmax);
}

#include "forms.cuh"
