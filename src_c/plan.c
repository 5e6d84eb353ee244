/* plan.c: a plan from a problem, an operation, a machine and its thresholds. Pure: no memory, no threads, no state. */
#include <stdint.h>

#include "plan.h"
#include "tiles.h"

int bn_first_pass(enum bn_operation op) {
#define FIRST(code, name, first, second) BN_##first,
    static const signed char of[] = {BN_OPERATIONS(FIRST)};
#undef FIRST
    return of[op];
}

int bn_second_pass(enum bn_operation op) {
#define SECOND(code, name, first, second) BN_##second,
    static const signed char of[] = {BN_OPERATIONS(SECOND)};
#undef SECOND
    return of[op];
}

const char *bn_operation_name(enum bn_operation op) {
#define NAME(code, name, first, second) name,
    static const char *const of[] = {BN_OPERATIONS(NAME)};
#undef NAME
    return of[op];
}

ptrdiff_t bn_fold(ptrdiff_t C) { return rows_folded(C); }

int bn_plan_threads(ptrdiff_t elements, int threads, const bn_tuning *t) { return elements < t->serial ? 1 : threads; }

/* Elements of a cache line, and those that a vector takes. */
static ptrdiff_t line_of(const bn_problem *p) { return 64 / bn_element_bytes(p->element); }
static int lanes_of(const bn_problem *p, const bn_machine *m) { return m->lanes * 4 / (int)bn_real_bytes(p->element); }

/* ---- where data is */

/* Bytes of the last-level caches that the threads are spread over. */
static ptrdiff_t cache_bytes(const bn_machine *m, const bn_tuning *t, int threads) {
    if (t->own_l2)
        return threads * m->l2;
    return m->llc * ((threads + m->llc_cpus - 1) / m->llc_cpus);
}

/* Whether outputs are written past the cache, as all tensors together exceed what holds them better than memory does;
 * and whether those that are read exceed what is found there again from one pass or call to the next. */
static void place_data(bn_plan *plan, const bn_problem *p, const bn_machine *m, const bn_tuning *t) {
    const ptrdiff_t bytes = p->N * p->C * p->S * bn_element_bytes(p->element);
    const int read = (p->x.data != NULL) + (p->residual.data != NULL) + (p->grad_output.data != NULL);
    const int written = (p->y.data != NULL) + (p->grad_input.data != NULL) + (p->grad_residual.data != NULL);
    ptrdiff_t most_written = t->cache, most_read = t->cache;
    if (!t->cache) {
        const ptrdiff_t cache = cache_bytes(m, t, plan->threads);
        const int less = t->less_64ths * (plan->threads < 16 ? plan->threads : 16);
        const int writes = plan->threads == 1 ? t->alone_64ths : t->write_64ths - less;
        const int reads = plan->threads == 1 ? t->alone_64ths : t->read_64ths;
        most_written = cache / 64 * writes;
        most_read = cache / 64 * reads;
    }
    const int exceeds = bytes > most_written / (read + written);
    plan->from_memory = exceeds && bytes > most_read / (read > 0 ? read : 1);
    plan->apply.store = exceeds && m->streams ? BN_STREAMED : BN_CACHED;
    plan->why_store = !exceeds      ? "all tensors together fit the cache"
                      : !m->streams ? "this machine has no stores that pass it by"
                                    : "all tensors together exceed the cache";
}

/* ---- rows */

/* How many rows go at a time. A coefficient or a sum in memory costs more than the value it is applied to, so several
 * rows share it; but the hardware prefetches one row after the other best. Two at a time are nearer to memory's order.
 */
