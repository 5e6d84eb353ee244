# How a call is cut into items, in which order passes go over them, and from which sizes on: a part of _kernels.pyx.

cdef Py_ssize_t SERIAL = 65536  # elements below which waking other threads costs more than it brings
cdef Py_ssize_t SERIAL_SUMS = 4096  # tiles times columns up to which one thread pools them: the same reason
# of x: so much at a time goes through all passes, beyond the cache (0: the best) and, of a single sample, within it
cdef Py_ssize_t GROUP_BYTES = 0, SAMPLE_GROUP_BYTES = L2_BYTES // 4
cdef Py_ssize_t BLOCK = 16384  # elements that a reversed pass takes at a time


cdef struct Plan  # a forward declaration: its work is called with it

ctypedef void (*Work)(Plan *plan) noexcept nogil
ctypedef void (*Item)(const Plan *plan, Py_ssize_t i) noexcept nogil


cdef struct Plan:
    const bn_kernels *K
    bn_problem p
    bn_coef k
    const float *weight
    const float *bias
    double eps
    double *mean
    double *var
    bint update, skip_nonfinite  # the running averages, by the rest of these
    bn_running running_mean, running_var
    double momentum, unbiasing
    double *g
    double *gx
    float *grad_weight
    float *grad_bias
    double *dz      # those of a GradSums: given, for a part of the batch as large as this, or to be found
    double *dz_dev
    double part
    void *scratch  # what tiles and coefficients are in; to be freed
    double *tile_a  # what stats or sums wrote, a slab for each group or a row for each tile
    double *tile_b
    bint frozen, need_stats, sums_only
    Py_ssize_t T        # tiles of each channel
    Py_ssize_t width    # columns: C, or C * fold in rows
    Py_ssize_t first    # channels before this one have an owner, later ones are split
    Py_ssize_t group    # channels that go through all passes together
    Py_ssize_t unit     # channels whose planes are whole lines together
    Py_ssize_t items, panels, pieces
    int threads         # that were asked for: they decide how the work is cut
    int team, member    # that there are, and which of them goes by this plan
    Work work           # what each of them does
    long long waited    # nanoseconds at barriers
    long long *worked   # and those of the caller that it did not wait: apart, for others read this plan meanwhile


cdef void as_member(void *arg, int member, int team) noexcept nogil:
    """The work by a plan of this member's own."""
    cdef Plan *plan = <Plan *> arg
    cdef Plan own = plan[0]
    cdef long long start
    own.member = member
    own.team = team
    own.p.room += member * BN_ROOM
    if member:
        own.work(&own)
    else:
        start = bn_now()
        own.work(&own)
        own.worked[0] = bn_now() - start - own.waited


cdef void run(Plan *plan, Work work) noexcept:
    """All of the work, in one parallel region: a barrier costs less than a second region. Little work is not worth
    letting go of the GIL, and has no smaller team, because GNU OpenMP would end the threads that are left out."""
    global AT_WORK, MOST_AT_WORK
    cdef Py_ssize_t elements = plan.p.N * plan.p.C * plan.p.S
    cdef long long start = 0, wall = 0, worked = 0
    cdef bint fresh = True
    plan.member = 0
    plan.team = 1
    if plan.threads == 1 and elements < SERIAL:
        work(plan)
        free(plan.scratch)
        return
    plan.work = work
    plan.worked = &worked
    fastbn_lock()
    AT_WORK += plan.threads
    MOST_AT_WORK = max(MOST_AT_WORK, AT_WORK)
    fastbn_unlock()
    with nogil:
        if plan.threads == 1:
            work(plan)
        else:
            start = bn_now()
            fresh = bn_in_team(plan.threads, as_member, plan)
            wall = bn_now() - start
        free(plan.scratch)
    fastbn_lock()
    AT_WORK -= plan.threads
    if plan.threads > 1 and plan.threads == DEFAULT_THREADS and not fresh:
        bn_backoff_judge(elements, plan.threads, worked, wall, start + wall)
    fastbn_unlock()


