/* f32.h: float32 in memory and in the lanes. */
#include "simd.h"

typedef float elem; /* what lies in memory */
typedef float real; /* what a lane computes in; coefficients and partial sums */
#define REAL_MAX FLT_MAX

INLINE vf xload(const elem *p) { return vload(p); }
INLINE vf xload_tail(const elem *p, vt t) { return vload_tail(p, t); }
INLINE void xstore(elem *p, vf a) { vstore(p, a); }
INLINE void xstore_tail(elem *p, vf a, vt t) { vstore_tail(p, a, t); }
INLINE void xstream(elem *p, vf a) { vstream(p, a); }
INLINE real widen(elem a) { return a; }
