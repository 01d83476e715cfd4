// Verification in the way of serving engines, to be compared with: torch has made the argmax or the
// probabilities of every row; one thread a sequence walks.

struct Arguments {
    const long long* tokens_BN;
    const long long* parents_BN;
    const long long* targets_BN;  // greedy: the argmax of each row
    float* p_BNV;                 // sampling: what is rejected is set to 0 here
    const float* uniforms_BN;
    long long* path_BL;
    long long* num_accepted_B;
    long long* last_B;
    float* place_B;  // sampling: what is left of the last node's uniform
    long long num_nodes, vocab_size, path_length;
};

extern "C" __global__ void walk_greedy(const Arguments a) {
    const long long b = blockIdx.x, first = b * a.num_nodes;
    long long node = 0, length = 1;
    a.path_BL[b * a.path_length] = 0;
    for (bool goes_on = true; goes_on;) {
        goes_on = false;
        for (long long n = node + 1; n < a.num_nodes; ++n) {
            if (a.parents_BN[first + n] != node) continue;
            if (a.tokens_BN[first + n] != a.targets_BN[first + node]) continue;
            a.path_BL[b * a.path_length + length++] = node = n;
            goes_on = true;
            break;
        }
    }
    for (long long i = length; i < a.path_length; ++i) a.path_BL[b * a.path_length + i] = -1;
    a.num_accepted_B[b] = length - 1;
    a.last_B[b] = node;
}

extern "C" __global__ void walk_sampling(const Arguments a) {
    const long long b = blockIdx.x, first = b * a.num_nodes;
    long long node = 0, length = 1;
    float place = 0.0f;
    a.path_BL[b * a.path_length] = 0;
    for (bool goes_on = true; goes_on;) {
        goes_on = false;
        float end = 0.0f;
        const float u = a.uniforms_BN[first + node];
        for (long long n = node + 1; n < a.num_nodes; ++n) {
            if (a.parents_BN[first + n] != node) continue;
            float* p = a.p_BNV + (first + node) * a.vocab_size + a.tokens_BN[first + n];
            end += *p;
            if (*p > 0.0f && u < end) {
                a.path_BL[b * a.path_length + length++] = node = n;
                goes_on = true;
                break;
            }
            *p = 0.0f;
        }
        place = u - end;
    }
    for (long long i = length; i < a.path_length; ++i) a.path_BL[b * a.path_length + i] = -1;
    a.num_accepted_B[b] = length - 1;
    a.last_B[b] = node;
    a.place_B[b] = place;
}