cdef void for_each_item(const Plan *plan, Item item) noexcept nogil:
    """This member's share of the items: the first members may have one more."""
    cdef Py_ssize_t i
    for i in range((plan.items * plan.member + plan.team - 1) // plan.team,
                   (plan.items * (plan.member + 1) + plan.team - 1) // plan.team):
        item(plan, i)


cdef inline void wait_for_all(Plan *plan) noexcept nogil:
    cdef long long start
    if plan.team > 1:
        start = bn_now()
        bn_barrier()
        plan.waited += bn_now() - start


cdef inline Py_ssize_t share(Py_ssize_t total, Py_ssize_t i, Py_ssize_t n, Py_ssize_t unit) noexcept nogil:
    """Where part i of n begins, at a multiple of unit."""
    return total if i == n else (total // n * i + total % n * i // n) // unit * unit


cdef void backwards(const Plan *plan, Py_ssize_t e0, Py_ssize_t e1, bint backward) noexcept nogil:
    """Elementwise work from the end: what the pass before read last is still in cache."""
    cdef Py_ssize_t e = e1
    while e > e0:
        e = max(e0, (e - 1) // BLOCK * BLOCK)
        if backward:
            plan.K.backward[plan.p.layout](&plan.p, &plan.k, e, e1, -BLOCK)
        else:
            plan.K.forward[plan.p.layout](&plan.p, &plan.k, e, e1, -BLOCK)
        e1 = e


# one owner for a group of channels: all passes back to back, while the data is in its cache

cdef enum:
    GAP = 256  # elements: more than a core prefetches beyond what it writes, which would take it from its neighbour
    LINE = 16  # elements: a cache line, and how many coefficients are repeated behind the last
    PAGE = 1024  # elements: hardware prefetches to the end of one


cdef inline Py_ssize_t gaps(const Plan *plan) noexcept nogil:
    """Between the sums and coefficients of threads that own channels."""
    return min(plan.threads, plan.p.C) - 1 if plan.p.layout == BN_PLANES else 0


cdef inline void move_coef(bn_coef *k, Py_ssize_t distance) noexcept nogil:
    cdef Py_ssize_t j
    cdef float **arrays = <float **> k
    for j in range(<Py_ssize_t> (sizeof(bn_coef) // sizeof(float *))):
        if arrays[j] != NULL:
            arrays[j] += distance


cdef void repeat_coef(const bn_coef *k, Py_ssize_t n, Py_ssize_t C) noexcept nogil:
    """The first n behind all C, where columns go on in the next row."""
    cdef Py_ssize_t j
    cdef float **arrays = <float **> k
    for j in range(<Py_ssize_t> (sizeof(bn_coef) // sizeof(float *))):
        if arrays[j] != NULL:
            memcpy(arrays[j] + C, arrays[j], n * sizeof(float))


cdef inline void move_away(Plan *plan, Py_ssize_t n_gaps) noexcept nogil:
    """Sums and coefficients are those of another thread from now on."""
    cdef Py_ssize_t distance = n_gaps * GAP
    plan.tile_a += distance
    plan.tile_b += distance
    plan.g += distance
    plan.gx += distance
    move_coef(&plan.k, distance)


cdef inline Plan of_owner(const Plan *plan, Py_ssize_t i) noexcept nogil:
    """The plan as the owner of item i goes by it."""
    cdef Plan own = plan[0]
    move_away(&own, i * (gaps(plan) + 1) // plan.items)
    return own


cdef inline void coefficients(const Plan *plan, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    plan.K.coef(&plan.p, c0, c1, plan.mean, plan.var, plan.weight, plan.bias, plan.eps, &plan.k)


cdef inline bint second_is_due(const Plan *plan) noexcept nogil:
    return not (plan.frozen or plan.sums_only) and (not plan.need_stats or plan.p.y.data != NULL)


cdef inline void finish_stats(const Plan *plan, Py_ssize_t c0, Py_ssize_t c1, const double *a, const double *b,
                              Py_ssize_t ld) noexcept nogil:
    """From the tiles' statistics of channels [c0, c1) to all that needs them."""
    plan.K.pool_stats(&plan.p, c0, c1, a, b, ld, plan.mean, plan.var)
    if plan.p.y.data != NULL:
        coefficients(plan, c0, c1)
    cdef const double *finite = plan.var if plan.skip_nonfinite else NULL
    if plan.update:
        plan.K.move_running(&plan.running_mean, plan.mean, finite, c0, c1, plan.momentum, 1.0)
        plan.K.move_running(&plan.running_var, plan.var, finite, c0, c1, plan.momentum, plan.unbiasing)


cdef inline void finish_sums(const Plan *plan, Py_ssize_t c0, Py_ssize_t c1, double *a, double *b,
                             Py_ssize_t ld) noexcept nogil:
    """From the tiles' sums of channels [c0, c1) to their gradients and to the coefficients of the second pass."""
    plan.K.pool_sums(&plan.p, &plan.k, c0, c1, a, b, ld, plan.g, plan.gx, plan.grad_weight, plan.grad_bias)
    cdef Py_ssize_t c
    if plan.dz != NULL:
        for c in range(c0, c1):
            plan.dz[c] = plan.g[c]
            plan.dz_dev[c] = plan.gx[c] / plan.k.invstd[c] if plan.k.invstd[c] != 0.0 else 0.0
    if second_is_due(plan):
        plan.K.backward_coef(&plan.p, c0, c1, plan.g, plan.gx, &plan.k)


cdef inline void first_pass(const Plan *plan, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t beside) noexcept nogil:
    """Of channels [c0, c1) all that the second pass needs; in one loop with the second pass of as many channels from
    `beside` on, unless that is negative."""
    cdef double *a = plan.tile_a + c0 * plan.T
    cdef double *b = plan.tile_b + c0 * plan.T
    if plan.need_stats:
        if beside < 0:
            plan.K.stats[plan.p.layout](&plan.p, 0, plan.T, c0, c1, a, b, c1 - c0)
        else:
            plan.K.forward_and_stats(&plan.p, &plan.k, beside, c0, c1 - c0, a, b)
        finish_stats(plan, c0, c1, a, b, c1 - c0)
    else:
        coefficients(plan, c0, c1)
        if beside < 0:
            plan.K.sums[plan.p.layout](&plan.p, &plan.k, plan.frozen, 0, plan.T, c0, c1, a, b, c1 - c0)
        else:
            plan.K.backward_and_sums(&plan.p, &plan.k, beside, c0, c1 - c0, a, b)
        finish_sums(plan, c0, c1, a, b, c1 - c0)


cdef inline void second_pass(const Plan *plan, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    cdef Py_ssize_t n, e0, e1, ahead = (c1 - c0) * plan.p.x.inner
    for n in range(plan.p.N - 1, -1, -1):
        e0 = (n * plan.p.C + c0) * plan.p.S
        e1 = (n * plan.p.C + c1) * plan.p.S
        if plan.need_stats:
            plan.K.forward[BN_PLANES](&plan.p, &plan.k, e0, e1, ahead)
        else:
            plan.K.backward[BN_PLANES](&plan.p, &plan.k, e0, e1, ahead)


cdef void first_pass_group(const Plan *plan, Py_ssize_t i) noexcept nogil:
    first_pass(plan, share(plan.width, i, plan.items, 16), share(plan.width, i + 1, plan.items, 16), -1)


cdef void second_pass_columns(const Plan *plan, Py_ssize_t e0, Py_ssize_t rows, Py_ssize_t columns,
                              Py_ssize_t c0) noexcept nogil:
    """Of packed rows, so many columns of so many, from element e0 on and with the coefficients from c0 on."""
    cdef Plan own = plan[0]
    cdef bn_operand *all[OPERANDS]
    cdef Py_ssize_t i
    operands_of(&own.p, all)
    for i in range(OPERANDS):
        if all[i].data != NULL:
            all[i].data += e0
    move_coef(&own.k, c0)
    own.p.packed = False
    own.p.S = rows
    own.p.C = columns
    if plan.need_stats:
        plan.K.forward[BN_ROWS](&own.p, &own.k, 0, rows * columns, 0)
    else:
        plan.K.backward[BN_ROWS](&own.p, &own.k, 0, rows * columns, 0)


cdef inline Py_ssize_t first_page(const Plan *plan) noexcept nogil:
    """The element of the outputs that begins a page."""
    cdef const float *out = plan.p.y.data if plan.need_stats else plan.p.grad_input.data
    return -(<Py_ssize_t> out // <Py_ssize_t> sizeof(float)) & (PAGE - 1)


cdef inline bint pages_have_owners(const Plan *plan) noexcept nogil:
    """Whether rows that are one tile are whole pages for each thread. The last one's coefficients go on behind those
    of all channels, where nobody else may write: the owner of the first LINE does."""
    return (plan.p.layout == BN_ROWS and plan.p.packed and not plan.p.stream and second_is_due(plan)
            and plan.threads > 1 and plan.width > 0 and plan.width % (plan.threads * PAGE) == 0
            and not 0 < first_page(plan) < LINE)


cdef void both_passes_pages(const Plan *plan, Py_ssize_t i) noexcept nogil:
    """Of rows of whole pages, columns whose outputs are whole pages: hardware prefetches to the end of a page, and so
    nothing that another thread is to write. The last thread's go on in the next row."""
    cdef Py_ssize_t page = first_page(plan)
    cdef Py_ssize_t c0 = page + share(plan.width, i, plan.items, PAGE)
    cdef Py_ssize_t c1 = page + share(plan.width, i + 1, plan.items, PAGE)
    cdef Py_ssize_t rows = plan.p.S, over = c1 - plan.width
    if over <= 0:
        first_pass(plan, c0, c1, -1)
        second_pass_columns(plan, c0, rows, c1 - c0, c0)
        return
    first_pass(plan, c0, plan.width, -1)
    first_pass(plan, 0, over, -1)
    repeat_coef(&plan.k, over, plan.width)
    second_pass_columns(plan, 0, 1, over, plan.width)
    second_pass_columns(plan, c0, rows - 1, c1 - c0, c0)
    second_pass_columns(plan, (rows - 1) * plan.width + c0, 1, plan.width - c0, c0)


cdef void both_passes_group(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t c0 = share(plan.first, i, plan.items, plan.unit)
    cdef Py_ssize_t c1 = share(plan.first, i + 1, plan.items, plan.unit)
    cdef Plan own = of_owner(plan, i)
    first_pass(&own, c0, c1, -1)
    if second_is_due(&own):
        second_pass(&own, c0, c1)


cdef void interleaved_groups(const Plan *plan, Py_ssize_t i) noexcept nogil:
    """The second pass of each group of channels in one loop with the first pass of the next."""
    cdef Py_ssize_t c0 = share(plan.first, i, plan.items, 1), end = share(plan.first, i + 1, plan.items, 1), c1, c2
    cdef Plan own = of_owner(plan, i)
    c1 = min(c0 + plan.group, end)
    first_pass(&own, c0, c1, -1)
    while c0 < end:
        c2 = min(c1 + plan.group, end)
        if c1 < c2:
            first_pass(&own, c1, c2, c0)
        if c2 - c1 < c1 - c0:
            second_pass(&own, c0 + c2 - c1, c1)
        c0 = c1
        c1 = c2


# no owner: tiles are shared out, then channels, then elements

cdef inline void tile_range(const Plan *plan, Py_ssize_t i, Py_ssize_t *r) noexcept nogil:
    """Item i's tiles [r0, r1) and columns [r2, r3)."""
    cdef Py_ssize_t strips = plan.items // plan.panels, columns = plan.width - plan.first
    r[0] = share(plan.T, i // plan.panels, strips, 1)
    r[1] = share(plan.T, i // plan.panels + 1, strips, 1)
    r[2] = plan.first + share(columns, i % plan.panels, plan.panels, 16)
    r[3] = plan.first + share(columns, i % plan.panels + 1, plan.panels, 16)


cdef void coefficients_of_channels(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t C = plan.p.C - plan.first
    coefficients(plan, plan.first + share(C, i, plan.items, 16), plan.first + share(C, i + 1, plan.items, 16))


cdef void stats_tiles(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t r[4]
    tile_range(plan, i, r)
    cdef Py_ssize_t at = plan.first * plan.T + r[0] * (plan.width - plan.first) + r[2] - plan.first
    plan.K.stats[plan.p.layout](&plan.p, r[0], r[1], r[2], r[3], plan.tile_a + at, plan.tile_b + at,
                                plan.width - plan.first)


cdef void sums_tiles(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t r[4]
    tile_range(plan, i, r)
    cdef Py_ssize_t at = plan.first * plan.T + r[0] * (plan.width - plan.first) + r[2] - plan.first
    plan.K.sums[plan.p.layout](&plan.p, &plan.k, plan.frozen, r[0], r[1], r[2], r[3], plan.tile_a + at,
                               plan.tile_b + at, plan.width - plan.first)


cdef void pool_channels(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t C = plan.p.C - plan.first, ld = plan.width - plan.first
    cdef Py_ssize_t c0 = share(C, i, plan.items, 16), c1 = share(C, i + 1, plan.items, 16)
    cdef Py_ssize_t at = plan.first * plan.T + c0
    if c0 == c1:
        return
    if plan.need_stats:
        finish_stats(plan, plan.first + c0, plan.first + c1, plan.tile_a + at, plan.tile_b + at, ld)
    else:
        finish_sums(plan, plan.first + c0, plan.first + c1, plan.tile_a + at, plan.tile_b + at, ld)


cdef inline void element_range(const Plan *plan, Py_ssize_t i, Py_ssize_t *e) noexcept nogil:
    """Item i's elements: all of them are shared out, or (behind owned channels) those of one n."""
    cdef Py_ssize_t n, base, length
    if plan.first == 0:
        n = plan.p.N * plan.p.C * plan.p.S
        e[0] = share(n, i, plan.items, 16)
        e[1] = share(n, i + 1, plan.items, 16)
        return
    n = i // plan.pieces
    base = (n * plan.p.C + plan.first) * plan.p.S
    length = (plan.p.C - plan.first) * plan.p.S
    e[0] = base + share(length, i % plan.pieces, plan.pieces, 16)
    e[1] = base + share(length, i % plan.pieces + 1, plan.pieces, 16)


cdef void forward_elements(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t e[2]
    element_range(plan, i, e)
    if plan.need_stats:
        backwards(plan, e[0], e[1], False)
    else:
        plan.K.forward[plan.p.layout](&plan.p, &plan.k, e[0], e[1], 0)


cdef void backward_elements(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t e[2]
    element_range(plan, i, e)
    backwards(plan, e[0], e[1], True)


cdef void plan_tiles(Plan *plan) noexcept nogil:
    """Tiles to threads; where one would have an eighth more to do than most, columns too, but whole rows go faster."""
    cdef Py_ssize_t n = plan.T, most = (plan.width - plan.first + 63) // 64, threads = plan.threads
    plan.panels = 1
    while (n + threads - 1) // threads * threads * 8 > n * 9 and plan.panels < most:
        plan.panels += 1
        n += plan.T
    plan.items = n if plan.panels > 1 else min(n, threads)


cdef void plan_channels(Plan *plan, Py_ssize_t work) noexcept nogil:
    """Channels without an owner to threads, or all of them to one if that is little work."""
    plan.items = 1 if work <= SERIAL_SUMS else min(plan.threads, (plan.p.C - plan.first + 15) // 16)


cdef void plan_elements(Plan *plan) noexcept nogil:
    plan.items = plan.threads
    if plan.first:
        plan.pieces = (4 * plan.threads + plan.p.N - 1) // plan.p.N
        plan.items = plan.pieces * plan.p.N


cdef void elementwise(Plan *plan) noexcept nogil:
    plan_elements(plan)
    for_each_item(plan, forward_elements if plan.p.grad_input.data == NULL else backward_elements)


cdef bint SLICED = LLC_BYTES > 64 << 20  # the last-level cache of a server, shared with others


cdef inline Py_ssize_t cache_bytes(int threads) noexcept nogil:
    """Of the last-level caches that the threads are spread over; in a sliced one hardly more than all threads' L2 was
    found again."""
    if SLICED:
        return threads * L2_BYTES
    return LLC_BYTES * ((threads + LLC_CPUS - 1) // LLC_CPUS)


cdef inline Py_ssize_t channels_of_group(const Plan *plan, bint interleaved) noexcept nogil:
    """Beyond the cache, so many channels go through all passes together: as many as half of L2 holds, but also so many
    that memory is read in long runs, although then only the last-level cache holds them."""
    cdef Py_ssize_t read = 1 if plan.need_stats else 2, plane = plan.p.S * 4, channel = plane * plan.p.N
    cdef Py_ssize_t groups = 2 if interleaved else 1, cache = cache_bytes(plan.threads) // plan.threads
    cdef Py_ssize_t held = max(L2_BYTES // 2 // read, 1 << 19), run = 12 << 10, most = cache // 4
    if GROUP_BYTES:
        return max(1, GROUP_BYTES // groups // channel)
    if interleaved:  # of whose tensors two groups are held at a time
        run = 48 << 10
        most = cache // 10
    return max(1, held // groups // channel, min((run // read + plane - 1) // plane, most // read // channel))


cdef void owned_channels(Plan *plan) noexcept nogil:
    cdef bint interleaved = plan.p.stream and plan.p.S > BN_SHORT_PLANE and second_is_due(plan)
    plan.items = plan.threads
    plan.group = plan.p.C
    plan.unit = 1
    if plan.p.stream:
        plan.group = channels_of_group(plan, interleaved)
        while plan.unit * plan.p.S % LINE and 2 * plan.unit <= plan.group:
            plan.unit *= 2
        plan.group = (plan.group + plan.unit - 1) // plan.unit * plan.unit
    elif plan.p.N == 1:
        plan.group = max(1, SAMPLE_GROUP_BYTES // (plan.p.S * 4))
    if interleaved:
        for_each_item(plan, interleaved_groups)
        return
    if plan.group < plan.p.C:
        plan.items = (plan.first + plan.group - 1) // plan.group
        plan.items = (plan.items + plan.threads - 1) // plan.threads * plan.threads
    plan.items = min(plan.first, plan.items)
    for_each_item(plan, both_passes_group)


cdef void shared_channels(Plan *plan) noexcept nogil:
    move_away(plan, gaps(plan))  # from those of owners, who may still be at work
    plan_tiles(plan)
    if plan.T == 1 and plan.width == plan.p.C and plan.first == 0:
        if pages_have_owners(plan):
            plan.items = plan.threads
            for_each_item(plan, both_passes_pages)
            return
        for_each_item(plan, first_pass_group)
    else:
        if not plan.need_stats:
            plan_channels(plan, plan.p.C - plan.first)
            for_each_item(plan, coefficients_of_channels)
            wait_for_all(plan)
            plan_tiles(plan)
        for_each_item(plan, stats_tiles if plan.need_stats else sums_tiles)
        wait_for_all(plan)
        plan_channels(plan, plan.T * plan.width)
        for_each_item(plan, pool_channels)
    if second_is_due(plan):
        wait_for_all(plan)
        elementwise(plan)


cdef void two_passes(Plan *plan) noexcept nogil:
    """Sums of some kind for each channel, then elementwise work that needs them."""
    plan.first = 0
    if plan.p.layout == BN_PLANES:
        # channels that do not divide among the threads have no owner, unless the odd ones hardly matter
        plan.first = plan.p.C // plan.threads * plan.threads
        if plan.p.C >= 16 * plan.threads or (plan.p.C - plan.first) * plan.p.N * plan.p.S < SERIAL:
            plan.first = plan.p.C
    if plan.first:
        owned_channels(plan)
    if plan.first < plan.p.C:
        shared_channels(plan)


cdef void coefficients_of_sums(const Plan *plan, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t c, c0 = share(plan.p.C, i, plan.items, 16), c1 = share(plan.p.C, i + 1, plan.items, 16)
    coefficients(plan, c0, c1)
    for c in range(c0, c1):
        plan.g[c] = plan.dz[c] * plan.part
        plan.gx[c] = plan.dz_dev[c] * plan.k.invstd[c] * plan.part
    plan.K.backward_coef(&plan.p, c0, c1, plan.g, plan.gx, &plan.k)


cdef void second_pass_alone(Plan *plan) noexcept nogil:
    """Elementwise work of the backward pass, from sums that are given."""
    plan.first = 0
    plan_channels(plan, plan.p.C)
    for_each_item(plan, coefficients_of_sums)
    wait_for_all(plan)
    elementwise(plan)


cdef Py_ssize_t STREAM_BYTES = 0  # not 0: in place of what the caches suggest, for tests


cdef int past_cache(const bn_problem *p, int threads) noexcept:
    """Whether to write past the cache: when the tensors together exceed what holds them better than memory does; 2 when
    those that are read exceed what is found there again from one pass or call to the next.

    That is six eighths of the cache, and all of it; for one thread alone, which waits for memory longer, half in both
    cases. In place of a sliced cache all threads' L2 counts, to write past it less a 64th for each thread, of which no
    more than 16 were measured.
    """
    cdef Py_ssize_t most = STREAM_BYTES, most_read = STREAM_BYTES
    cdef Py_ssize_t bytes_of_tensor = p.N * p.C * p.S * 4
    cdef int read = (p.x.data != NULL) + (p.residual.data != NULL) + (p.grad_output.data != NULL)
    cdef int written = (p.y.data != NULL) + (p.grad_input.data != NULL) + (p.grad_residual.data != NULL)
    if most == 0:
        most = most_read = cache_bytes(threads)
        if SLICED:
            most -= most // 64 * min(threads, 16)
        else:
            most_read = most // 2 if threads == 1 else most
            most = most_read if threads == 1 else most // 8 * 6
    return (bytes_of_tensor > most // (read + written)) + (bytes_of_tensor > most_read // read)


def tune(Py_ssize_t stream_bytes=-1, Py_ssize_t serial=-1, Py_ssize_t group_bytes=-1):
    """Move the sizes from which outputs are streamed and work is shared out, and that of groups of channels beyond the
    cache (0: the best), so that tests reach all paths."""
    global STREAM_BYTES, SERIAL, GROUP_BYTES
    if stream_bytes >= 0:
        STREAM_BYTES = stream_bytes
    if serial >= 0:
        SERIAL = serial
    if group_bytes >= 0:
        GROUP_BYTES = group_bytes
