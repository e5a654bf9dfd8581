#include "peaks.hpp"

#include "arguments.hpp"
#include "isa.hpp"

namespace lowbit {

namespace {

WordType word_type(const std::string& name) {
    if (name == "float32") {
        return WordType::float32;
    }
    if (name == "int16") {
        return WordType::int16;
    }
    expect(name == "int8", "type: expected 'float32', 'int16' or 'int8', got '" + name + "'");
    expect(product_kernels().code_type == WordType::int8,
           "type: level '" + current_isa() + "' has no products of bytes; expected 'int16'");
    return WordType::int8;
}

}  // namespace

double multiply_adds(const std::string& type, size_t iterations, int threads) {
    const WordType word = word_type(type);
    expect(iterations >= 1 && iterations <= kMostIterations,
           "iterations: expected 1 to " + std::to_string(kMostIterations) + ", got " +
               std::to_string(iterations));
    expect(threads >= 1, "threads: expected at least 1, got " + std::to_string(threads));
    const PeakKernel kernel = peak_kernel();
    double total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
    for (int thread = 0; thread < threads; ++thread) {
        total += kernel(word, iterations);
    }
    return total;
}

}  // namespace lowbit
