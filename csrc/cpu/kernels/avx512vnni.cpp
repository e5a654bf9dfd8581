#define LOWBIT_ISA avx512vnni
#define LOWBIT_LANES_FILE "lanes_avx512.inl"
#include "product.inl"
