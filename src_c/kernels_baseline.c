/* kernels_baseline.c: the kernels for SSE2 on x86-64, NEON on AArch64: what every CPU of the architecture has. */
#if defined(__AVX__)
#error "kernels_baseline.c: compiled for more than the baseline"
#endif
#include "kernels.inc.h"

TABLE(baseline)
