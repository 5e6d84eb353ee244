/* driver.c: runs every kernel of one instruction set over problems from a file, and writes down all they wrote.
 *
 *   driver ISA PROBLEMS RESULTS
 *
 * check_arm.py writes the problems and knows the order of the results. Work is cut into ranges as it is for threads.
 * All memory ends where an unreadable page begins, so that a kernel which reads or writes past an end does not go
 * unnoticed, and memory to be written is filled with GAP, so that what a kernel wrote by mistake is seen.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "../../src_c/kernels.h"

#define ARENA ((size_t)64 << 20)
#define GUARD ((size_t)1 << 16)
#define GAP   0x5a

enum { X, RESIDUAL, GRAD_OUTPUT, Y, GRAD_INPUT, GRAD_RESIDUAL, OPERANDS };
enum { TILE_A = OPERANDS, TILE_B, MEAN, VAR, G, GX, GRAD_WEIGHT, GRAD_BIAS, WEIGHT, BIAS, COEF, ARENAS = COEF + 8 };

typedef struct {
    int64_t layout, activation, stream, packed, N, C, S;
    int64_t frozen; /* normalize by given statistics, and the backward pass that goes with them */
    int64_t affine; /* weight and bias are given */
    int64_t pieces; /* ranges that tiles, channels and elements are cut into */
    double eps, negative_slope;
    struct {
        int64_t length, outer, inner;
        int64_t spare;   /* floats between the end and the unreadable page */
    } operand[OPERANDS]; /* of length 0: absent */
} header; /* then the float64 mean and variance if frozen, weight and bias if affine, the operands read */

static FILE *problems, *results;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

