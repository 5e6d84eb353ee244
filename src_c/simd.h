/* simd.h: one vocabulary of vector operations in float32, or float64 if REAL_IS_FLOAT64, and which file has the words
 * for this object.
 *
 * Every operation is defined lane by lane, so that a kernel written against it gives the same bits on every
 * instruction set with a fused multiply-add; on SSE2 vfma rounds twice. CPUs without a file of their own have
 * portable.h's.
 *
 *   vf, VL          a vector and its number of lanes
 *   HELD            vectors of coefficients that its registers hold in a loop: 0, where that was not faster
 *   vm              a comparison's result, for vselect
 *   vmask(p)        the lanes whose byte is not 0, of VL bytes at p
 *   vt              the first n lanes of a vector (n may be 0 or VL), for the ends of runs
 *   vmax(a, b)      a > b ? a : b    both give b where one is a NaN, so vmax(zero, z) keeps a NaN in z
 *   vmin(a, b)      a < b ? a : b
 *   vfma(a, b, c)   a * b + c        vfnma(a, b, c)   c - a * b
 *   vjoin(a, b, t)  a in the lanes of t, b in the others
 *   vsums(v)        in lane i the sum of the lanes of v[i], for VL vectors, as a tree: lane j + lane j + VL / 2, ...
 *   OVERLAPS        whether two passes go in one loop on it: 0, where that was not measured to be faster
 *   STREAMS         whether vstream passes the caches by: 0 saves the code that would be for it
 *   vdiv(a, b)      a / b
 *   vscale(a, m)    a * 2^k, where the low bits of m as an integer are those of k, and the result is a normal number
 *   vexp_minus(a)   e^-a within 1 ulp, from -88.25 to 87, or -708 to 708; a NaN gives anything
 *   vh, vi          in float32: VL halves as they lie in memory; VL integers of 32 bits
 *   vhload ... vhstream   as vload ... vstream, of halves; those of tails by
 *   vcount(t)       how many lanes t has, unless TAILS_OF_HALVES tells of better ones
 *   vhraise, vhupper      halves as the upper ones of integers whose lower are 0; and the upper ones of integers
 *   vhwiden, vhnarrow     from halves to integers and back, which are below 2^16: where F16_HARDWARE is not defined
 *   vfloat, vbits   the same bits as floats and as integers, which viadd, viand, vior, vishl and vishr work on
 *   vf16, vf16_one, vto_f16   from float16, of one of them, and, to nearest even, to it: where F16_HARDWARE is defined
 *   vhold(a)        a in a register: where a value from memory has two uses, compilers load it twice
 *   vaddress(p)     p in a register: not to be computed anew, nor from what is near it
 *   vprefetch(p, cache)   the line of p to that cache, and no fault wherever p points
 */
#ifndef FASTBN_SIMD_H
#define FASTBN_SIMD_H

#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_MSC_VER) && !defined(__clang__)
#define INLINE static __forceinline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

/* Before a loop over a few vectors: unrolled early, or compilers keep the vectors' array in memory. */
#if defined(__GNUC__)
#define UNROLLED _Pragma("GCC unroll 8")
#else
#define UNROLLED
#endif

enum { TO_L1, TO_L2 };

/* In single operations as in those of vectors; s390x and the old numbers of 32-bit x86 do not always. */
#if FLT_EVAL_METHOD != 0
#error "float must be computed in float: -std=gnu11, and on 32-bit x86 -msse2 -mfpmath=sse"
#endif

#if defined(FASTBN_PORTABLE)
#include "simd/portable.h"
#elif defined(REAL_IS_FLOAT64)
#if defined(__AVX512F__)
#include "simd/avx512_f64.h"
#elif defined(__AVX2__)
#include "simd/avx2_f64.h"
#elif defined(__aarch64__) || defined(_M_ARM64)
#include "simd/neon_f64.h"
#elif defined(__SSE2__) || defined(_M_X64)
#include "simd/sse2_f64.h"
#else
#include "simd/portable.h"
#endif
#else
#if defined(__AVX512F__)
#include "simd/avx512.h"
#elif defined(__AVX2__)
#include "simd/avx2.h"
#elif defined(__aarch64__) || defined(_M_ARM64)
#include "simd/neon.h"
#elif defined(__SSE2__) || defined(_M_X64)
#include "simd/sse2.h"
#else
#include "simd/portable.h"
#endif
#endif

/* e^-a: r = a + k * ln 2, whose e^-r is a polynomial, times 2^k. The sum that rounds to k has its bits at its low end.
 */
#ifdef REAL_IS_FLOAT64
/* The Taylor series, whose next term is 4e-18 at most. */
INLINE vf vexp_minus(vf a) {
    const vf rounding = vset1(6755399441055744.0); /* 1.5 * 2^52 */
    const vf m = vfma(a, vset1(-1.4426950408889634), rounding), k = vsub(m, rounding);
    const vf r = vfma(k, vset1(1.90821492927058770e-10), vfma(k, vset1(6.93147180369123816490e-01), a));
    static const double series[] = {-1.0 / 6227020800, 1.0 / 479001600, -1.0 / 39916800, 1.0 / 3628800,
                                    -1.0 / 362880,     1.0 / 40320,     -1.0 / 5040,     1.0 / 720,
                                    -1.0 / 120,        1.0 / 24,        -1.0 / 6,        1.0 / 2};
    vf p = vset1(series[0]);
    for (int i = 1; i < 12; i++)
        p = vfma(p, r, vset1(series[i]));
    return vscale(vadd(vfma(p, vmul(r, r), vsub(vset1(0), r)), vset1(1.0)), m);
}
#else
/* The polynomial of this degree that begins with 1 - r and is nearest: 3e-9. Halves of ln 2 are those of Cephes. */
INLINE vf vexp_minus(vf a) {
    const vf rounding = vset1(12582912.0f); /* 1.5 * 2^23 */
    const vf m = vfma(a, vset1(-1.44269504088896341f), rounding), k = vsub(m, rounding);
    const vf r = vfma(k, vset1(-2.12194440e-4f), vfma(k, vset1(0.693359375f), a));
    vf p = vfma(vset1(1.3814584e-3f), r, vset1(-8.368724e-3f));
    p = vfma(p, r, vset1(4.166839e-2f));
    p = vfma(p, r, vset1(-0.16666521f));
    p = vfma(p, r, vset1(0.49999994f));
    p = vfma(p, r, vset1(-1.0f));
    return vscale(vfma(p, r, vset1(1.0f)), m);
}
#endif

#if defined(__GNUC__) && defined(VECTOR_REGISTER)
INLINE vf vhold(vf a) {
    __asm__("" : "+" VECTOR_REGISTER(a));
    return a;
}
#else
INLINE vf vhold(vf a) { return a; }
#endif

#if defined(__GNUC__)
INLINE void vprefetch(const void *p, int cache) {
    if (cache == TO_L1)
        __builtin_prefetch(p, 0, 3);
    else
        __builtin_prefetch(p, 0, 2);
}
#else
INLINE void vprefetch(const void *p, int cache) {
#if defined(_M_X64)
    if (cache == TO_L1)
        _mm_prefetch((const char *)p, _MM_HINT_T0);
    else
        _mm_prefetch((const char *)p, _MM_HINT_T1);
#else
    (void)p;
    (void)cache;
#endif
}
#endif

#endif