static void plan_rows(bn_plan *plan, const bn_problem *p, const bn_machine *m, const bn_tuning *t) {
    const ptrdiff_t K = plan->width, line = line_of(p), bytes = bn_element_bytes(p->element);
    const int lanes = lanes_of(p, m);
    const int backward = bn_second_pass(plan->op) == BN_PASS_BACKWARD;
    const int far = p->packed && p->N * p->S * p->C >= t->far, whole = K <= BN_PANEL && !plan->by_columns;
    const int operands = (backward ? 3 : 2) + (p->residual.data != NULL), wide_vectors = m->lanes == BN_LINE;
    const int memory = p->packed && plan->from_memory;
    const int several = p->packed && (!plan->from_memory || K >= t->wide);

    plan->sums.rows = 1;
    if (bn_first_pass(plan->op) == BN_PASS_STATS) {
        plan->sums.ahead = !memory ? 0 : whole ? t->stats_ahead / bytes : K;
        /* sums of one row at a time hold narrower vectors up more than memory does; and those of halves, which memory
         * brings twice as many of */
        if (bytes == 2 ? p->packed : several && !(wide_vectors && memory)) {
            plan->sums.rows = far && whole && wide_vectors && 2 * K <= 2 * t->wide ? 4 : 8;
            plan->sums.ahead = far && whole ? plan->sums.rows * K : 0;
        }
    } else if (several) {
        plan->sums.rows = 4;
        plan->sums.ahead = far && whole ? 4 * K : 0;
    }

    plan->apply.rows = 1;
    plan->why_rows = "memory's order is fastest";
    const int whole_lines = p->packed && K % line == 0;
    if (plan->apply.store == BN_STREAMED && !whole_lines)
        plan->apply.store = BN_CACHED; /* lines are shared; memory's order is what is left */
    else if (plan->apply.store == BN_STREAMED) {
        /* rows this wide have coefficients that crowd L1; those of the backward pass cost more than order, too, where
         * what is read comes from the cache */
        plan->apply.rows = K >= t->wide || (backward && !plan->from_memory) ? 4 : 1;
        if (2 * lanes < line) /* more than two stores a line would not be combined */
            plan->apply.rows = 1;
        plan->why_rows =
            plan->apply.rows == 4 ? "coefficients cost more than memory's order gains" : "memory's order is fastest";
    } else if (p->pitch && !plan->from_memory) {
        plan->apply.rows = far && wide_vectors && K * operands <= 2 * t->wide ? 2 : 4;
        plan->apply.ahead = far ? plan->apply.rows * K : 0;
        plan->page_rows = !far && K * bn_element_bytes(p->element) % 4096 == 0;
        plan->why_rows = "coefficients cost more than what they are applied to";
    }
    /* activations that are looked up want the registers themselves */
    const int few = p->element != BN_f32 && (p->activation || p->residual.data || p->grad_residual.data);
    const int looked_up = few || p->activation > (backward ? BN_RELU : BN_RELU6) || (backward && p->fixed);
    const int vectors = looked_up ? 0 : backward ? m->held / 2 : m->held;
    if (whole_lines && vectors && vectors * lanes % p->C == 0)
        plan->apply.period = vectors;
    else if (whole_lines && vectors && vectors * 3 / 4 * lanes % p->C == 0)
        plan->apply.period = vectors * 3 / 4;
    if (plan->apply.period)
        plan->why_rows = "registers hold the coefficients of all channels";
}

/* ---- planes */

static void plan_planes(bn_plan *plan, const bn_problem *p, const bn_machine *m, const bn_tuning *t) {
    const int is_short = p->S <= BN_SHORT_PLANE, past = plan->apply.store == BN_STREAMED || plan->from_memory;
    plan->sums.by_batch = is_short && past;
    plan->sums.ahead = past ? p->x.inner : 0;
    plan->overlap = plan->apply;
    plan->overlap.ahead = m->lanes == BN_LINE ? t->overlap_ahead / bn_element_bytes(p->element) : 0;
    plan->why_rows = is_short ? "short planes: vectors go across them" : "each plane has its coefficients in registers";
}

/* So many channels go through all passes together: as many as half of L2 holds, but also so many that memory is read in
 * long runs, although then only the last-level cache holds them. */
