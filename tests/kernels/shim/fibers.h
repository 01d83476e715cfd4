// A fiber for every thread of a block, and what it waits for; scheduler.h decides who runs.

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
    bool has_begun = false;  // some thread has run
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

}  // namespace shim
