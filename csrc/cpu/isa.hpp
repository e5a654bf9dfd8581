// The ISA levels compiled into this module, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "kernels/interface.hpp"

namespace lowbit {

// Kernels of the level in use: the highest this processor supports, unless set_isa chose another.
const CodecKernels& codec_kernels();
RotationKernel rotation_kernel();
const ProductKernels& product_kernels();
// The same without tiles: for narrow products, and for steps that are no whole tiles.
const ProductKernels& vector_kernels();

std::string current_isa();
// Lowest first.
std::vector<std::string> supported_isas();
// Throws std::invalid_argument if `name` is not one of supported_isas().
void set_isa(const std::string& name);

}  // namespace lowbit
