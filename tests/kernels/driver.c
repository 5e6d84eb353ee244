/* driver.c: the C of fastbn without Python: runs the operations of one instruction set over problems from a file,
 * through plan and schedule, and writes down all they wrote.
 *
 *   driver ISA PROBLEMS RESULTS
 *
 * problems.py writes the problems and knows the order of the results. Members are threads of their own. All memory ends
 * where an unreadable page begins, so that a kernel which reads or writes past an end does not go unnoticed, and memory
 * to be written is filled with GAP, so that what a kernel wrote by mistake is seen.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "tiles.h"
#include "workplace.h"

#define ARENA       ((size_t)64 << 20)
#define GUARD       ((size_t)1 << 16)
#define GAP         0x5a
#define MAX_THREADS 16

enum { X, RESIDUAL, GRAD_OUTPUT, Y, GRAD_INPUT, GRAD_RESIDUAL, OPERANDS };
enum {
    MEAN = OPERANDS,
    VAR,
    DZ,
    DZ_DEV,
    GRAD_WEIGHT,
    GRAD_BIAS,
    WEIGHT,
    BIAS,
    COEF,
    SCRATCH,
    MASK,
    AVERAGES,
    ARENAS = AVERAGES + 4
};

typedef struct {
    int64_t layout, element, activation, packed, N, C, S;
    int64_t fixed;        /* normalize by given statistics, and the backward pass that goes with them */
    int64_t affine;       /* weight and bias are given */
    int64_t threads;      /* of the plan */
    int64_t cache, group; /* bytes in place of the machine's: see bn_tuning */
    int64_t from_output;  /* what the activation let pass is taken from y */
    int64_t masked, mask_output;
    double eps, negative_slope;
    struct {
        int64_t length, outer, inner;
        int64_t spare;   /* elements between the end and the unreadable page */
    } operand[OPERANDS]; /* of length 0: absent */
} header; /* then running mean and variance, weight and bias if affine, the mask if masked, the operands read */

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
    if (fwrite(&count, sizeof count, 1, results) != 1 ||
        (count && fwrite(data, size, (size_t)count, results) != (size_t)count))
        fail("results");
}

/* ---- a team of threads */

static pthread_barrier_t barrier;

static void wait_for_all(void *unused) {
    (void)unused;
    pthread_barrier_wait(&barrier);
}

typedef struct {
    const bn_call *call;
    bn_member me;
} part_of_team;

static void *do_share(void *arg) {
    const part_of_team *part = arg;
    bn_do_share(part->call, &part->me);
    return NULL;
}

static void run_team(const bn_call *call, int team) {
    pthread_t threads[MAX_THREADS];
    part_of_team parts[MAX_THREADS];
    pthread_barrier_init(&barrier, NULL, (unsigned)team);
    for (int i = 0; i < team; i++) {
        const part_of_team part = {call, {i, team, wait_for_all, NULL}};
        parts[i] = part;
        if (pthread_create(&threads[i], NULL, do_share, &parts[i]))
            fail("threads");
    }
    for (int i = 0; i < team; i++)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&barrier);
}

/* ---- operations */

static bn_machine machine;
static bn_tuning tuning;

/* One operation on a call whose operands are given; writes down how it was gone about. */
static void operate(bn_call *call, enum bn_operation op, int threads) {
    bn_make_plan(&call->plan, &call->p, op, &machine, &tuning, threads);
    const bn_plan *plan = &call->plan;
    call->scratch = NULL;
    if (op != BN_INFERENCE) /* its coefficients are made */
        call->scratch = memory(SCRATCH, (plan->scratch.bytes + 63) / 64 * 64);
    if (op != BN_INFERENCE && call->p.mask)
        bn_count_mask(call);
    const int64_t way[] = {plan->way,         plan->T,          plan->sums.rows,   plan->apply.rows,
                           plan->apply.store, plan->by_columns, plan->apply.period};
    write_values(way, sizeof way / sizeof *way, sizeof *way);
    /* a team may be smaller than planned */
    run_team(call, plan->threads > 2 ? plan->threads - 1 : plan->threads);
}

static bn_operand operand_of(const header *h, int i, void *data) {
    const bn_operand o = {data, (ptrdiff_t)h->operand[i].outer, (ptrdiff_t)h->operand[i].inner};
    return o;
}

static size_t element_bytes(const header *h) { return (size_t)bn_element_bytes((int)h->element); }
static size_t real_bytes(const header *h) { return (size_t)bn_real_bytes((int)h->element); }

static void *read_operand(const header *h, int i) {
    const size_t length = (size_t)h->operand[i].length, spare = (size_t)h->operand[i].spare;
    return length ? read_values(i, length, spare, element_bytes(h)) : NULL;
}

