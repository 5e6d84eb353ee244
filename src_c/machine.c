/* machine.c: this machine's caches, as Linux tells them, and some machines by name. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "machine.h"

#define KB ((ptrdiff_t)1 << 10)
#define MB ((ptrdiff_t)1 << 20)

/* A64 has only a hint, on pairs, which is not worth it; and simd/portable.h has none. */
#if !defined(FASTBN_PORTABLE) && (defined(__x86_64__) || defined(_M_X64))
#define STREAMS 1
#else
#define STREAMS 0
#endif

/* From which size on a last-level cache is one of slices, in which hardly more than all threads' L2 was found again;
 * but 96 MB of a single die are stacked on it and as good as 32. */
#define SLICED_FROM (64 * MB)
#define STACKED     (96 * MB)

static const struct {
    const char *name;
    bn_machine machine;
} known[] = {
    {"zen5", {.l2 = 1 * MB, .llc = 32 * MB, .llc_cpus = 16, .streams = 1, .lanes = 16, .held = 8, .overlaps = 1}},
    {"zen3", {.l2 = 512 * KB, .llc = 32 * MB, .llc_cpus = 16, .streams = 1, .lanes = 8, .overlaps = 1}},
    {"zen4-3d", {.l2 = 1 * MB, .llc = 96 * MB, .llc_cpus = 16, .streams = 1, .lanes = 16, .held = 8, .overlaps = 1}},
    {"sapphire-rapids",
     {.l2 = 2 * MB, .llc = 105 * MB, .llc_cpus = 112, .streams = 1, .lanes = 16, .held = 8, .overlaps = 1}},
    {"granite-rapids",
     {.l2 = 2 * MB, .llc = 300 * MB, .llc_cpus = 144, .streams = 1, .lanes = 16, .held = 8, .overlaps = 1}},
    {"laptop", {.l2 = 1280 * KB, .llc = 12 * MB, .llc_cpus = 8, .streams = 1, .lanes = 8, .overlaps = 1}},
    {"atom", {.l2 = 2 * MB, .llc = 2 * MB, .llc_cpus = 4, .streams = 1, .lanes = 4}},
    {"graviton3", {.l2 = 1 * MB, .llc = 32 * MB, .llc_cpus = 64, .lanes = 4}},
    {"pi4", {.l2 = 1 * MB, .llc = 1 * MB, .llc_cpus = 4, .lanes = 4}},
    {"pi5", {.l2 = 512 * KB, .llc = 2 * MB, .llc_cpus = 4, .lanes = 4}},
};
enum { KNOWN = sizeof known / sizeof *known };

static int first_line(const char *format, int index, const char *fact, char *line, int size) {
    char path[128];
    snprintf(path, sizeof path, format, index, fact);
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    const int found = fgets(line, size, file) != NULL;
    fclose(file);
    return found;
}

/* CPUs in a list such as 0-3,8-11. */
static int cpus_in(const char *list) {
    int n = 0;
    while (*list >= '0' && *list <= '9') {
        char *end;
        const long from = strtol(list, &end, 10);
        const long to = *end == '-' ? strtol(end + 1, &end, 10) : from;
        n += (int)(to - from + 1);
        list = *end == ',' ? end + 1 : end;
    }
    return n;
}

bn_machine bn_this_machine(void) {
    bn_machine m = {.l2 = 1 * MB, .llc = 8 * MB, .llc_cpus = 1, .streams = STREAMS};
    int last = 0;
    for (int i = 1; i < 8; i++) {
        const char *format = "/sys/devices/system/cpu/cpu0/cache/index%d/%s";
        char level[16], type[32], size[32], shared[4096];
        if (!first_line(format, i, "level", level, sizeof level) || !first_line(format, i, "type", type, sizeof type) ||
            !first_line(format, i, "size", size, sizeof size) ||
            !first_line(format, i, "shared_cpu_list", shared, sizeof shared))
            break;
        if (strncmp(type, "Unified", 7) != 0)
            continue;
        const ptrdiff_t bytes = strtol(size, NULL, 10) * (strchr(size, 'M') ? MB : KB);
        if (atoi(level) == 2)
            m.l2 = bytes;
        if (atoi(level) > last && bytes > 0) { /* one without L3 has an L2 that is the last level */
            last = atoi(level);
            m.llc = bytes;
            m.llc_cpus = cpus_in(shared) > 0 ? cpus_in(shared) : 1;
        }
    }
    m.class = bn_class_of(&m);
    return m;
}

int bn_named_machine(const char *name, bn_machine *m) {
    for (int i = 0; i < KNOWN; i++)
        if (strcmp(known[i].name, name) == 0) {
            *m = known[i].machine;
            m->class = bn_class_of(m);
            return 1;
        }
    return 0;
}

const char *bn_machine_name(int i) { return i < KNOWN ? known[i].name : NULL; }

int bn_class_of(const bn_machine *m) {
    if (!m->streams)
        return BN_BOARD;
    const int stacked = m->llc == STACKED && m->llc_cpus <= 16;
    return m->llc > SLICED_FROM && !stacked ? BN_SLICED : BN_CORES;
}

const char *bn_class_name(int class) {
#define NAME(code, name)                                                                                               \
    case BN_##code: return name;
    switch (class) { BN_CLASSES(NAME) }
#undef NAME
    return "unknown";
}
