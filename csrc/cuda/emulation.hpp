// CUDA C++ on the CPU, for tests: the kernels' own sources, compiled by a host compiler.
//
// A block's threads are fibers that run one at a time, blocks run one after another. A thread runs
// until it waits at a barrier; warps and lanes take turns forwards or in an order drawn anew for
// each turn, so that a result which hangs on a missing barrier differs between schedules. What is
// modelled is what PTX promises and no more:
//   - shared memory holds 0xff (NaN) when a block starts, and ends where it was asked to end, in
//     heap memory that AddressSanitizer watches;
//   - a barrier which some threads of a block, or lanes of a warp, do not reach is an error;
//   - an asynchronous copy arrives as late as it may: when its group is waited for.
// Not modelled: time, memory ordering between blocks, the rounding of approximate instructions
// (the kernels use none), bank conflicts, registers.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

namespace emulation {

constexpr size_t kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kOperandBytes = 32;  // the most that a lane hands to its warp at once

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

// ---- Fibers ----

#if defined(__x86_64__)
// Saves the registers that a call preserves and continues on another stack.
extern "C" void lowbit_emulation_switch(void** save, void* load);
asm(R"(
.text
.weak lowbit_emulation_switch
.type lowbit_emulation_switch, @function
lowbit_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size lowbit_emulation_switch, .-lowbit_emulation_switch
)");

struct Context {
    void* stack_pointer = nullptr;

    void prepare(char* stack, void (*entry)()) {
        // As after a call from nowhere: six saved registers below the address of the entry.
        void** top = reinterpret_cast<void**>(stack + kStackBytes);
        top[-2] = reinterpret_cast<void*>(entry);
        std::memset(top - 8, 0, 6 * sizeof *top);
        stack_pointer = top - 8;
    }
    void switch_to(Context& other) { lowbit_emulation_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
    ucontext_t context;

    void prepare(char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = kStackBytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

struct FreeStack {
    void operator()(char* stack) const { std::free(stack); }
};

struct Thread {
    Context context;
    std::unique_ptr<char, FreeStack> stack;
    dim3 index;
    size_t number = 0;
    State state = State::ready;
    size_t collectives = 0;  // operations of its warp that it has taken part in
    // Groups of asynchronous copies; the last one is open.
    std::vector<std::vector<Copy>> copies;
};

// What lanes hand to their warp. Two places in turn: a lane that runs ahead to the next operation
// must not overwrite what others still read, and cannot get to the one after it.
struct Operands {
    alignas(16) unsigned char bytes[2][kWarp][kOperandBytes];
};

struct Machine {
    std::vector<Thread> threads;
    std::vector<Operands> warps;
    std::function<void()> body;
    Context scheduler;
    Thread* current = nullptr;
    dim3 block_index, block_size, grid_size;
    unsigned char* shared = nullptr;
    unsigned schedule = 0;          // 0: forwards; else the seed of an order
    const char* failure = nullptr;  // why a thread cannot go on
    std::mt19937 random;
};
inline Machine machine;

inline void pause(State state) {
    machine.current->state = state;
    machine.current->context.switch_to(machine.scheduler);
}

// An error of the running thread. Its stack has no caller to throw to: the scheduler throws.
inline void fail(const char* reason) {
    machine.failure = reason;
    pause(State::done);
}

inline void thread_entry() {
    machine.body();
    pause(State::done);
    std::abort();  // a thread that is done is not continued
}

inline void prepare(Thread& thread) {
    thread.state = State::ready;
    thread.collectives = 0;
    thread.copies.assign(1, {});
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(thread.stack.get(), kStackBytes);
#endif
    thread.context.prepare(thread.stack.get(), thread_entry);
}

[[noreturn]] inline void diverged(const char* barrier) {
    throw std::runtime_error(std::string("threads diverged at a barrier of their ") + barrier);
}

inline std::vector<size_t> turns(size_t first, size_t count) {
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), first);
    if (machine.schedule != 0) {
        std::shuffle(order.begin(), order.end(), machine.random);
    }
    return order;
}

// Runs a warp until its lanes are done or wait for the rest of the block.
inline void run_warp(size_t first, size_t count) {
    for (;;) {
        for (size_t number : turns(first, count)) {
            Thread& thread = machine.threads[number];
            if (thread.state == State::ready) {
                machine.current = &thread;
                machine.scheduler.switch_to(thread.context);
            }
            if (machine.failure != nullptr) {
                throw std::runtime_error(std::exchange(machine.failure, nullptr));
            }
        }
        size_t waiting = 0;
        for (size_t i = first; i < first + count; ++i) {
            waiting += machine.threads[i].state == State::at_warp_barrier;
        }
        if (waiting == 0) {
            return;
        }
        if (waiting != count) {
            diverged("warp");
        }
        for (size_t i = first; i < first + count; ++i) {
            machine.threads[i].state = State::ready;
        }
    }
}

inline void run_block() {
    const size_t count = machine.threads.size();
    for (Thread& thread : machine.threads) {
        prepare(thread);
    }
    for (;;) {
        for (size_t warp : turns(0, machine.warps.size())) {
            run_warp(warp * kWarp, std::min(kWarp, count - warp * kWarp));
        }
        size_t done = 0;
        for (const Thread& thread : machine.threads) {
            done += thread.state == State::done;
        }
        if (done == count) {
            return;
        }
        if (done != 0) {
            diverged("block");
        }
        for (Thread& thread : machine.threads) {
            thread.state = State::ready;
        }
    }
}

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
    const size_t count = size_t{block.x} * block.y * block.z;
    machine.threads.resize(count);
    machine.warps.resize((count + kWarp - 1) / kWarp);
    machine.block_size = block;
    machine.grid_size = grid;
    machine.body = std::move(body);
    machine.random.seed(machine.schedule);
    for (size_t i = 0; i < count; ++i) {
        Thread& thread = machine.threads[i];
        thread.number = i;
        thread.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
        if (!thread.stack) {
            thread.stack.reset(static_cast<char*>(std::aligned_alloc(64, kStackBytes)));
        }
    }
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                // Allocated to the byte, so that AddressSanitizer sees the first one past the end.
                std::unique_ptr<char, FreeStack> shared(
                    static_cast<char*>(std::malloc(shared_bytes)));
                std::memset(shared.get(), 0xff, shared_bytes);
                machine.shared = reinterpret_cast<unsigned char*>(shared.get());
                machine.block_index = dim3(x, y, z);
                run_block();
            }
        }
    }
}

