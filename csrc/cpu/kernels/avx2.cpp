#define LOWBIT_ISA avx2
#define LOWBIT_LANES_FILE "lanes_avx2.inl"
#include "codec.inl"
#include "product.inl"
#include "rotation.inl"
