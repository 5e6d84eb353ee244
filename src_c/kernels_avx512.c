/* kernels_avx512.c: the kernels for AVX-512 F, BW, DQ and VL. */
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__)
#error "kernels_avx512.c: compiled without its instruction set's flags"
#endif
#define FASTBN_SIMD_AVX512
#include "kernels.inc.h"

TABLE(avx512)