// ---- Operations of a warp ----

inline size_t lane() {
    return machine.current->number % kWarp;
}

// Hands `mine` to the warp; the result reads the operand of any lane.
template <typename T>
class Exchange {
  public:
    explicit Exchange(const T& mine) {
        static_assert(sizeof(T) <= kOperandBytes, "enlarge kOperandBytes");
        Thread& thread = *machine.current;
        operands_ = machine.warps[thread.number / kWarp].bytes[thread.collectives++ % 2];
        std::memcpy(operands_[lane()], &mine, sizeof mine);
        pause(State::at_warp_barrier);
    }
    T of(size_t other) const {
        T value;
        std::memcpy(&value, operands_[other % kWarp], sizeof value);
        return value;
    }

  private:
    unsigned char (*operands_)[kOperandBytes];
};

}  // namespace emulation

#define threadIdx (::emulation::machine.current->index)
#define blockIdx (::emulation::machine.block_index)
#define blockDim (::emulation::machine.block_size)
#define gridDim (::emulation::machine.grid_size)

inline void __syncthreads() {
    emulation::pause(emulation::State::at_block_barrier);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::Exchange<T>(value).of(emulation::lane() ^ static_cast<size_t>(mask));
}

// The build forbids contraction, so that these round once each as their namesakes do.
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline double __ddiv_rn(double a, double b) {
    return a / b;
}
inline double __dsqrt_rn(double a) {
    return std::sqrt(a);
}
inline float __double2float_rn(double a) {
    return static_cast<float>(a);
}
inline float __int2float_rn(int a) {
    return static_cast<float>(a);
}
inline int __float2int_rn(float a) {  // halves to even
    return static_cast<int>(std::nearbyint(a));
}
inline uint32_t __float_as_uint(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
