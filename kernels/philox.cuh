// Philox4x32-10 (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3): a counter and a key
// in, a random word out. Nothing is kept between calls.

#pragma once

// The first of the four words of the counter (node, sequence, call), keyed by the seed.
__device__ __forceinline__ unsigned philox(unsigned long long seed, unsigned long long call, unsigned sequence,
                           unsigned node) {
    unsigned c[4] = {node, sequence, (unsigned)call, (unsigned)(call >> 32)};
    unsigned key[2] = {(unsigned)seed, (unsigned)(seed >> 32)};
#pragma unroll 1
    for (int round = 0; round < 10; ++round) {
        const unsigned long long a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
        const unsigned c1 = c[1], c3 = c[3];
        c[0] = (unsigned)(b >> 32) ^ c1 ^ key[0];
        c[1] = (unsigned)b;
        c[2] = (unsigned)(a >> 32) ^ c3 ^ key[1];
        c[3] = (unsigned)a;
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return c[0];
}
