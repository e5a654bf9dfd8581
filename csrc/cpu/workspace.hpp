// What matrix products share: packing buffers, and how many threads are worth waking.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#include "arguments.hpp"

namespace lowbit {

// Words that symmetric products pack at once: with fewer and longer steps the sums, which are as
// large as the result, are read and written less often.
constexpr size_t kPackedWords = size_t{1} << 20;
// Below this many multiply-adds a thread costs more than it saves.
constexpr size_t kWorkPerThread = size_t{1} << 19;

inline size_t ceil_divide(size_t a, size_t b) {
    return (a + b - 1) / b;
}

struct FreeMemory {
    void operator()(void* memory) const { std::free(memory); }
};

// Bytes that buffers hold now, and the most they have held since somebody asked.
inline std::atomic<size_t> buffer_bytes{0};
inline std::atomic<size_t> most_buffer_bytes{0};

// Uninitialised memory for whole cache lines.
template <typename T>
class Buffer {
  public:
    explicit Buffer(size_t count)
        : bytes_(ceil_divide(count * sizeof(T), 64) * 64),
          memory_(static_cast<T*>(std::aligned_alloc(64, bytes_))) {
        if (memory_ == nullptr && bytes_ != 0) {
            throw std::bad_alloc();
        }
        const size_t now = buffer_bytes += bytes_;
        size_t most = most_buffer_bytes;
        while (most < now && !most_buffer_bytes.compare_exchange_weak(most, now)) {
        }
    }
    ~Buffer() { buffer_bytes -= bytes_; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* get() const { return memory_.get(); }

  private:
    size_t bytes_;
    std::unique_ptr<T, FreeMemory> memory_;
};

inline int useful_threads(int threads, size_t multiply_adds) {
    expect(threads >= 1, "threads: expected at least 1, got " + std::to_string(threads));
    const size_t useful = std::max<size_t>(1, multiply_adds / kWorkPerThread);
    return static_cast<int>(std::min(static_cast<size_t>(threads), useful));
}

}  // namespace lowbit
