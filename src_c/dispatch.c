/* dispatch.c: which kernels there are, and this CPU can run. */
#include "kernels.h"

#define JOIN(part, isa, element) part##isa##_##element
#define DECLARE(isa, element)                                                                                          \
    extern const bn_loops JOIN(bn_planes_, isa, element), JOIN(bn_masked_planes_, isa, element);                       \
    extern const bn_loops JOIN(bn_rows_, isa, element), JOIN(bn_masked_rows_, isa, element);
#define LOOPS(isa, element)                                                                                            \
    [BN_##element] = {&JOIN(bn_planes_, isa, element), &JOIN(bn_rows_, isa, element),                                  \
                      &JOIN(bn_masked_planes_, isa, element), &JOIN(bn_masked_rows_, isa, element)}
#define KERNELS(isa)                                                                                                   \
    DECLARE(isa, f32)                                                                                                  \
    DECLARE(isa, f64)                                                                                                  \
    DECLARE(isa, f16)                                                                                                  \
    DECLARE(isa, bf16)                                                                                                 \
    extern const bn_terms JOIN(bn_terms_, isa, f32);                                                                   \
    extern const bn_terms JOIN(bn_terms_, isa, f64);                                                                   \
    static const bn_kernels kernels_##isa = {                                                                          \
        .name = #isa,                                                                                                  \
        .loops = {LOOPS(isa, f32), LOOPS(isa, f64), LOOPS(isa, f16), LOOPS(isa, bf16)},                                \
        .terms = {[BN_f32] = &JOIN(bn_terms_, isa, f32),                                                               \
                  [BN_f64] = &JOIN(bn_terms_, isa, f64),                                                               \
                  [BN_f16] = &JOIN(bn_terms_, isa, f32),                                                               \
                  [BN_bf16] = &JOIN(bn_terms_, isa, f32)},                                                             \
    };
BN_ISAS(KERNELS)

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
    if (!BITS(leaf1[ECX], 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29)) /* FMA, OSXSAVE, AVX, F16C */
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
        tables[n++] = &kernels_##isa;
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

const char *bn_element_name(int element) {
#define NAME(code, name, bytes, real_bytes)                                                                            \
    case BN_##code: return name;
    switch (element) { BN_ELEMENTS(NAME) }
#undef NAME
    return NULL;
}

ptrdiff_t bn_element_bytes(int element) {
#define BYTES(code, name, bytes, real_bytes) bytes,
    static const signed char of[] = {BN_ELEMENTS(BYTES)};
#undef BYTES
    return of[element];
}

ptrdiff_t bn_real_bytes(int element) {
#define BYTES(code, name, bytes, real_bytes) real_bytes,
    static const signed char of[] = {BN_ELEMENTS(BYTES)};
#undef BYTES
    return of[element];
}
