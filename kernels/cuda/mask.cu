// The attention mask and positions of a step that verifies a draft tree.
//
// In:  parents_BN, the number of cached tokens of each row, the columns P before the tree, the
//      last position that the model has, which changes from prompt to prompt.
// Out: mask_BNK, K = P + N: a node sees its row's cached tokens, its ancestors and itself; with a
//      window of w, only those fewer than w positions back. positions_BN: cached tokens + depth, at
//      most the last. Equal to decode/masks.py, StepMask.
// Floor: the mask's own bytes, B * N * K, written once (64 nodes over 4096 columns: 0.1 us at 3.0 TB/s).
//
// Grid (N, 1, B), any block. B batch, N nodes, K columns.

constexpr int MAX_NODES = 256;

// All fields take 8 bytes.
struct Arguments {
    const long long* parents_BN;
    long long parents_stride_b;
    const long long* lengths_B;
    const long long* last;
    unsigned char* mask_BNK;
    long long* positions_BN;
    long long num_nodes, num_past, window;
};

// Steps from a node up to each of its ancestors: 0 to itself, -1 to the others.
struct Ancestors {
    int parent[MAX_NODES];
    int steps[MAX_NODES];
    int depth;
};

__device__ __forceinline__ void find_ancestors(const Arguments& a, Ancestors& ancestors, int row, int node) {
    for (int n = threadIdx.x; n < (int)a.num_nodes; n += blockDim.x) {
        const long long parent = a.parents_BN[row * a.parents_stride_b + n];
        ancestors.parent[n] = parent >= 0 && parent < n ? (int)parent : -1;
        ancestors.steps[n] = -1;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int depth = 0;
        for (int n = node; n >= 0; n = ancestors.parent[n]) ancestors.steps[n] = depth++;
        ancestors.depth = depth - 1;
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(1024) tree_mask(const __grid_constant__ Arguments a) {
    __shared__ Ancestors ancestors;
    const int node = blockIdx.x, row = blockIdx.z;
    find_ancestors(a, ancestors, row, node);
    const long long length = a.lengths_B[row], place = row * a.num_nodes + node;
    const long long position = length + ancestors.depth, num_columns = a.num_past + a.num_nodes;
    if (threadIdx.x == 0) a.positions_BN[place] = min(position, *a.last);
    auto sees = [&](long long column) {
        if (column < a.num_past) return column < length && position - column < a.window;
        const int steps = ancestors.steps[column - a.num_past];
        return steps >= 0 && steps < a.window;
    };
    unsigned char* mask_K = a.mask_BNK + place * num_columns;
    if (num_columns % 4 > 0) {
        for (long long k = threadIdx.x; k < num_columns; k += blockDim.x) mask_K[k] = sees(k);
        return;
    }
    for (long long k = 4 * threadIdx.x; k < num_columns; k += 4 * blockDim.x) {
        unsigned word = 0;
        for (int i = 0; i < 4; ++i) word |= (unsigned)sees(k + i) << (8 * i);
        *(unsigned*)(mask_K + k) = word;
    }
}
