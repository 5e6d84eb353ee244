/* dispatch.c: which kernels this CPU can run. */
#include "kernels.h"

#if defined(FASTBN_HAVE_AVX2) || defined(FASTBN_HAVE_AVX512)

#include <stdint.h>
#ifdef _MSC_VER
#include <immintrin.h>
#include <intrin.h>
static void cpuid(uint32_t leaf, uint32_t out[4]) { __cpuidex((int *)out, (int)leaf, 0); }
static uint64_t xcr0(void) { return _xgetbv(0); }
#else
#include <cpuid.h>
static void cpuid(uint32_t leaf, uint32_t out[4]) { __cpuid_count(leaf, 0, out[0], out[1], out[2], out[3]); }
static uint64_t xcr0(void) {
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0)); /* the intrinsic would need -mxsave */
    return ((uint64_t)hi << 32) | lo;
}
#endif

enum { EAX, EBX, ECX, EDX };
#define BITS(word, mask) (((word) & (mask)) == (mask))

/* A feature counts only when the operating system saves the registers it uses (xgetbv). */
static void features(int *avx2, int *avx512) {
    uint32_t leaf0[4], leaf1[4], leaf7[4];
    *avx2 = *avx512 = 0;
    cpuid(0, leaf0);
    if (leaf0[EAX] < 7)
        return;
    cpuid(1, leaf1);
    if (!BITS(leaf1[ECX], 1u << 12 | 1u << 27 | 1u << 28)) /* FMA, OSXSAVE, AVX */
        return;
    cpuid(7, leaf7);
    const uint64_t saved = xcr0();
    *avx2 = BITS(saved, 0x06u) && BITS(leaf7[EBX], 1u << 5);
    *avx512 =
        *avx2 && BITS(saved, 0xe6u) && BITS(leaf7[EBX], 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31); /* F DQ BW VL */
}

#endif

#define SUPPORTED_baseline 1
#define SUPPORTED_avx2     avx2
#define SUPPORTED_avx512   avx512

int bn_supported(const bn_kernels *tables[BN_MAX_ISAS]) {
    int n = 0;
#if defined(FASTBN_HAVE_AVX2) || defined(FASTBN_HAVE_AVX512)
    int avx2, avx512;
    features(&avx2, &avx512);
#endif
#define TAKE(isa)                                                                                                      \
    if (SUPPORTED_##isa)                                                                                               \
        tables[n++] = &bn_kernels_##isa;
    BN_ISAS(TAKE)
#undef TAKE
    return n;
}

const char *bn_activation_name(int code) {
#define NAME(code, name)                                                                                               \
    case BN_##code: return name;
    switch (code) { BN_ACTIVATIONS(NAME) }
#undef NAME
    return NULL;
}