static ptrdiff_t channels_of_group(const bn_plan *plan, const bn_problem *p, const bn_machine *m, const bn_tuning *t) {
    const int read = bn_first_pass(plan->op) == BN_PASS_STATS ? 1 : 2;
    const int overlapped = plan->way == BN_OVERLAPPED, groups = overlapped ? 2 : 1;
    const ptrdiff_t plane = p->S * bn_element_bytes(p->element), channel = plane * p->N;
    const ptrdiff_t cache = cache_bytes(m, t, plan->threads) / plan->threads;
    const ptrdiff_t held = max_z(m->l2 / 2 / read, t->held);
    const ptrdiff_t run = overlapped ? t->overlap_run : t->run;
    const ptrdiff_t most = cache / (overlapped ? t->overlap_of_cache : t->group_of_cache);
    if (t->group)
        return max_z(1, t->group / groups / channel);
    const ptrdiff_t long_enough = (run / read + plane - 1) / plane;
    return max_z(1, max_z(held / groups / channel, min_z(long_enough, most / read / channel)));
}

static void plan_owners(bn_plan *plan, const bn_problem *p, const bn_machine *m, const bn_tuning *t) {
    const int past = plan->apply.store == BN_STREAMED || plan->from_memory;
    plan->way = past && p->S > BN_SHORT_PLANE && bn_second_pass(plan->op) && m->streams && m->overlaps && !p->mask
                    ? BN_OVERLAPPED
                    : BN_OWNED;
    plan->group = p->C;
    plan->unit = 1;
    if (past) {
        plan->group = channels_of_group(plan, p, m, t);
        while (plan->unit * p->S % line_of(p) && 2 * plan->unit <= plan->group)
            plan->unit *= 2;
        plan->group = (plan->group + plan->unit - 1) / plan->unit * plan->unit;
    } else if (p->N == 1)
        plan->group = max_z(1, m->l2 / t->sample_of_l2 / (p->S * bn_element_bytes(p->element)));
    plan->owner_items = plan->threads;
    if (plan->way == BN_OWNED && plan->group < p->C) {
        plan->owner_items = (plan->owned + plan->group - 1) / plan->group;
        plan->owner_items = (plan->owner_items + plan->threads - 1) / plan->threads * plan->threads;
    }
    plan->owner_items = min_z(plan->owned, plan->owner_items);
    plan->apply.ahead = plan->group * p->x.inner;
    plan->why_way = plan->way == BN_OVERLAPPED ? "from memory: reading and writing go on at once"
                                               : "a channel is read once from beyond its owner's cache";
}

/* ---- what has no owner */

/* Tiles to threads; where one would have an eighth more to do than most, columns too, but whole rows go faster. */
static bn_shares share_tiles(const bn_plan *plan, const bn_problem *p) {
    /* folded rows with a mask are summed by channel, not by column */
    const ptrdiff_t most = p->mask && p->fold > 1 ? 1 : (plan->width - plan->owned + 63) / 64;
    const ptrdiff_t threads = plan->threads;
    ptrdiff_t n = plan->T;
    bn_shares s = {0, 1};
    while ((n + threads - 1) / threads * threads * 8 > n * 9 && s.panels < most) {
        s.panels++;
        n += plan->T;
    }
    s.items = s.panels > 1 ? n : min_z(n, threads);
    return s;
}

/* Channels to threads, or all of them to one if that is little work. */
static bn_shares share_channels(const bn_plan *plan, const bn_problem *p, ptrdiff_t work, const bn_tuning *t) {
    const ptrdiff_t blocks = (p->C - plan->owned + 15) / 16;
    const bn_shares s = {work <= t->serial_pool ? 1 : min_z(plan->threads, blocks), 1};
    return s;
}

static bn_shares share_elements(const bn_plan *plan, const bn_problem *p) {
    bn_shares s = {plan->threads, 1};
    if (plan->owned) {
        s.panels = (4 * plan->threads + p->N - 1) / p->N;
        s.items = s.panels * p->N;
    }
    return s;
}

/* ---- memory */

