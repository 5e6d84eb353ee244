/* halves.h: how elements of two bytes are loaded and stored, by from_halves and to_halves. */
INLINE vf xload(const elem *p) { return from_halves(vhload(p)); }
INLINE vf xload_tail(const elem *p, vt t) { return from_halves(vhload_tail(p, t)); }
INLINE void xstore(elem *p, vf a) { vhstore(p, to_halves(a)); }
INLINE void xstore_tail(elem *p, vf a, vt t) { vhstore_tail(p, to_halves(a), t); }
INLINE void xstream(elem *p, vf a) { vhstream(p, to_halves(a)); }
