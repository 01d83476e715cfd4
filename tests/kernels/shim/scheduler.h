// The CPU runs a CUDA grid: a fiber for every thread of a block, blocks one after another.
//
// A barrier hands control back to the scheduler, which goes on when all threads have arrived. Blocks
// of a cluster take turns; their shared memory is swapped in and out. The order in which threads and
// blocks run is forward, reverse, or random from a seed, with some warps far behind the others: what
// depends on the order without a barrier shows. Shared memory starts as 0xCD bytes.
//
// `launch` returns null, or the text of what went wrong: a barrier that not all threads reach, threads
// at different barriers, a lane outside its mask, shared memory of a block that has not begun or has
// ended. Not seen: faults of the memory model (a missing __threadfence), true concurrency between
// blocks, inline PTX.

#pragma once
#include "fibers.h"

namespace shim {

template <class T>
void arrange(std::vector<T>& items) {
    if (machine.order == reverse) std::reverse(items.begin(), items.end());
    if (machine.order == shuffled) std::shuffle(items.begin(), items.end(), machine.random);
}

template <class T>
std::vector<T> counted(size_t count) {
    std::vector<T> items(count);
    std::iota(items.begin(), items.end(), T(0));
    arrange(items);
    return items;
}

inline bool can_run(Block& block, Fiber& fiber) {
    if (fiber.state == State::ready) return true;
    return fiber.state == State::at_warp &&
           exchange_of(block, fiber.thread, fiber.mask).round != fiber.round;
}

// Let all of a block's threads that wait in `state` go on, if all that are not done wait there.
inline bool is_complete(Block& block, State state, bool is_one_site) {
    int site = 0;
    bool is_any = false;
    for (auto& fiber : block.fibers) {
        if (fiber->state == State::done) continue;
        if (fiber->state != state) return false;
        if (is_one_site && is_any && fiber->site != site)
            fail("threads of a block wait at different barriers");
        site = fiber->site;
        is_any = true;
    }
    return is_any;
}

inline void release(Block& block, State state) {
    block.vote_result = std::exchange(block.votes, 0);
    for (auto& fiber : block.fibers)
        if (fiber->state == state) fiber->state = State::ready;
    ++machine.progress;
}

inline void begin_block(Block& block, uint3 index) {
    const unsigned num_threads = machine.threads.x * machine.threads.y * machine.threads.z;
    block.index = index;
    block.warps.assign((num_threads + 31) / 32, {});
    block.shared.assign(shared_bytes(), (char)0xCD);
    block.votes = 0;
    block.has_begun = false;
    if (block.fibers.size() != num_threads) {
        block.fibers.clear();
        for (unsigned i = 0; i < num_threads; ++i) block.fibers.push_back(make_fiber(i));
    }
    for (auto& fiber : block.fibers) fiber->state = State::ready;
}

// A kernel without shared memory has no section for it: null must not even be copied 0 bytes of.
inline void copy_shared(char* to, const char* from) {
    if (shared_bytes() > 0) std::memcpy(to, from, shared_bytes());
}

inline bool is_done(Block& block) {
    return std::all_of(block.fibers.begin(), block.fibers.end(),
                       [](auto& fiber) { return fiber->state == State::done; });
}

inline void run_cluster() {
    uint64_t late = 0;  // warps that do not run, in random order: some fall far behind the others
    unsigned redraw = 0;
    for (unsigned round = 0;; ++round) {
        const uint64_t before = machine.progress;
        if (machine.order == shuffled && round >= redraw) {
            late = machine.random() % 2 ? machine.random() | (uint64_t)machine.random() << 32 : 0;
            redraw = round + 1 + machine.random() % 32;
        }
        bool is_all_done = true, is_all_at_cluster = true;
        for (unsigned rank : counted<unsigned>(machine.cluster.size())) {
            Block& block = machine.cluster[rank];
            machine.block = &block;
            copy_shared(__start_shim_shared, block.shared.data());
            for (unsigned i : counted<unsigned>(block.fibers.size()))
                if (!(late >> (i / 32 + 7 * rank) % 64 & 1) && can_run(block, *block.fibers[i])) {
                    block.has_begun = true;
                    resume(*block.fibers[i]);
                }
            if (is_complete(block, State::at_barrier, true)) release(block, State::at_barrier);
            copy_shared(block.shared.data(), __start_shim_shared);
            is_all_done &= is_done(block);
            is_all_at_cluster &= is_complete(block, State::at_cluster, false);
        }
        if (is_all_done) return;
        if (is_all_at_cluster)
            for (Block& block : machine.cluster) release(block, State::at_cluster);
        if (machine.progress == before && late == 0) fail("deadlock: not all threads reach a barrier");
        if (machine.progress == before) {
            late = 0;  // they catch up
            redraw = round + 2;
        }
    }
}

// Run body() for every thread of the grid. A cluster is `cluster` neighbours along x.
inline const char* launch(dim3 grid, dim3 threads, unsigned cluster, Order order, unsigned seed,
                          std::function<void()> body) {
    machine.grid = grid;
    machine.threads = threads;
    machine.body = std::move(body);
    machine.order = order;
    machine.random.seed(seed);
    if (_setjmp(machine.failure)) return machine.error.c_str();
    machine.cluster.resize(cluster);
    for (uint64_t i : counted<uint64_t>((uint64_t)grid.x / cluster * grid.y * grid.z)) {
        const unsigned along = grid.x / cluster;
        const unsigned x = i % along * cluster, y = i / along % grid.y, z = i / along / grid.y;
        for (unsigned rank = 0; rank < cluster; ++rank)
            begin_block(machine.cluster[rank], {x + rank, y, z});
        run_cluster();
    }
    return nullptr;
}

// The same variable in the shared memory of another block of the cluster.
template <class T>
T* remote(T* here, unsigned rank) {
    Block& there = machine.cluster[rank];
    if (&there == machine.block) return here;
    if (!there.has_begun) fail("shared memory of a block that has not begun");
    if (is_done(there)) fail("shared memory of a block that has ended");
    return reinterpret_cast<T*>(there.shared.data() + (reinterpret_cast<char*>(here) - __start_shim_shared));
}

}  // namespace shim
