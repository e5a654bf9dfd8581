// Checks of arguments that the entry points share. Throws std::invalid_argument.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace lowbit {

inline void expect(bool condition, const std::string& message) {
    if (!condition) {
        throw std::invalid_argument(message);
    }
}

template <typename T>
T* pointer(uintptr_t address, const char* name) {
    expect(address != 0, std::string(name) + ": expected a pointer, got null");
    return reinterpret_cast<T*>(address);
}

inline void expect_bits(int bits) {
    expect(bits == 2 || bits == 3 || bits == 4 || bits == 8,
           "bits: expected 2, 3, 4 or 8, got " + std::to_string(bits));
}

}  // namespace lowbit
