/* machine.h: what a machine is, as far as plans depend on it. */
#ifndef FASTBN_MACHINE_H
#define FASTBN_MACHINE_H

#include <stddef.h>

/* Classes of machines that want different thresholds: X(code, name). tuning.h has a row for each. */
#define BN_CLASSES(X)                                                                                                  \
    X(CORES, "cores")   /* a last-level cache that a few cores share, such as those of one die */                      \
    X(SLICED, "sliced") /* one that all cores of a server share, each with a slice of its own */                       \
    X(BOARD, "board")   /* no stores that pass the caches by: AArch64 */

#define BN_CODE(code, name) BN_##code,
enum { BN_CLASSES(BN_CODE) BN_N_CLASSES };
#undef BN_CODE

typedef struct {
    int class;
    ptrdiff_t l2, llc; /* bytes of a core's L2 and of one last-level cache, which are the same where there is no L3 */
    int llc_cpus;      /* that share the latter */
    int streams;       /* has stores that pass the caches by */
    int lanes, held, overlaps; /* of the instruction set, in float32: see bn_terms */
} bn_machine;

/* This machine, with a guess of what its system does not tell; without lanes and held. */
bn_machine bn_this_machine(void);

/* Another one by its name, for plans of machines that are not here; returns 0 if it is unknown. */
int bn_named_machine(const char *name, bn_machine *m);
const char *bn_machine_name(int i); /* NULL after the last */

/* The class of a machine of these facts. */
int bn_class_of(const bn_machine *m);
const char *bn_class_name(int class);

#endif
