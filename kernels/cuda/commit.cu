// Keep the accepted nodes of each row's tree in the KV cache, in place.
//
// In:  the cache's tensors (keys and values of every layer, each [B, H, T, head]), path_BL and
//      num_accepted_B of the verdict, the column where each row's tree begins, and the one where its
//      accepted tokens go, which is no later; a negative one leaves the row as it is.
// Out: column to_B[b] + i of row b is what column from_B[b] + path_BL[b][i] was, for i up to
//      num_accepted_B[b]; in all tensors.
// Floor: the bytes of the moved columns, read once and written once. A column of a 7B model (32 layers
//      of 32 heads of 128, in bfloat16) has 512 KB: four of them cost 1.4 us at 3.0 TB/s.
//
// A thread owns one unit of a head in all columns and goes through the path in order: a unit is
// overwritten only after it was read, by the thread that read it, and no barrier is needed.
//
// Grid (tensors, 1, B), any block. Compile with -DUNIT_BYTES=16, 4 or 2: what divides all strides.
// B batch, H heads, T columns, L path length.

#if UNIT_BYTES == 16
typedef uint4 Unit;
#elif UNIT_BYTES == 4
typedef unsigned Unit;
#elif UNIT_BYTES == 2
typedef unsigned short Unit;
#else
#error "define UNIT_BYTES as 16, 4 or 2"
#endif

constexpr int IN_FLIGHT = 4;  // units that a thread reads before it writes them

// All fields take 8 bytes. Strides count units.
struct Arguments {
    Unit* const* tensors;
    long long stride_b, stride_h, stride_t;
    const long long* path_BL;
    const long long* num_accepted_B;
    const long long* from_B;
    const long long* to_B;
    long long path_length, num_heads, head_units, num_columns;
};

// Where a unit of the path's i-th node is; -1 beyond the cache.
__device__ __forceinline__ long long source_of(const Arguments& a, int row, int i) {
    const long long node = a.path_BL[row * a.path_length + i];
    const long long column = a.from_B[row] + node;
    return node >= 0 && column < a.num_columns ? column : -1;
}

extern "C" __global__ void __launch_bounds__(1024) commit(const __grid_constant__ Arguments a) {
    const int row = blockIdx.z;
    const int length = (int)min(a.num_accepted_B[row] + 1, a.path_length);
    const long long to = a.to_B[row];
    if (to < 0) return;
    for (long long n = threadIdx.x; n < a.num_heads * a.head_units; n += blockDim.x) {
        Unit* unit = a.tensors[blockIdx.x] + row * a.stride_b + n / a.head_units * a.stride_h +
                     n % a.head_units;
        for (int first = 0; first < length; first += IN_FLIGHT) {
            Unit moved[IN_FLIGHT];
            long long source[IN_FLIGHT];
#pragma unroll
            for (int k = 0; k < IN_FLIGHT; ++k) {
                source[k] = first + k < length ? source_of(a, row, first + k) : -1;
                if (source[k] >= 0) moved[k] = unit[source[k] * a.stride_t];
            }
#pragma unroll
            for (int k = 0; k < IN_FLIGHT; ++k)
                if (source[k] > to + first + k) unit[(to + first + k) * a.stride_t] = moved[k];
        }
    }
}