static void *new_operand(const header *h, int i) {
    const size_t length = (size_t)h->operand[i].length, spare = (size_t)h->operand[i].spare;
    return length ? memory(i, (length + spare) * element_bytes(h)) : NULL;
}

static void write_operand(const header *h, int i, const void *data) {
    write_values(data, h->operand[i].length + h->operand[i].spare, element_bytes(h));
}

/* The mask as kernels.h wants it; returns how many positions are real. */
static int64_t read_mask(const header *h, bn_problem *p) {
    const ptrdiff_t pitch = mask_pitch(p);
    unsigned char *mask = memory(MASK, (size_t)(p->N * pitch + BN_LINE));
    int64_t real = 0;
    p->mask = mask;
    p->mask_output = (int)h->mask_output;
    for (ptrdiff_t n = 0; n < p->N; n++, mask += pitch) {
        if (fread(mask, 1, (size_t)p->S, problems) != (size_t)p->S)
            fail("problems");
        real += count_real(mask, p->S);
        for (ptrdiff_t s = p->S; s < pitch; s++)
            mask[s] = mask[s - p->S];
    }
    memset(mask, 0, BN_LINE);
    return real;
}

static void training(bn_call *call, const header *h, const float *running_mean, const float *running_var) {
    const size_t C = (size_t)h->C;
    float *averages[2] = {memory(AVERAGES, C * sizeof(float)), memory(AVERAGES + 1, C * sizeof(float))};
    double *exact[2] = {memory(AVERAGES + 2, C * sizeof(double)), memory(AVERAGES + 3, C * sizeof(double))};
    memcpy(averages[0], running_mean, C * sizeof(float));
    memcpy(averages[1], running_var, C * sizeof(float));
    for (size_t c = 0; c < C; c++) {
        exact[0][c] = c % 2 ? averages[0][c] : averages[0][c] * 1.00000001; /* what they were rounded from, or not */
        exact[1][c] = c % 2 ? 7.0 : averages[1][c];
    }
    const bn_running mean = {(char *)averages[0], (char *)exact[0], sizeof(float), sizeof(double)};
    const bn_running var = {(char *)averages[1], (char *)exact[1], sizeof(float), sizeof(double)};
    call->mean = memory(MEAN, C * sizeof(double));
    call->var = memory(VAR, C * sizeof(double));
    call->running_mean = mean;
    call->running_var = var;
    call->update = 1;
    call->skip_nonfinite = h->C % 2 == 0;
    call->momentum = 0.1;
    call->unbiasing = 1.25;
    operate(call, BN_TRAINING, (int)h->threads);
    write_values(call->mean, h->C, sizeof(double));
    write_values(call->var, h->C, sizeof(double));
    for (int i = 0; i < 2; i++) {
        write_values(averages[i], h->C, sizeof(float));
        write_values(exact[i], h->C, sizeof(double));
    }
}

static void inference(bn_call *call, const header *h, const float *running_mean, const float *running_var) {
    double *mean = memory(MEAN, (size_t)h->C * sizeof *mean), *var = memory(VAR, (size_t)h->C * sizeof *var);
    const size_t step = ((size_t)(h->C * call->p.fold + BN_LINE) * real_bytes(h) + 63) / 64 * 64;
    const bn_terms *terms = call->K->terms[h->element];
    bn_coef_at(&call->k, memory(COEF, 3 * step), step, 0);
    for (int64_t c = 0; c < h->C; c++) {
        mean[c] = running_mean[c];
        var[c] = running_var[c];
    }
    call->mean = mean;
    call->var = var;
    call->source.mean = mean;
    call->source.var = var;
    if (real_bytes(h) == sizeof(float))
        terms->running_coef(&call->p, running_mean, running_var, &call->source, &call->k);
    else
        terms->coef(&call->p, 0, h->C, &call->source, &call->k);
    operate(call, BN_INFERENCE, (int)h->threads);
}

