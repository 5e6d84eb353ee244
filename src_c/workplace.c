/* workplace.c: places in a call's memory, some of them chosen so that nothing waits for what lies beside it. */
#include <stdint.h>

#include "tiles.h"
#include "workplace.h"

void bn_coef_at(bn_coef *k, char *at, size_t step, int backward) {
    const bn_coef none = {0};
    *k = none;
    k->mean = at;
    k->scale = at + step;
    k->shift = at + 2 * step;
    if (backward) {
        k->invstd = at + 3 * step;
        k->offset = at + 4 * step;
        k->g_mean = at + 5 * step;
        k->g_proj = at + 6 * step;
        k->g_shift = at + 7 * step;
    }
}

#define PAGE   ((uintptr_t)4096) /* addresses whole pages apart are alike to a load that comes after a store */
#define PLACES 8                 /* to choose from */

/* How far two addresses are from each other in their low bits: half a page if half a period. */
static uintptr_t apart(uintptr_t a, uintptr_t b, uintptr_t period) {
    const uintptr_t d = (a - b) & (period - 1);
    return (d < period - d ? d : period - d) * (PAGE / period);
}

bn_neighbour bn_rows_beside(const void *at, size_t bytes_of_row) {
    const size_t low = bytes_of_row & (~bytes_of_row + 1);
    const bn_neighbour rows = {at, low < PAGE ? low : PAGE};
    return rows;
}

char *bn_clear_of(char *memory, const bn_neighbour *beside, int n) {
    uintptr_t most = 0;
    char *best = memory;
    for (char *at = memory; at < memory + PAGE; at += PAGE / PLACES) {
        uintptr_t least = PAGE;
        for (int i = 0; i < n; i++) {
            const uintptr_t d = apart((uintptr_t)at, (uintptr_t)beside[i].at, beside[i].period);
            if (beside[i].period > PAGE / PLACES && d < least)
                least = d;
        }
        if (least > most) {
            most = least;
            best = at;
        }
    }
    return best;
}

/* The array that begins at channel `first`, as if it began at channel 0. */
static void *from_channel(void *array, ptrdiff_t first, size_t size) {
    return (void *)((uintptr_t)array - (uintptr_t)first * size);
}

static void index_by_channel(bn_workplace *w, ptrdiff_t first, size_t value) {
    void **const arrays[] = {&w->k.mean,   &w->k.scale,  &w->k.shift,  &w->k.invstd,
                             &w->k.offset, &w->k.g_mean, &w->k.g_proj, &w->k.g_shift};
    for (int i = 0; i < BN_COEF_BACKWARD; i++)
        if (*arrays[i])
            *arrays[i] = from_channel(*arrays[i], first, value);
    w->g = from_channel(w->g, first, sizeof(double));
    w->gx = from_channel(w->gx, first, sizeof(double));
}

/* Statistics and sums go to their caller, or where they are needed meanwhile. */
static void results_to(const bn_call *call, bn_workplace *w) {
    w->mean = call->mean ? call->mean : w->g; /* which the forward pass has no other use for */
    w->var = call->var ? call->var : w->gx;
}

static size_t value_bytes(const bn_call *call) { return (size_t)bn_real_bytes(call->p.element); }

static int has_backward_coef(const bn_call *call) { return call->p.grad_output.data != NULL; }

void bn_count_mask(bn_call *call) {
    int *const real = (int *)(call->scratch + call->plan.scratch.real);
    for (ptrdiff_t t = 0; t < call->plan.T; t++)
        real[t] = (int)real_of_tile(&call->p, t);
    call->p.real = real;
}

bn_workplace bn_own_place(const bn_call *call, const bn_member *me) {
    const bn_scratch *s = &call->plan.scratch;
    const ptrdiff_t most = s->owner_channels;
    bn_workplace w = {0};
    w.tile_a = (double *)(call->scratch + s->owners + (size_t)me->member * s->owner_step);
    w.tile_b = w.tile_a + call->plan.T * most;
    w.g = w.tile_b + call->plan.T * most;
    w.gx = w.g + most;
    char *const coef = (char *)(((uintptr_t)(w.gx + most) + 63) / 64 * 64);
    bn_coef_at(&w.k, coef, ((size_t)most * value_bytes(call) + 63) / 64 * 64, has_backward_coef(call));
    return w;
}

bn_workplace bn_for_channels_from(const bn_call *call, const bn_workplace *own, ptrdiff_t first) {
    bn_workplace w = *own;
    index_by_channel(&w, first, value_bytes(call));
    results_to(call, &w);
    return w;
}

bn_workplace bn_shared_place(const bn_call *call, const bn_member *me) {
    const bn_problem *p = &call->p;
    const bn_scratch *s = &call->plan.scratch;
    const size_t row = (size_t)(call->plan.width * bn_element_bytes(p->element));
    bn_workplace w = {0};
    w.k = call->k;
    if (call->scratch == NULL)
        return w;
    w.tile_a = (double *)(call->scratch + s->tile_a);
    w.tile_b = (double *)(call->scratch + s->tile_b);
    w.g = (double *)(call->scratch + s->g);
    w.gx = (double *)(call->scratch + s->gx);
    if (s->real > s->coef) {
        const bn_neighbour written = bn_rows_beside(p->grad_input.data ? p->grad_input.data : p->y.data, row);
        char *const at = call->scratch + s->coef;
        bn_coef_at(&w.k, s->chosen ? bn_clear_of(at, &written, 1) : at, s->coef_step, has_backward_coef(call));
    }
    if (p->layout == BN_ROWS && bn_first_pass(call->plan.op)) {
        const bn_neighbour beside[] = {
            bn_rows_beside(p->x.data, row),
            bn_rows_beside(p->grad_output.data, row),
            {w.k.mean, PAGE},
            {w.k.scale, PAGE},
            {w.k.shift, PAGE},
            {w.k.invstd, PAGE},
        };
        char *const at = call->scratch + s->rooms + (size_t)me->member * s->room_step;
        /* statistics go by neither grad_output nor coefficients */
        w.room = s->chosen ? bn_clear_of(at, beside, p->grad_output.data ? 6 : 1) : at;
    }
    index_by_channel(&w, call->plan.owned, value_bytes(call));
    results_to(call, &w);
    return w;
}
