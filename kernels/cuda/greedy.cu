// Greedy verification: accept the draft tokens that step-by-step greedy decoding would have chosen.
//
// In:  logits_BNV after each node, tokens_BN, parents_BN (tree.cuh, Arguments).
// Out: path_BL, num_accepted_B, next_token_B. The token after a node is its argmax, the lowest where
//      several tie. Of children that hold it, the first is accepted; the token after the last
//      accepted node is the next token. Equal to decode/verify.py, rule greedy.
// Floor: the bytes of the rows on the path at the memory's bandwidth (3 rows of V = 128256 in
//      bfloat16: 0.26 us at 3.0 TB/s), and a trip to memory for each row, one after the other.
//      No exponential is taken: about 3 instructions a logit.

#include "tree.cuh"

struct Scratch {};

template <int CLUSTER>
__device__ __forceinline__ void walk(const Arguments& a, Shared& shared, Scratch&, int sequence) {
    const Tree& tree = shared.tree;
    const int lane = threadIdx.x & 31, num_nodes = (int)a.num_nodes;
    load_tree<false, CLUSTER>(a, shared.tree, sequence);
    int turn = 0;
    const int length = descend<false, CLUSTER>(
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

#include "entries.cuh"
