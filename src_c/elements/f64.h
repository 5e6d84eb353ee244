/* f64.h: float64 in memory and in the lanes. */
#define REAL_IS_FLOAT64
#include "simd.h"

typedef double elem;
typedef double real;
#define FEW_INSTANCES
#define REAL_MAX DBL_MAX

INLINE vf xload(const elem *p) { return vload(p); }
INLINE vf xload_tail(const elem *p, vt t) { return vload_tail(p, t); }
INLINE void xstore(elem *p, vf a) { vstore(p, a); }
INLINE void xstore_tail(elem *p, vf a, vt t) { vstore_tail(p, a, t); }
INLINE void xstream(elem *p, vf a) { vstream(p, a); }
INLINE real widen(elem a) { return a; }
