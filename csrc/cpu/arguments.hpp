// Arguments that the entry points share, and checks of them. Throw std::invalid_argument.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace lowbit {

// [batch, rows, columns]: the address, and the strides of the three in elements.
using Matrices = std::tuple<uintptr_t, ptrdiff_t, ptrdiff_t, ptrdiff_t>;

// The message is built only if it is needed.
template <typename... Parts>
void expect(bool condition, const Parts&... parts) {
    if (!condition) {
        std::ostringstream message;
        (message << ... << parts);
        throw std::invalid_argument(message.str());
    }
}

template <typename T>
T* pointer(uintptr_t address, const char* name) {
    expect(address != 0, name, ": expected a pointer, got null");
    return reinterpret_cast<T*>(address);
}

inline void expect_bits(int bits) {
    expect(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits: expected 2, 3, 4 or 8, got ",
           bits);
}

}  // namespace lowbit
