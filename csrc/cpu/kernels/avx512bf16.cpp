#define LOWBIT_ISA avx512bf16
#define LOWBIT_LANES_FILE "lanes_avx512.inl"
#include "product.inl"
