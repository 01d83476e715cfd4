// The CPU runs a CUDA grid: a fiber for every thread of a block, blocks one after another.
//
// A barrier hands control back to the scheduler, which goes on when all threads have arrived. Blocks
// of a cluster take turns; their shared memory is swapped in and out. The order in which threads and
// blocks run is forward, reverse, or random from a seed: what depends on it without a barrier shows.
// Shared memory starts as 0xCD bytes.
//
// `launch` returns null, or the text of what went wrong: a barrier that not all threads reach, threads
// at different barriers, a lane outside its mask. Not seen: faults of the memory model (a missing
// __threadfence), true concurrency between blocks, inline PTX.

#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

extern "C" {  // the linker's: where variables marked __shared__ lie
extern char __start_shim_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_shim_shared[] __attribute__((weak, visibility("hidden")));
}

namespace shim {

enum class State { ready, at_barrier, at_warp, at_cluster, done };
enum Order { forward = 0, reverse = 1, shuffled = 2 };
constexpr size_t STACK_BYTES = 256 * 1024;

// The lanes of a mask hand values to each other. Two rounds of slots: a lane may still read the
// last exchange's while another writes the next one's.
struct Exchange {
    unsigned mask = 0, arrived = 0, round = 0;
    uint64_t slot[2][32];
};

struct Fiber {
    ucontext_t context;
    jmp_buf resume;
    bool has_started = false;
    State state = State::ready;
    int site = 0;  // which barrier it waits at
    unsigned thread = 0, mask = 0, round = 0;
    std::unique_ptr<char[]> stack;
};

struct Block {
    uint3 index;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<std::vector<Exchange>> warps;
    std::vector<char> shared;  // while another block of the cluster runs
    int votes = 0, vote_result = 0;
};

struct Machine {
    std::vector<Block> cluster;
    Block* block = nullptr;
    Fiber* fiber = nullptr;
    dim3 grid, threads;
    std::function<void()> body;
    Order order = forward;
    std::mt19937 random;
    jmp_buf scheduler, failure;
    uint64_t progress = 0;
    std::string error;
};
inline Machine machine;

inline size_t shared_bytes() { return (size_t)(__stop_shim_shared - __start_shim_shared); }

// ---- failing ----------------------------------------------------------------------------------

[[noreturn]] inline void fail(const char* message) {
    const char* names[] = {"ready", "at a barrier", "at a warp operation", "at a cluster barrier", "done"};
    machine.error = message;
    for (Block& block : machine.cluster)
        for (auto& fiber : block.fibers)
            if (fiber->state != State::done)
                machine.error += "\n  block " + std::to_string(block.index.x) + "," +
                                 std::to_string(block.index.y) + "," + std::to_string(block.index.z) +
                                 " thread " + std::to_string(fiber->thread) + " " +
                                 names[(int)fiber->state] + ", site " + std::to_string(fiber->site);
    machine.cluster.clear();  // fibers in mid-flight are of no use to the next launch
    _longjmp(machine.failure, 1);
}

// ---- switching --------------------------------------------------------------------------------

inline void yield(State state, int site) {
    Fiber* fiber = machine.fiber;
    fiber->state = state;
    fiber->site = site;
    if (!_setjmp(fiber->resume)) _longjmp(machine.scheduler, 1);
}

inline void fiber_main() {
    for (;;) {  // one turn a block: fibers are made once
        machine.body();
        ++machine.progress;
        yield(State::done, 0);
    }
}

inline void resume(Fiber& fiber) {
    machine.fiber = &fiber;
    fiber.state = State::ready;
    ++machine.progress;
    if (_setjmp(machine.scheduler)) return;
    if (fiber.has_started) _longjmp(fiber.resume, 1);
    fiber.has_started = true;
    setcontext(&fiber.context);
}

inline std::unique_ptr<Fiber> make_fiber(unsigned thread) {
    auto fiber = std::make_unique<Fiber>();
    fiber->thread = thread;
    fiber->stack = std::make_unique<char[]>(STACK_BYTES);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = STACK_BYTES;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
    return fiber;
}

// ---- waiting ----------------------------------------------------------------------------------

inline int barrier(int site, bool vote = false) {
    machine.block->votes += vote;
    yield(State::at_barrier, site);
    return machine.block->vote_result;
}

inline void cluster_barrier(int site) { yield(State::at_cluster, site); }

inline Exchange& exchange_of(Block& block, unsigned thread, unsigned mask) {
    auto& known = block.warps[thread / 32];
    for (Exchange& exchange : known)
        if (exchange.mask == mask) return exchange;
    known.emplace_back();
    known.back().mask = mask;
    return known.back();
}

// Every lane of the mask brings a value; each gets read(all values).
template <class Read>
inline uint64_t exchange(unsigned mask, uint64_t value, int site, Read read) {
    Fiber* fiber = machine.fiber;
    Block* block = machine.block;
    const unsigned lane = fiber->thread % 32;
    if (!(mask >> lane & 1)) fail("a lane calls a warp operation whose mask lacks it");
    Exchange* here = &exchange_of(*block, fiber->thread, mask);
    const unsigned round = here->round;
    here->slot[round & 1][lane] = value;
    here->arrived |= 1u << lane;
    fiber->mask = mask;
    fiber->round = round;
    if (here->arrived == mask) {
        here->arrived = 0;
        ++here->round;
        ++machine.progress;
    } else {
        yield(State::at_warp, site);
    }
    return read(exchange_of(*block, fiber->thread, mask).slot[round & 1]);
}

// ---- scheduling -------------------------------------------------------------------------------

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
    if (block.fibers.size() != num_threads) {
        block.fibers.clear();
        for (unsigned i = 0; i < num_threads; ++i) block.fibers.push_back(make_fiber(i));
    }
    for (auto& fiber : block.fibers) fiber->state = State::ready;
}

inline void run_cluster() {
    auto is_done = [](Block& block) {
        return std::all_of(block.fibers.begin(), block.fibers.end(),
                           [](auto& fiber) { return fiber->state == State::done; });
    };
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
            std::memcpy(__start_shim_shared, block.shared.data(), shared_bytes());
            for (unsigned i : counted<unsigned>(block.fibers.size()))
                if (!(late >> (i / 32 + 7 * rank) % 64 & 1) && can_run(block, *block.fibers[i]))
                    resume(*block.fibers[i]);
            if (is_complete(block, State::at_barrier, true)) release(block, State::at_barrier);
            std::memcpy(block.shared.data(), __start_shim_shared, shared_bytes());
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
    return reinterpret_cast<T*>(there.shared.data() + (reinterpret_cast<char*>(here) - __start_shim_shared));
}

}  // namespace shim