/* The backward pass in one, and from sums that were taken before. */
static void backward(bn_call *call, const header *h) {
    const bn_operand grad_residual = call->p.residual.data || h->operand[GRAD_RESIDUAL].length
                                         ? operand_of(h, GRAD_RESIDUAL, new_operand(h, GRAD_RESIDUAL))
                                         : call->p.grad_residual;
    call->p.grad_residual = grad_residual;
    call->p.grad_input = operand_of(h, GRAD_INPUT, new_operand(h, GRAD_INPUT));
    call->grad_weight = memory(GRAD_WEIGHT, (size_t)h->C * real_bytes(h));
    call->grad_bias = memory(GRAD_BIAS, (size_t)h->C * real_bytes(h));
    operate(call, BN_BACKWARD, (int)h->threads);
    write_values(call->grad_weight, h->C, real_bytes(h));
    write_values(call->grad_bias, h->C, real_bytes(h));
    write_operand(h, GRAD_INPUT, call->p.grad_input.data);
    write_operand(h, GRAD_RESIDUAL, call->p.grad_residual.data);

    const bn_operand none = {NULL, 0, 0};
    call->grad_weight = call->grad_bias = NULL;
    call->p.grad_input = call->p.grad_residual = none;
    call->dz = memory(DZ, (size_t)h->C * sizeof(double));
    call->dz_dev = memory(DZ_DEV, (size_t)h->C * sizeof(double));
    operate(call, BN_SUMS, (int)h->threads);
    write_values(call->dz, h->C, sizeof(double));
    write_values(call->dz_dev, h->C, sizeof(double));
    call->p.grad_input = operand_of(h, GRAD_INPUT, new_operand(h, GRAD_INPUT));
    operate(call, BN_GRAD_INPUT, (int)h->threads);
    write_operand(h, GRAD_INPUT, call->p.grad_input.data);
}

static void run(const bn_kernels *K, const header *h) {
    const size_t C = (size_t)h->C;
    const float *running_mean = read_values(AVERAGES + 2, C, 0, sizeof(float));
    const float *running_var = read_values(AVERAGES + 3, C, 0, sizeof(float));
    float *averages[2] = {malloc(C * sizeof(float)), malloc(C * sizeof(float))};
    memcpy(averages[0], running_mean, C * sizeof(float));
    memcpy(averages[1], running_var, C * sizeof(float));
    bn_call call;
    memset(&call, 0, sizeof call);
    call.K = K;
    call.p.layout = (int)h->layout;
    call.p.element = (int)h->element;
    call.p.activation = (int)h->activation;
    call.p.packed = (int)h->packed;
    call.p.negative_slope = h->element == BN_f64 ? h->negative_slope : (float)h->negative_slope;
    call.p.N = h->N;
    call.p.C = h->C;
    call.p.S = h->S;
    call.p.pitch = call.p.packed ? call.p.C : 0;
    call.p.fold = call.p.layout == BN_ROWS && call.p.packed ? bn_fold(call.p.C) : 1;
    call.count = (double)(h->N * h->S);
    call.source.eps = h->eps;
    call.source.weight = h->affine ? read_values(WEIGHT, C, 0, real_bytes(h)) : NULL;
    call.source.bias = h->affine ? read_values(BIAS, C, 0, real_bytes(h)) : NULL;
    if (h->masked)
        call.count = (double)read_mask(h, &call.p);
    tuning = bn_tunings[machine.class];
    tuning.cache = h->cache;
    tuning.group = h->group;
    machine.lanes = K->terms[BN_f32]->lanes;
    machine.held = K->terms[BN_f32]->held;
    machine.overlaps = K->terms[BN_f32]->overlaps;

    call.p.x = operand_of(h, X, read_operand(h, X));
    void *residual = read_operand(h, RESIDUAL), *grad_output = read_operand(h, GRAD_OUTPUT);
    call.p.residual = operand_of(h, RESIDUAL, residual);
    call.p.y = operand_of(h, Y, new_operand(h, Y));
    if (h->fixed)
        inference(&call, h, averages[0], averages[1]);
    else
        training(&call, h, averages[0], averages[1]);
    write_operand(h, Y, call.p.y.data);

    bn_call back;
    memset(&back, 0, sizeof back);
    back.K = K;
    back.p = call.p;
    back.count = call.count;
    back.source = call.source;
    back.source.mean = call.mean;
    back.source.var = call.var;
    back.p.fixed = (int)h->fixed;
    back.p.y.data = NULL;
    back.p.grad_output = operand_of(h, GRAD_OUTPUT, grad_output);
    if (!h->activation) /* then nothing depends on it */
        back.p.residual.data = NULL;
    if (h->from_output) {
        back.p.residual = call.p.y;
        back.p.from_output = 1;
    }
    backward(&back, h);
    free(averages[0]);
    free(averages[1]);
}

int main(int argc, char **argv) {
    const bn_kernels *tables[BN_MAX_ISAS], *K = NULL;
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
    /* facts that do not depend on where this runs */
    bn_named_machine("zen3", &machine);
    header h;
    while (fread(&h, sizeof h, 1, problems) == 1)
        run(K, &h);
    if (ferror(problems) || fclose(results))
        fail("files");
    return 0;
}
