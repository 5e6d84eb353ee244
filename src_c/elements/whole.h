/* whole.h: elements that are what lanes compute in. */
INLINE vf xload(const elem *p) { return vload(p); }
INLINE vf xload_tail(const elem *p, vt t) { return vload_tail(p, t); }
INLINE void xstore(elem *p, vf a) { vstore(p, a); }
INLINE void xstore_tail(elem *p, vf a, vt t) { vstore_tail(p, a, t); }
INLINE void xstream(elem *p, vf a) { vstream(p, a); }
INLINE real widen(elem a) { return a; }
