// The arithmetic peak of the machine, for benchmarks.
#pragma once

#include <cstddef>
#include <string>

namespace lowbit {

// Multiplies and adds in the registers of `threads` threads at once, in `iterations` rounds of
// independent chains (1 to 2^24); returns how many products that were. type: "float32", "int16" or
// "int8", the last only on levels whose matrix products of codes take bytes. Throws
// std::invalid_argument.
double multiply_adds(const std::string& type, size_t iterations, int threads);

}  // namespace lowbit
