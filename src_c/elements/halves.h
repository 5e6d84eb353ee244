/* halves.h: how elements of two bytes are loaded and stored, by from_halves and to_halves. */
#ifndef TAILS_OF_HALVES
INLINE vh vhload_tail(const uint16_t *p, vt t) {
    uint16_t b[VL] = {0};
    for (int i = 0; i < vcount(t); i++)
        b[i] = p[i];
    return vhload(b);
}
INLINE void vhstore_tail(uint16_t *p, vh a, vt t) {
    uint16_t b[VL];
    vhstore(b, a);
    for (int i = 0; i < vcount(t); i++)
        p[i] = b[i];
}
#endif

INLINE vf xload(const elem *p) { return from_halves(vhload(p)); }
INLINE vf xload_tail(const elem *p, vt t) { return from_halves(vhload_tail(p, t)); }
INLINE void xstore(elem *p, vf a) { vhstore(p, to_halves(a)); }
INLINE void xstore_tail(elem *p, vf a, vt t) { vhstore_tail(p, to_halves(a), t); }
INLINE void xstream(elem *p, vf a) { vhstream(p, to_halves(a)); }
