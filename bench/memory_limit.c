/* The memory limit: kernels that move the least traffic an operation can move and compute next to nothing.
   copy: 1 read + 1 write. add: 2 reads + 1 write. Each with ordinary and with non-temporal stores, which the caller
   tries in turn to take the fastest. Of two passes the first only reads, and the second goes from the end, where it
   finds what is still in cache: the least for statistics over all rows. Pointers are 64-byte aligned; a tail of less
   than a line is plain C. */
#include <immintrin.h>
#include <omp.h>
#include <stddef.h>

enum { LINE = 64, FLOATS = LINE / sizeof(float), BLOCK = 16384 };

/* One range function per ISA, operation and kind of store; n is in floats, a multiple of FLOATS. To prefetch so many
   bytes ahead is worth up to a tenth beyond the caches at times, where the hardware's own stops at every page, and
   costs up to a fifth at others: the caller tries both. */
#define RANGE(NAME, TARGET, LANES, VALUE, STORE)                                                                       \
    __attribute__((target(TARGET))) static void NAME(const float *a, const float *b, float *y, size_t n,               \
                                                     size_t ahead) {                                                   \
        (void)b;                                                                                                       \
        for (size_t i = 0; i < n; i += FLOATS) {                                                                       \
            if (ahead)                                                                                                 \
                _mm_prefetch((const char *)(a + i) + ahead, _MM_HINT_T1);                                              \
            for (size_t j = i; j < i + FLOATS; j += LANES)                                                             \
                STORE(y + j, VALUE);                                                                                   \
        }                                                                                                              \
    }

#define COPY512 _mm512_load_ps(a + j)
#define ADD512  _mm512_add_ps(_mm512_load_ps(a + j), _mm512_load_ps(b + j))
#define COPY256 _mm256_load_ps(a + j)
#define ADD256  _mm256_add_ps(_mm256_load_ps(a + j), _mm256_load_ps(b + j))
#define COPY128 _mm_load_ps(a + j)
#define ADD128  _mm_add_ps(_mm_load_ps(a + j), _mm_load_ps(b + j))

RANGE(copy128, "sse2", 4, COPY128, _mm_store_ps)
RANGE(copy128_nt, "sse2", 4, COPY128, _mm_stream_ps)
RANGE(add128, "sse2", 4, ADD128, _mm_store_ps)
RANGE(add128_nt, "sse2", 4, ADD128, _mm_stream_ps)
RANGE(copy256, "avx2", 8, COPY256, _mm256_store_ps)
RANGE(copy256_nt, "avx2", 8, COPY256, _mm256_stream_ps)
RANGE(add256, "avx2", 8, ADD256, _mm256_store_ps)
RANGE(add256_nt, "avx2", 8, ADD256, _mm256_stream_ps)
RANGE(copy512, "avx512f", 16, COPY512, _mm512_store_ps)
RANGE(copy512_nt, "avx512f", 16, COPY512, _mm512_stream_ps)
RANGE(add512, "avx512f", 16, ADD512, _mm512_store_ps)
RANGE(add512_nt, "avx512f", 16, ADD512, _mm512_stream_ps)

/* A first pass, in order and with nothing but the hardware's prefetching: faster so than with prefetch instructions.
   What it finds goes where the second pass writes. */
#define READ(NAME, TARGET, LANES, VECTOR, LOAD, OR, STORE)                                                             \
    __attribute__((target(TARGET))) static void NAME(const float *a, const float *b, float *y, size_t n) {             \
        if (n == 0)                                                                                                    \
            return;                                                                                                    \
        VECTOR found = LOAD((const void *)a);                                                                          \
        for (size_t i = 0; i < n; i += LANES) {                                                                        \
            found = OR(found, LOAD((const void *)(a + i)));                                                            \
            if (b)                                                                                                     \
                found = OR(found, LOAD((const void *)(b + i)));                                                        \
        }                                                                                                              \
        STORE((void *)y, found);                                                                                       \
    }
READ(read128, "sse2", 4, __m128i, _mm_load_si128, _mm_or_si128, _mm_store_si128)
READ(read256, "avx2", 8, __m256i, _mm256_load_si256, _mm256_or_si256, _mm256_store_si256)
READ(read512, "avx512f", 16, __m512i, _mm512_load_si512, _mm512_or_si512, _mm512_store_si512)

typedef void range_fn(const float *, const float *, float *, size_t, size_t);
typedef void read_fn(const float *, const float *, float *, size_t);

/* [isa][add][nt] */
static range_fn *const table[3][2][2] = {{{copy128, copy128_nt}, {add128, add128_nt}},
                                         {{copy256, copy256_nt}, {add256, add256_nt}},
                                         {{copy512, copy512_nt}, {add512, add512_nt}}};
static read_fn *const reads[3] = {read128, read256, read512};

/* The widest isa of the table that this CPU has: 0 SSE2, 1 AVX2, 2 AVX-512. */
int memory_limit_isa(void) { return __builtin_cpu_supports("avx512f") ? 2 : __builtin_cpu_supports("avx2") ? 1 : 0; }

/* y = a, or a + b where b is given. */
void memory_limit(const float *a, const float *b, float *y, size_t n, int isa, int nt, size_t ahead, int passes,
                  int threads) {
    range_fn *range = table[isa][b != NULL][nt];
    const size_t lines = n / FLOATS;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const size_t t = omp_get_thread_num(), team = omp_get_num_threads();
        const size_t start = lines * t / team * FLOATS, stop = lines * (t + 1) / team * FLOATS;
        if (passes == 1)
            range(a + start, b ? b + start : NULL, y + start, stop - start, ahead);
        else {
            reads[isa](a + start, b ? b + start : NULL, y + start, stop - start);
            for (size_t end = stop, length; end > start; end -= length) {
                length = end - start < BLOCK ? end - start : BLOCK;
                range(a + end - length, b ? b + end - length : NULL, y + end - length, length, ahead);
            }
        }
        if (nt)
            _mm_sfence();
    }
    for (size_t i = lines * FLOATS; i < n; i++)
        y[i] = b ? a[i] + b[i] : a[i];
}
