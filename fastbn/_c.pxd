# The C that there is: src_c, OpenMP by way of team.h, and NumPy's allocators. Declarations alone.

cimport numpy as cnp

cdef extern from "kernels.h" nogil:
    enum:
        BN_PLANES, BN_ROWS, BN_STREAMED, BN_LINE, BN_MAX_ISAS
        BN_COEF_FORWARD, BN_COEF_BACKWARD
        BN_f32, BN_f64, BN_f16, BN_bf16, BN_N_ELEMENTS
        BN_IDENTITY, BN_RELU, BN_RELU6, BN_LEAKY_RELU, BN_N_ACTIVATIONS

    ctypedef struct bn_operand:
        void *data
        Py_ssize_t outer, inner

    ctypedef struct bn_problem:
        int layout, element, activation, packed, fixed, from_output
        double negative_slope
        Py_ssize_t N, C, S, fold, pitch
        bn_operand x, residual, grad_output, y, grad_input, grad_residual
        const unsigned char *mask
        bint mask_output

    ctypedef struct bn_pass:
        int rows, store, from_end, by_batch, period
        Py_ssize_t ahead

    ctypedef struct bn_coef:
        void *mean
        void *scale
        void *shift

    ctypedef struct bn_running:
        char *value
        char *exact
        Py_ssize_t stride, exact_stride

    ctypedef struct bn_source:
        const double *mean
        const double *var
        const void *weight
        const void *bias
        double eps

    ctypedef struct bn_terms:
        int lanes, held, overlaps
        void (*coef)(const bn_problem *, Py_ssize_t, Py_ssize_t, const bn_source *, const bn_coef *) noexcept
        void (*running_coef)(const bn_problem *, const void *, const void *, const bn_source *,
                             const bn_coef *) noexcept
        void (*move_running)(const bn_running *, const double *, const double *, Py_ssize_t, Py_ssize_t, double,
                             double) noexcept

    ctypedef struct bn_kernels:
        const char *name
        const bn_terms *terms[4]

    int bn_supported(const bn_kernels **tables)
    Py_ssize_t bn_fold(Py_ssize_t C)
    const char *bn_activation_name(int code)
    const char *bn_element_name(int element)
    Py_ssize_t bn_element_bytes(int element)
    Py_ssize_t bn_real_bytes(int element)

cdef extern from "machine.h" nogil:
    ctypedef struct bn_machine:
        int class_ "class"
        Py_ssize_t l2, llc
        int llc_cpus, streams, lanes, held, overlaps

    bn_machine bn_this_machine()
    bint bn_named_machine(const char *name, bn_machine *m)
    const char *bn_machine_name(int i)
    int bn_class_of(const bn_machine *m)
    const char *bn_class_name(int class_)

cdef extern from "tuning.h" nogil:
    ctypedef struct bn_tuning:
        Py_ssize_t serial, cache, group

    const bn_tuning *bn_tunings

cdef extern from "plan.h" nogil:
    enum bn_operation:
        BN_INFERENCE, BN_STATS, BN_TRAINING, BN_SUMS, BN_BACKWARD, BN_GRAD_INPUT, BN_N_OPERATIONS
    enum bn_way:
        BN_ELEMENTWISE, BN_OWNED, BN_OVERLAPPED, BN_TILED

    ctypedef struct bn_shares:
        Py_ssize_t items, panels

    ctypedef struct bn_scratch:
        size_t bytes

    ctypedef struct bn_plan:
        bn_operation op
        int threads, class_ "class"
        Py_ssize_t T, width
        bint from_memory, reversed, by_columns
        Py_ssize_t block
        bn_pass sums, apply, overlap
        bn_way way
        Py_ssize_t owned, group, unit, owner_items
        bn_shares tiles, coef, pool, elements
        bn_scratch scratch
        const char *why_way
        const char *why_store
        const char *why_rows

    int bn_plan_threads(Py_ssize_t elements, int threads, const bn_tuning *t)
    void bn_make_plan(bn_plan *plan, const bn_problem *p, bn_operation op, const bn_machine *m, const bn_tuning *t,
                      int threads)
    bint bn_first_pass(bn_operation op)
    bint bn_second_pass(bn_operation op)
    const char *bn_operation_name(bn_operation op)

cdef extern from "schedule.h" nogil:
    ctypedef struct bn_call:
        const bn_kernels *K
        bn_problem p
        bn_plan plan
        bn_source source
        double *mean
        double *var
        bn_running running_mean, running_var
        bint update, skip_nonfinite
        double momentum, unbiasing
        double *dz
        double *dz_dev
        double count
        void *grad_weight
        void *grad_bias
        bn_coef k
        void *memory
        char *scratch

    ctypedef struct bn_member:
        int member, team
        void (*wait)(void *) noexcept
        void *arg

    void bn_do_share(const bn_call *call, const bn_member *me)
    void bn_coef_at(bn_coef *k, char *at, size_t step, bint backward)

    ctypedef struct bn_neighbour:
        const void *at
        size_t period

    bn_neighbour bn_rows_beside(const void *at, size_t bytes_of_row)
    char *bn_clear_of(char *memory, const bn_neighbour *beside, int n)

cdef extern from "workplace.h" nogil:
    void bn_count_mask(bn_call *call)

cdef extern from "numpy/arrayobject.h":
    int PyArray_CopyInto(cnp.ndarray to, cnp.ndarray a) except -1
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray prototype, int order, void *dtype, int subok)
    object PyDataMem_SetHandler(object handler)

    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *(*malloc)(void *, size_t) noexcept
        void *(*calloc)(void *, size_t, size_t) noexcept
        void *(*realloc)(void *, void *, size_t) noexcept
        void (*free)(void *, void *, size_t) noexcept

    ctypedef struct PyDataMem_Handler:
        char name[127]
        unsigned char version
        PyDataMemAllocator allocator

cdef extern from "outputs.h":
    void *bn_output_malloc(void *, size_t) noexcept
    void *bn_output_calloc(void *, size_t, size_t) noexcept
    void *bn_output_realloc(void *, void *, size_t) noexcept
    void bn_output_free(void *, void *, size_t) noexcept nogil
    void bn_output_set_limit(size_t)
    size_t bn_output_limit()
    size_t bn_output_held()
    size_t bn_output_give_back()

cdef extern from "lock.h":
    void bn_lock() nogil
    void bn_unlock() nogil
    int bn_lock_outputs_at_forks()

cdef extern from "team.h":
    int BN_OPENMP
    ctypedef void (*bn_work)(void *work, int member, int team) noexcept nogil
    long long bn_now() nogil
    void bn_release_pool()
    void bn_release_before_fork()
    int bn_team_held
    int bn_startable(int threads, size_t stack) nogil
    int bn_in_team(int threads, bn_work member, void *work) nogil
    void bn_barrier() nogil
    int bn_openmp_threads()
    int bn_openmp_cpus()
    const char *bn_openmp_library()

cdef extern from "backoff.h":
    ctypedef struct bn_backoff_counts:
        long long shared, alone, lost
    bint bn_backoff_alone(long long elements, long long now)
    void bn_backoff_judge(long long elements, int threads, long long own, long long wall, long long now)
    bn_backoff_counts bn_backoff_report()
    void bn_backoff_forget()
