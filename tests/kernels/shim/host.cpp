// A kernel file (-DKERNEL_FILE) as a shared library: every entry by its name, and a way to launch it.

#include "cuda_shim.h"

#include KERNEL_FILE

// Return null, or what went wrong.
extern "C" const char* shim_launch(void (*entry)(Arguments), const Arguments* arguments,
                                   const unsigned* grid, unsigned threads, unsigned cluster, int order,
                                   unsigned seed) {
    return shim::launch({grid[0], grid[1], grid[2]}, {threads, 1, 1}, cluster, (shim::Order)order, seed,
                        [=] { entry(*arguments); });
}

extern "C" unsigned long long shim_arguments_bytes() { return sizeof(Arguments); }