static uint64_t lines(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

/* The parts of a call's memory, one behind the other, each from a cache line on. What different threads write lies a
 * few lines apart: a core prefetches beyond what it writes, and would take it from its neighbour. What a 32-bit CPU
 * cannot address is asked for nevertheless, and not granted. */
static void place_scratch(bn_plan *plan, const bn_problem *p, const bn_tuning *t) {
    const uint64_t apart = 1024, page = 4096, number = sizeof(double);
    const uint64_t value = (uint64_t)bn_real_bytes(p->element);
    const uint64_t arrays = bn_second_pass(plan->op) == BN_PASS_BACKWARD || bn_first_pass(plan->op) == BN_PASS_SUMS
                                ? BN_COEF_BACKWARD
                                : BN_COEF_FORWARD;
    const uint64_t shared = (uint64_t)(p->C - plan->owned);
    const uint64_t tiled = (uint64_t)plan->T * (uint64_t)(plan->width - plan->owned);
    bn_scratch *s = &plan->scratch;
    uint64_t at = 0;
    s->chosen = p->layout == BN_ROWS && p->packed && p->N * p->S * p->C >= t->few;
    s->rooms = at;
    s->room_step = BN_ROOM * value + page; /* and where it may begin */
    if (p->layout == BN_ROWS && bn_first_pass(plan->op))
        at += (uint64_t)plan->threads * s->room_step;
    if (plan->owned) {
        s->owner_channels = min_z(plan->owned, plan->owned / plan->owner_items + plan->unit);
        const uint64_t most = (uint64_t)s->owner_channels;
        s->owner_step = lines(2 * ((uint64_t)plan->T + 1) * most * number) + arrays * lines(most * value) + apart;
        s->owners = at;
        at += (uint64_t)plan->threads * s->owner_step;
    }
    s->tile_a = at;
    s->tile_b = at += lines(tiled * number);
    s->g = at += lines(tiled * number);
    s->gx = at += lines(shared * number);
    s->coef = at += lines(shared * number);
    /* as many columns as there are, BN_LINE that follow, and a line from one array to the next; from a place in a page
     */
    s->coef_step = lines(((uint64_t)(plan->width - plan->owned) + BN_LINE) * value);
    if (shared && (bn_second_pass(plan->op) || bn_first_pass(plan->op) == BN_PASS_SUMS))
        at += arrays * s->coef_step + page;
    s->real = (size_t)at;
    if (p->mask)
        at += lines((uint64_t)plan->T * sizeof(int));
    s->bytes = at < SIZE_MAX - 63 ? (size_t)at : SIZE_MAX - 63; /* to which callers add 63 */
}

void bn_make_plan(bn_plan *plan, const bn_problem *p, enum bn_operation op, const bn_machine *m, const bn_tuning *t,
                  int threads) {
    const bn_plan empty = {.op = op, .threads = threads, .class = m->class, .block = t->block, .why_rows = ""};
    *plan = empty;
    plan->T = bn_first_pass(op) ? number_of_tiles(p) : 0;
    plan->width = p->C * p->fold;
    place_data(plan, p, m, t);
    plan->way = bn_first_pass(op) ? BN_TILED : BN_ELEMENTWISE;
    plan->why_way = bn_first_pass(op) ? "channels do not divide among the threads" : "one pass over the elements";
    const int one_tile = bn_first_pass(op) && plan->T == 1 && plan->width == p->C;
    if (p->layout == BN_ROWS) {
        plan->by_columns = one_tile;
        if (bn_first_pass(op))
            plan->why_way = one_tile ? "rows of one tile: columns have owners" : "rows: all channels lie in each";
        plan_rows(plan, p, m, t);
    } else {
        plan_planes(plan, p, m, t);
        if (bn_first_pass(op)) {
            /* channels that do not divide among the threads have no owner, unless the odd ones hardly matter */
            plan->owned = p->C / threads * threads;
            if (p->C >= 16 * threads || (p->C - plan->owned) * p->N * p->S < t->serial)
                plan->owned = p->C;
            if (plan->owned)
                plan_owners(plan, p, m, t);
        }
        plan->by_columns = one_tile && !plan->owned;
    }
    plan->elements = share_elements(plan, p);
    if (op == BN_INFERENCE) /* which has its coefficients, and wants to be quick about small calls */
        return;
    plan->reversed = bn_first_pass(op) && bn_second_pass(op);
    plan->tiles = share_tiles(plan, p);
    plan->coef = share_channels(plan, p, p->C - plan->owned, t);
    plan->pool = share_channels(plan, p, plan->T * plan->width, t);
    place_scratch(plan, p, t);
}
