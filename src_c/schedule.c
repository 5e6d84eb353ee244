/* schedule.c: what each thread of a call does, in which order, and where it waits for the others.
 *
 * Which of them does what never changes a result: tiles, and the order in which they are pooled, depend on shape and
 * memory layout alone. */
#include <stdint.h>
#include <string.h>

#include "tiles.h"
#include "workplace.h"

static const bn_terms *terms(const bn_call *call) { return call->K->terms[call->p.element]; }
static const bn_loops *loops(const bn_call *call) {
    return call->K->loops[call->p.element][call->p.layout + (call->p.mask ? BN_MASKED : 0)];
}

typedef void (*item)(const bn_call *call, const bn_workplace *at, ptrdiff_t i);

static ptrdiff_t first_of(ptrdiff_t items, int i, int n) { return (items * i + n - 1) / n; }

/* This member's share of the items: the first members may have one more. */
static void for_each(const bn_call *call, const bn_member *me, const bn_workplace *at, ptrdiff_t items, item work) {
    for (ptrdiff_t i = first_of(items, me->member, me->team); i < first_of(items, me->member + 1, me->team); i++)
        work(call, at, i);
}

static void wait_for_all(const bn_member *me) {
    if (me->team > 1)
        me->wait(me->arg);
}

/* Where share i of n begins, at a multiple of unit. */
static ptrdiff_t share(ptrdiff_t total, ptrdiff_t i, ptrdiff_t n, ptrdiff_t unit) {
    return i == n ? total : part(total, i, n) / unit * unit;
}

/* ---- the passes over some channels */

static void make_coef(const bn_call *call, const bn_workplace *at, ptrdiff_t c0, ptrdiff_t c1) {
    bn_source from = call->source;
    if (bn_first_pass(call->plan.op) == BN_PASS_STATS) {
        from.mean = at->mean;
        from.var = at->var;
    }
    terms(call)->coef(&call->p, c0, c1, &from, &at->k);
}

/* From the tiles of channels [c0, c1) to all that needs them. */
static void finish_first_pass(const bn_call *call, const bn_workplace *at, const bn_tiles *tiles, ptrdiff_t c0,
                              ptrdiff_t c1) {
    if (bn_first_pass(call->plan.op) == BN_PASS_STATS) {
        terms(call)->pool_stats[call->p.mask != NULL](&call->p, tiles, c0, c1, at->mean, at->var);
        if (bn_second_pass(call->plan.op))
            make_coef(call, at, c0, c1);
        const double *finite = call->skip_nonfinite ? at->var : NULL;
        if (call->update) {
            terms(call)->move_running(&call->running_mean, at->mean, finite, c0, c1, call->momentum, 1.0);
            terms(call)->move_running(&call->running_var, at->var, finite, c0, c1, call->momentum, call->unbiasing);
        }
        return;
    }
    terms(call)->pool_sums(&call->p, &at->k, tiles, c0, c1, at->g, at->gx);
    if (call->grad_weight)
        terms(call)->round(at->gx, c0, c1, call->grad_weight);
    if (call->grad_bias)
        terms(call)->round(at->g, c0, c1, call->grad_bias);
    if (call->dz) {
        memcpy(call->dz + c0, at->g + c0, (size_t)(c1 - c0) * sizeof(double));
        terms(call)->without_invstd(&at->k, c0, c1, at->gx, call->dz_dev);
    }
    if (bn_second_pass(call->plan.op) && !call->p.fixed)
        terms(call)->backward_coef(&call->p, c0, c1, at->g, at->gx, call->count, &at->k);
}

/* Of channels [c0, c1) all that the second pass needs; in one loop with the second pass of as many channels from `done`
 * on, unless that is negative. */
static void first_pass(const bn_call *call, const bn_workplace *at, ptrdiff_t c0, ptrdiff_t c1, ptrdiff_t done) {
    const bn_loops *K = loops(call);
    const bn_problem *p = &call->p;
    const bn_plan *plan = &call->plan;
    const ptrdiff_t from = plan->by_columns ? c0 : 0; /* of the tiles' memory */
    const bn_tiles tiles = {0, plan->T, c0, c1, c1 - c0, at->tile_a + from, at->tile_b + from, at->room};
    if (bn_first_pass(plan->op) == BN_PASS_STATS) {
        if (done < 0)
            K->stats(p, &plan->sums, &tiles);
        else
            K->forward_and_stats(p, &at->k, &plan->overlap, done, &tiles);
    } else {
        make_coef(call, at, c0, c1);
        if (done < 0)
            K->sums(p, &at->k, &plan->sums, &tiles);
        else
            K->backward_and_sums(p, &at->k, &plan->overlap, done, &tiles);
    }
    finish_first_pass(call, at, &tiles, c0, c1);
}

