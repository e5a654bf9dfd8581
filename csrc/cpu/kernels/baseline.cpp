#define LOWBIT_ISA baseline
#define LOWBIT_LANES_FILE "lanes_generic.inl"
#include "codec.inl"
#include "product.inl"
#include "rotation.inl"
