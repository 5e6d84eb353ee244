/* kernels_avx2.c: the kernels for AVX2 and FMA. */
#if !defined(__AVX2__) || !defined(__FMA__)
#error "kernels_avx2.c: compiled without its instruction set's flags"
#endif
#define FASTBN_SIMD_AVX2
#include "kernels.inc.h"

TABLE(avx2)