static void apply(const bn_call *call, const bn_coef *k, const bn_pass *how, ptrdiff_t e0, ptrdiff_t e1) {
    if (bn_second_pass(call->plan.op) == BN_PASS_FORWARD)
        loops(call)->forward(&call->p, k, how, e0, e1);
    else
        loops(call)->backward(&call->p, k, how, e0, e1);
}

/* ---- channels with an owner */

static void second_pass(const bn_call *call, const bn_workplace *at, ptrdiff_t c0, ptrdiff_t c1) {
    const bn_problem *p = &call->p;
    for (ptrdiff_t n = p->N - 1; n >= 0; n--)
        apply(call, &at->k, &call->plan.apply, (n * p->C + c0) * p->S, (n * p->C + c1) * p->S);
}

static void owned_group(const bn_call *call, const bn_workplace *own, ptrdiff_t i) {
    const bn_plan *plan = &call->plan;
    const ptrdiff_t c0 = share(plan->owned, i, plan->owner_items, plan->unit);
    const ptrdiff_t c1 = share(plan->owned, i + 1, plan->owner_items, plan->unit);
    const bn_workplace at = bn_for_channels_from(call, own, c0);
    if (c0 == c1)
        return;
    first_pass(call, &at, c0, c1, -1);
    if (bn_second_pass(plan->op))
        second_pass(call, &at, c0, c1);
}

/* The second pass of each group of channels in one loop with the first pass of the next. */
static void overlapped_groups(const bn_call *call, const bn_workplace *own, ptrdiff_t i) {
    const bn_plan *plan = &call->plan;
    const ptrdiff_t end = share(plan->owned, i + 1, plan->owner_items, 1);
    ptrdiff_t c0 = share(plan->owned, i, plan->owner_items, 1), c1 = min_z(c0 + plan->group, end);
    const bn_workplace at = bn_for_channels_from(call, own, c0);
    first_pass(call, &at, c0, c1, -1);
    while (c0 < end) {
        const ptrdiff_t c2 = min_z(c1 + plan->group, end);
        if (c1 < c2)
            first_pass(call, &at, c1, c2, c0);
        if (c2 - c1 < c1 - c0)
            second_pass(call, &at, c0 + c2 - c1, c1);
        c0 = c1;
        c1 = c2;
    }
}

/* ---- channels without one: tiles are shared out, then channels, then elements */

static void columns_of_one_tile(const bn_call *call, const bn_workplace *at, ptrdiff_t i) {
    const ptrdiff_t c0 = share(call->plan.width, i, call->plan.tiles.items, 16);
    const ptrdiff_t c1 = share(call->plan.width, i + 1, call->plan.tiles.items, 16);
    if (c0 < c1)
        first_pass(call, at, c0, c1, -1);
}

static void coef_of_channels(const bn_call *call, const bn_workplace *at, ptrdiff_t i) {
    const ptrdiff_t first = call->plan.owned, C = call->p.C - first, items = call->plan.coef.items;
    const ptrdiff_t c0 = first + share(C, i, items, 16), c1 = first + share(C, i + 1, items, 16);
    make_coef(call, at, c0, c1);
    if (bn_first_pass(call->plan.op) || call->p.fixed)
        return;
    memcpy(at->g + c0, call->dz + c0, (size_t)(c1 - c0) * sizeof(double)); /* of sums that are given */
    terms(call)->with_invstd(&at->k, c0, c1, call->dz_dev, at->gx);
    terms(call)->backward_coef(&call->p, c0, c1, at->g, at->gx, call->count, &at->k);
}

static void some_tiles(const bn_call *call, const bn_workplace *at, ptrdiff_t i) {
    const bn_plan *plan = &call->plan;
    const ptrdiff_t panels = plan->tiles.panels, strips = plan->tiles.items / panels, ld = plan->width - plan->owned;
    const ptrdiff_t t0 = share(plan->T, i / panels, strips, 1), t1 = share(plan->T, i / panels + 1, strips, 1);
    const ptrdiff_t c0 = share(ld, i % panels, panels, 16), c1 = share(ld, i % panels + 1, panels, 16);
    const ptrdiff_t begin = t0 * ld + c0;
    const bn_tiles tiles = {t0,      t1, plan->owned + c0, plan->owned + c1, ld, at->tile_a + begin, at->tile_b + begin,
                            at->room};
    if (bn_first_pass(plan->op) == BN_PASS_STATS)
        loops(call)->stats(&call->p, &plan->sums, &tiles);
    else
        loops(call)->sums(&call->p, &at->k, &plan->sums, &tiles);
}

