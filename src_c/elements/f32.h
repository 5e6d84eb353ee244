/* f32.h: float32 in memory and in the lanes. */
typedef float elem; /* what lies in memory */
typedef float real; /* what a lane computes in; coefficients and partial sums */

INLINE vf xload(const elem *p) { return vload(p); }
INLINE vf xload_tail(const elem *p, vt t) { return vload_tail(p, t); }
INLINE void xstore(elem *p, vf a) { vstore(p, a); }
INLINE void xstore_tail(elem *p, vf a, vt t) { vstore_tail(p, a, t); }
INLINE void xstream(elem *p, vf a) { vstream(p, a); }
INLINE real widen(elem a) { return a; }

#if defined(__GNUC__)
INLINE const elem *vaddress(const elem *p) {
    __asm__("" : "+r"(p));
    return p;
}
#else
INLINE const elem *vaddress(const elem *p) { return p; }
#endif
