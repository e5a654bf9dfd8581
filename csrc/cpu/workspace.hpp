// What matrix products share: packing buffers, and how their work is split over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include "arguments.hpp"

namespace lowbit {

// Words that symmetric products pack at once: with fewer and longer steps the sums, which are as
// large as the result, are read and written less often.
constexpr size_t kPackedWords = size_t{1} << 20;
// Below this many multiply-adds a thread costs more than it saves.
constexpr size_t kWorkPerThread = size_t{1} << 19;
// Matrices of more multiply-adds than this take all threads one after the other, so that there is
// one large workspace and not one for each thread.
constexpr size_t kLargeWork = size_t{1} << 24;

inline size_t ceil_divide(size_t a, size_t b) {
    return (a + b - 1) / b;
}

// Memory that was given back and is kept for the next call: the system hands out
// large blocks as new pages, and to fill a page for the first time takes as long as it takes to
// multiply it (0.85 ms of a product of 576 x 576 became 1.8 ms).
class KeptMemory {
  public:
    void* take(size_t bytes) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            for (Block& block : blocks_) {
                if (block.memory != nullptr && block.bytes >= bytes && block.bytes / 2 <= bytes) {
                    void* const memory = block.memory;
                    block = {};
                    return memory;
                }
            }
        }
        return std::aligned_alloc(64, bytes);
    }
    void give_back(void* memory, size_t bytes) {
        if (memory != nullptr && bytes <= kMost) {
            const std::lock_guard<std::mutex> lock(mutex_);
            size_t place = 0;
            while (place < kBlocks && blocks_[place].memory != nullptr) {
                ++place;
            }
            if (place == kBlocks) {
                place = oldest_;
                oldest_ = (oldest_ + 1) % kBlocks;
            }
            std::swap(memory, blocks_[place].memory);
            blocks_[place].bytes = bytes;
        }
        std::free(memory);
    }

  private:
    struct Block {
        void* memory = nullptr;
        size_t bytes = 0;
    };
    static constexpr size_t kBlocks = 4;  // at most 16 MiB
    static constexpr size_t kMost = size_t{1} << 22;
    std::mutex mutex_;
    Block blocks_[kBlocks];
    size_t oldest_ = 0;
};

inline KeptMemory kept_memory;

// Bytes that buffers hold now, and the most they have held since somebody asked.
inline std::atomic<size_t> buffer_bytes{0};
inline std::atomic<size_t> most_buffer_bytes{0};

// Uninitialised memory: a slice of whole cache lines for each worker.
template <typename T>
class Buffer {
  public:
    explicit Buffer(size_t count, size_t workers = 1)
        : slice_(ceil_divide(count * sizeof(T), 64) * 64),
          bytes_(slice_ * workers),
          memory_(static_cast<char*>(kept_memory.take(bytes_))) {
        if (memory_ == nullptr && bytes_ != 0) {
            throw std::bad_alloc();
        }
        const size_t now = buffer_bytes += bytes_;
        size_t most = most_buffer_bytes;
        while (most < now && !most_buffer_bytes.compare_exchange_weak(most, now)) {
        }
    }
    ~Buffer() {
        buffer_bytes -= bytes_;
        kept_memory.give_back(memory_, bytes_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* get(size_t worker = 0) const { return reinterpret_cast<T*>(memory_ + worker * slice_); }

  private:
    size_t slice_;
    size_t bytes_;
    char* memory_;
};

// Threads for a batch of matrices: `matrices` work on one each, or `within` work on one together.
// One of the two is 1.
struct Threads {
    size_t matrices, within;
    size_t all() const { return matrices * within; }
};

inline Threads split_threads(int threads, size_t batch, size_t work_of_matrix) {
    expect(threads >= 1, "threads: expected at least 1, got ", threads);
    const auto useful = [&](size_t work) {
        return std::min(static_cast<size_t>(threads), std::max<size_t>(1, work / kWorkPerThread));
    };
    const size_t matrices = std::min(batch, useful(batch * work_of_matrix));
    const size_t within = useful(work_of_matrix);
    return within > matrices || work_of_matrix > kLargeWork ? Threads{1, within}
                                                            : Threads{matrices, 1};
}

// body(index, worker) for each index below `count`: each worker has an equal part of them.
template <typename Body>
void parallel_for(size_t workers, size_t count, const Body& body) {
    if (workers == 1) {  // not even a parallel region of one thread
        for (size_t index = 0; index < count; ++index) {
            body(index, size_t{0});
        }
        return;
    }
#pragma omp parallel for num_threads(static_cast<int>(workers)) schedule(static, 1)
    for (size_t worker = 0; worker < workers; ++worker) {
        const size_t end = count * (worker + 1) / workers;
        for (size_t index = count * worker / workers; index < end; ++index) {
            body(index, worker);
        }
    }
}

// The same for indices that take unequal time: each goes to the worker that is free first.
template <typename Body>
void parallel_in_turn(size_t workers, size_t count, const Body& body) {
    std::atomic<size_t> next{0};
    parallel_for(workers, workers, [&](size_t, size_t worker) {
        for (size_t index = next++; index < count; index = next++) {
            body(index, worker);
        }
    });
}

}  // namespace lowbit