static void pool_channels(const bn_call *call, const bn_workplace *at, ptrdiff_t i) {
    const bn_plan *plan = &call->plan;
    const ptrdiff_t first = plan->owned, C = call->p.C - first;
    const ptrdiff_t c0 = first + share(C, i, plan->pool.items, 16), c1 = first + share(C, i + 1, plan->pool.items, 16);
    const bn_tiles all = {0, plan->T, first, plan->width, plan->width - first, at->tile_a, at->tile_b, NULL};
    if (c0 < c1)
        finish_first_pass(call, at, &all, c0, c1);
}

/* How far `out` is above `in` in the low 12 bits of their addresses, less one. */
static uintptr_t above(const void *out, const void *in) { return ((uintptr_t)out - (uintptr_t)in - 1) & 4095; }

/* Whether rows of whole pages are better gone through from their end, because the output is nearer above an input than
 * below one: there a load would wait for what was stored to the column before, whose address looks alike to the CPU,
 * and for long, because rows at such distances fall into the same sets of L1. */
static int from_end(const bn_problem *p) {
    const void *out = p->y.data ? p->y.data : p->grad_input.data;
    const void *inputs[] = {p->x.data, p->grad_output.data, p->residual.data};
    uintptr_t up = 4096, down = 4096;
    for (int i = 0; i < 3; i++)
        if (inputs[i]) {
            up = above(out, inputs[i]) < up ? above(out, inputs[i]) : up;
            down = above(inputs[i], out) < down ? above(inputs[i], out) : down;
        }
    return up < down;
}

/* All elements are shared out, or (behind owned channels) those of one sample. */
static void some_elements(const bn_call *call, const bn_workplace *at, ptrdiff_t i) {
    const bn_plan *plan = &call->plan;
    const bn_problem *p = &call->p;
    const ptrdiff_t pieces = plan->owned ? plan->elements.panels : plan->elements.items;
    const ptrdiff_t length = plan->owned ? (p->C - plan->owned) * p->S : p->N * p->C * p->S;
    const ptrdiff_t base = plan->owned ? (i / pieces * p->C + plan->owned) * p->S : 0;
    const ptrdiff_t e0 = base + share(length, i % pieces, pieces, 16);
    ptrdiff_t e1 = base + share(length, i % pieces + 1, pieces, 16);
    bn_pass how = plan->apply;
    how.from_end = plan->page_rows && from_end(p);
    if (!plan->reversed) {
        apply(call, &at->k, &how, e0, e1);
        return;
    }
    if (p->layout == BN_PLANES)
        how.ahead = -plan->block;
    for (ptrdiff_t e = e1; e > e0; e1 = e) {
        e = max_z(e0, (e - 1) / plan->block * plan->block);
        apply(call, &at->k, &how, e, e1);
    }
}

static void tiled_channels(const bn_call *call, const bn_member *me) {
    const bn_plan *plan = &call->plan;
    const bn_workplace at = bn_shared_place(call, me);
    if (plan->by_columns)
        for_each(call, me, &at, plan->tiles.items, columns_of_one_tile);
    else {
        if (bn_first_pass(plan->op) == BN_PASS_SUMS) {
            for_each(call, me, &at, plan->coef.items, coef_of_channels);
            wait_for_all(me);
        }
        for_each(call, me, &at, plan->tiles.items, some_tiles);
        wait_for_all(me);
        for_each(call, me, &at, plan->pool.items, pool_channels);
    }
    if (bn_second_pass(plan->op)) {
        wait_for_all(me);
        for_each(call, me, &at, plan->elements.items, some_elements);
    }
}

void bn_do_share(const bn_call *call, const bn_member *me) {
    const bn_plan *plan = &call->plan;
    if (plan->way == BN_ELEMENTWISE) {
        const bn_workplace at = bn_shared_place(call, me);
        if (plan->op == BN_GRAD_INPUT) {
            for_each(call, me, &at, plan->coef.items, coef_of_channels);
            wait_for_all(me);
        }
        for_each(call, me, &at, plan->elements.items, some_elements);
        return;
    }
    if (plan->owned) {
        const bn_workplace own = bn_own_place(call, me);
        for_each(call, me, &own, plan->owner_items, plan->way == BN_OVERLAPPED ? overlapped_groups : owned_group);
    }
    if (plan->owned < call->p.C)
        tiled_channels(call, me);
}