/* Memory that ends at an unreadable page, filled with GAP. One piece at a time from each arena. */
static void *memory(int arena, size_t bytes) {
    static char *end[ARENAS];
    if (!end[arena]) {
        char *start =
            mmap(NULL, ARENA + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (start == MAP_FAILED || mprotect(start + ARENA, GUARD, PROT_NONE))
            fail("memory");
        end[arena] = start + ARENA;
    }
    if (bytes > ARENA) {
        fprintf(stderr, "a problem is too large\n");
        exit(1);
    }
    return memset(end[arena] - bytes, GAP, bytes);
}

static void *read_values(int arena, size_t count, size_t spare, size_t size) {
    char *data = memory(arena, (count + spare) * size);
    if (fread(data, size, count, problems) != count)
        fail("problems");
    return data;
}

static void write_values(const void *data, int64_t count, size_t size) {
    if (fwrite(&count, sizeof count, 1, results) != 1 || fwrite(data, size, (size_t)count, results) != (size_t)count)
        fail("results");
}

static void run(const bn_kernels *K, const header *h) {
    bn_problem p;
    memset(&p, 0, sizeof p);
    p.layout = (int)h->layout;
    p.activation = (int)h->activation;
    p.stream = (int)h->stream;
    p.packed = (int)h->packed;
    p.negative_slope = (float)h->negative_slope;
    p.N = h->N;
    p.C = h->C;
    p.S = h->S;
    p.pitch = p.packed ? p.C : 0;
    p.fold = p.layout == BN_ROWS ? K->fold(p.C, 0) : 1;

    const ptrdiff_t T = K->tiles(&p), width = p.C * p.fold, E = p.N * p.C * p.S, n = h->pieces;
    const int64_t shape[2] = {T, p.fold};
    write_values(shape, 2, sizeof *shape);

    static _Alignas(64) float room[BN_ROOM];
    p.room = room;

    double *mean, *var;
    if (h->frozen) {
        mean = read_values(MEAN, (size_t)p.C, 0, sizeof *mean);
        var = read_values(VAR, (size_t)p.C, 0, sizeof *var);
    } else {
        mean = memory(MEAN, (size_t)p.C * sizeof *mean);
        var = memory(VAR, (size_t)p.C * sizeof *var);
    }
    const float *weight = h->affine ? read_values(WEIGHT, (size_t)p.C, 0, sizeof *weight) : NULL;
    const float *bias = h->affine ? read_values(BIAS, (size_t)p.C, 0, sizeof *bias) : NULL;

    bn_operand *operands[OPERANDS] = {&p.x, &p.residual, &p.grad_output, &p.y, &p.grad_input, &p.grad_residual};
    for (int i = 0; i < OPERANDS; i++) {
        const size_t length = (size_t)h->operand[i].length, spare = (size_t)h->operand[i].spare;
        operands[i]->outer = h->operand[i].outer;
        operands[i]->inner = h->operand[i].inner;
        if (length)
            operands[i]->data =
                i < Y ? read_values(i, length, spare, sizeof(float)) : memory(i, (length + spare) * sizeof(float));
    }

    double *a = memory(TILE_A, (size_t)(T * width) * sizeof *a), *b = memory(TILE_B, (size_t)(T * width) * sizeof *b);
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t j = 0; j < n; j++) {
            const ptrdiff_t t = T * i / n, c = width * j / n, at = t * width + c;
            K->stats[p.layout](&p, t, T * (i + 1) / n, c, width * (j + 1) / n, a + at, b + at, width);
        }
    write_values(a, T * width, sizeof *a);
    write_values(b, T * width, sizeof *b);
    for (ptrdiff_t j = 0; j < n && !h->frozen; j++) {
        const ptrdiff_t c = p.C * j / n;
        K->pool_stats(&p, c, p.C * (j + 1) / n, a + c, b + c, width, mean, var);
    }
    write_values(mean, p.C, sizeof *mean);
    write_values(var, p.C, sizeof *var);

    bn_coef k;
    float **const coefs[] = {&k.mean, &k.scale, &k.shift, &k.invstd, &k.offset, &k.g_mean, &k.g_proj, &k.g_shift};
    for (int i = 0; i < 8; i++)
        *coefs[i] = memory(COEF + i, (size_t)(width + 16) * sizeof(float));
    for (ptrdiff_t j = 0; j < n; j++)
        K->coef(&p, p.C * j / n, p.C * (j + 1) / n, mean, var, weight, bias, h->eps, &k);
    for (int i = 0; i < 8; i++)
        write_values(*coefs[i], width + 16, sizeof(float));

    for (ptrdiff_t i = n - 1; i >= 0; i--)
        K->forward[p.layout](&p, &k, E * i / n, E * (i + 1) / n, p.S);
    write_values(p.y.data, h->operand[Y].length + h->operand[Y].spare, sizeof(float));

    double *g = memory(G, (size_t)p.C * sizeof *g), *gx = memory(GX, (size_t)p.C * sizeof *gx);
    float *grad_weight = memory(GRAD_WEIGHT, (size_t)p.C * sizeof *grad_weight);
    float *grad_bias = memory(GRAD_BIAS, (size_t)p.C * sizeof *grad_bias);
    memset(a, GAP, (size_t)(T * width) * sizeof *a);
    memset(b, GAP, (size_t)(T * width) * sizeof *b);
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t j = 0; j < n; j++) {
            const ptrdiff_t t = T * i / n, c = width * j / n, at = t * width + c;
            K->sums[p.layout](&p, &k, (int)h->frozen, t, T * (i + 1) / n, c, width * (j + 1) / n, a + at, b + at,
                              width);
        }
    write_values(a, T * width, sizeof *a);
    write_values(b, T * width, sizeof *b);
    for (ptrdiff_t j = 0; j < n; j++) {
        const ptrdiff_t c = p.C * j / n;
        K->pool_sums(&p, &k, c, p.C * (j + 1) / n, a + c, b + c, width, g, gx, grad_weight, grad_bias);
        if (!h->frozen)
            K->backward_coef(&p, c, p.C * (j + 1) / n, g, gx, &k);
    }
    write_values(g, p.C, sizeof *g);
    write_values(gx, p.C, sizeof *gx);
    write_values(grad_weight, p.C, sizeof *grad_weight);
    write_values(grad_bias, p.C, sizeof *grad_bias);
    for (int i = 0; i < 8; i++)
        write_values(*coefs[i], width + 16, sizeof(float));

    for (ptrdiff_t i = n - 1; i >= 0 && !h->frozen; i--)
        K->backward[p.layout](&p, &k, E * i / n, E * (i + 1) / n, p.S);
    for (int i = GRAD_INPUT; i <= GRAD_RESIDUAL; i++)
        write_values(operands[i]->data, h->operand[i].length + h->operand[i].spare, sizeof(float));
}

int main(int argc, char **argv) {
    const bn_kernels *tables[3], *K = NULL;
    if (argc != 4) {
        fprintf(stderr, "usage: %s ISA PROBLEMS RESULTS\n", argv[0]);
        return 2;
    }
    for (int i = bn_supported(tables) - 1; i >= 0; i--)
        if (!strcmp(tables[i]->name, argv[1]))
            K = tables[i];
    if (!K) {
        fprintf(stderr, "this CPU and build have no %s\n", argv[1]);
        return 3;
    }
    if (!(problems = fopen(argv[2], "rb")))
        fail(argv[2]);
    if (!(results = fopen(argv[3], "wb")))
        fail(argv[3]);
    header h;
    while (fread(&h, sizeof h, 1, problems) == 1)
        run(K, &h);
    if (ferror(problems) || fclose(results))
        fail("files");
    return 0;
}
