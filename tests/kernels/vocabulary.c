/* vocabulary.c: the words of simd.h one by one, for one element (FASTBN_ELEMENT_FILE), on values from a file.
 *
 *   vocabulary VALUES RESULTS
 *
 * VALUES are three arrays of COUNT elements. Results are such arrays, each word's after the other's, and the same
 * however many lanes there are.
 */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef FASTBN_ELEMENT_FILE
#define FASTBN_ELEMENT_FILE "elements/f32.h"
#endif
#include FASTBN_ELEMENT_FILE

#define COUNT (1 << 16)
#define TREE  16 /* values whose sum is a tree */

static elem in[3][COUNT], out[COUNT];
static unsigned char mask[COUNT];
static FILE *results;

static void write_out(void) {
    if (fwrite(out, sizeof(elem), COUNT, results) != COUNT)
        abort();
}

#define WORD(expression)                                                                                               \
    for (int i = 0; i < COUNT; i += VL) {                                                                              \
        const vf a = xload(in[0] + i), b = xload(in[1] + i), c = xload(in[2] + i);                                     \
        (void)a, (void)b, (void)c;                                                                                     \
        xstore(out + i, expression);                                                                                   \
    }                                                                                                                  \
    write_out()

/* On the first n of every TREE values. */
#define WORD_OF_TAIL(statement)                                                                                        \
    for (int n = 0; n <= TREE; n++) {                                                                                  \
        memset(out, 0x5a, sizeof out);                                                                                 \
        for (int i = 0; i < COUNT; i += VL) {                                                                          \
            const vt t = vtail(n - i % TREE);                                                                          \
            statement;                                                                                                 \
        }                                                                                                              \
        write_out();                                                                                                   \
    }

static void sums(void) {
    for (int i = 0; i + TREE * VL <= COUNT; i += TREE * VL) {
        vf s[VL];
        for (int j = 0; j < VL; j++) {
            vf v[TREE];
            for (int k = 0; k < TREE / VL; k++)
                v[k] = xload(in[0] + i + TREE * j + VL * k);
            for (int half = TREE / VL / 2; half; half /= 2)
                for (int k = 0; k < half; k++)
                    v[k] = vadd(v[k], v[k + half]);
            s[j] = v[0];
        }
        xstore(out + i / TREE, vsums(s));
    }
}

int main(int argc, char **argv) {
    FILE *values = argc == 3 ? fopen(argv[1], "rb") : NULL;
    results = argc == 3 ? fopen(argv[2], "wb") : NULL;
    if (!values || !results || fread(in, sizeof(elem), 3 * COUNT, values) != 3 * COUNT)
        return 1;
    for (int i = 0; i < COUNT; i++)
        mask[i] = widen(in[2][i]) > 0 ? 1 + i % 255 : 0;
    const vf low = vset1(-87), high = vset1(87);
    WORD(a);
    for (int i = 0; i < COUNT; i++)
        xstore_tail(out + i, vset1(widen(in[0][i])), vtail(1));
    write_out();
    WORD(vadd(a, b));
    WORD(vsub(a, b));
    WORD(vmul(a, b));
    WORD(vdiv(a, b));
    WORD(vfma(a, b, c));
    WORD(vfnma(a, b, c));
    WORD(vmax(a, b));
    WORD(vmin(a, b));
    WORD(vselect(vle(a, b), b, c));
    WORD(vselect(vor(vle(a, b), vle(b, c)), a, c));
    WORD(vexp_minus(vmin(vmax(a, low), high))); /* NaN gives anything */
    WORD(vselect(vmask(mask + i), a, b));
    WORD(vhold(a));
    WORD_OF_TAIL(xstore_tail(out + i, xload_tail(in[0] + i, t), t));
    WORD_OF_TAIL(xstore(out + i, xload_tail(in[0] + i, t)));
    WORD_OF_TAIL(xstore(out + i, vjoin(xload(in[0] + i), xload(in[1] + i), t)));
    WORD_OF_TAIL(xstore(out + i, vkeep(xload(in[0] + i), t)));
    memset(out, 0, sizeof out);
    sums();
    write_out();
    return fclose(results) != 0;
}
