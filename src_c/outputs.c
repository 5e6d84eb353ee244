/* outputs.c: memory of arrays that have been dropped, kept for the next ones.
 *
 * A fresh 100 MB array costs more in page faults than the kernel that fills it. From a megabyte on they begin at a huge
 * page, where Linux grants such. */
#if defined(__linux__)
#define _GNU_SOURCE
#include <sys/mman.h>
#endif
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "lock.h"
#include "outputs.h"

/* A page, so that an output lies at its input's offset or just below, as long as that is of ours or malloc's too. A bit
 * above, loads would wait for the stores before them, whose addresses look alike to the CPU in their low 12 bits. */
#define ALIGNMENT 4096
#define HEADER    64 /* bytes */
#define HUGE_PAGE ((size_t)2 << 20)
#define MAX_KEPT  64

/* What malloc gave, and how much an array may use of it. Lies right below the array's data. */
typedef struct {
    void *start;
    size_t capacity;
} header;

static void *kept[MAX_KEPT];        /* oldest first */
static size_t capacities[MAX_KEPT]; /* theirs: each header lies in memory that was not touched for long */
static int n_kept;
static size_t held, limit;

static header *header_of(void *memory) { return (header *)((char *)memory - HEADER); }

static void *allocate(size_t size) {
    if (size > SIZE_MAX / 2)
        return NULL;
    char *start = NULL, *memory;
#if defined(__linux__)
    if (size >= HUGE_PAGE / 2 && !posix_memalign((void **)&start, HUGE_PAGE, size + ALIGNMENT)) {
        (void)madvise(start, size + ALIGNMENT, MADV_HUGEPAGE); /* advice: that it is not taken does no harm */
        memory = start + ALIGNMENT;
    }
#endif
    if (!start) { /* or there is no address space for the alignment */
        start = malloc(size + HEADER + ALIGNMENT);
        if (!start)
            return NULL;
        memory = start + HEADER + ALIGNMENT - (uintptr_t)(start + HEADER) % ALIGNMENT;
    }
    header_of(memory)->start = start;
    header_of(memory)->capacity = size;
    return memory;
}

/* Takes entry i out of the kept ones. */
static void *take(int i) {
    void *memory = kept[i];
    held -= capacities[i];
    n_kept--;
    memmove(kept + i, kept + i + 1, (size_t)(n_kept - i) * sizeof *kept);
    memmove(capacities + i, capacities + i + 1, (size_t)(n_kept - i) * sizeof *capacities);
    return memory;
}

static void trim(size_t bytes, int entries) {
    while (n_kept && (held > bytes || n_kept > entries))
        free(header_of(take(0))->start);
}

static size_t give_back(void) {
    const size_t given = held;
    trim(0, 0);
    return given;
}

static void *get(size_t size) {
    int best = -1;
    size_t best_capacity = size + size / 8; /* more would be wasted */
    for (int i = 0; i < n_kept; i++) {
        if (capacities[i] >= size && capacities[i] <= best_capacity) {
            best = i;
            best_capacity = capacities[i];
        }
    }
    if (best >= 0)
        return take(best);
    void *memory = allocate(size);
    if (!memory && give_back())
        memory = allocate(size);
    return memory;
}

static void put(void *memory) {
    const size_t capacity = header_of(memory)->capacity;
    if (capacity > limit) {
        free(header_of(memory)->start);
        return;
    }
    trim(limit - capacity, MAX_KEPT - 1);
    kept[n_kept] = memory;
    capacities[n_kept++] = capacity;
    held += capacity;
}

void *bn_output_malloc(void *unused, size_t size) {
    (void)unused;
    bn_lock_outputs();
    void *memory = get(size);
    bn_unlock_outputs();
    return memory;
}

void *bn_output_calloc(void *unused, size_t count, size_t size) {
    if (size && count > SIZE_MAX / size)
        return NULL;
    void *memory = bn_output_malloc(unused, count * size);
    return memory ? memset(memory, 0, count * size) : NULL;
}

void bn_output_free(void *unused, void *memory, size_t size) {
    (void)unused, (void)size;
    bn_lock_outputs();
    if (memory)
        put(memory);
    bn_unlock_outputs();
}

void *bn_output_realloc(void *unused, void *memory, size_t size) {
    void *moved = bn_output_malloc(unused, size);
    if (moved && memory) {
        const size_t capacity = header_of(memory)->capacity;
        memcpy(moved, memory, capacity < size ? capacity : size);
        bn_output_free(unused, memory, 0);
    }
    return moved;
}

size_t bn_output_give_back(void) {
    bn_lock_outputs();
    const size_t given = give_back();
    bn_unlock_outputs();
    return given;
}

void bn_output_set_limit(size_t bytes) {
    bn_lock_outputs();
    limit = bytes;
    trim(limit, MAX_KEPT);
    bn_unlock_outputs();
}

size_t bn_output_limit(void) { return limit; }

size_t bn_output_held(void) { return held; }
