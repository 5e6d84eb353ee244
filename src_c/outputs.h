/* outputs.h: memory of arrays that have been dropped, kept for the next ones. */
#ifndef FASTBN_OUTPUTS_H
#define FASTBN_OUTPUTS_H

#include <stddef.h>

/* The functions of an allocator of NumPy's (NEP 49). What is freed is kept, the oldest going first when the kept ones
 * exceed the limit, and is handed out again where it fits without much waste. All of it goes back before an allocation
 * fails. */
void *bn_output_malloc(void *unused, size_t size);
void *bn_output_calloc(void *unused, size_t count, size_t size);
void *bn_output_realloc(void *unused, void *memory, size_t size);
void bn_output_free(void *unused, void *memory, size_t size);

/* Gives back all that is kept; returns how many bytes. */
size_t bn_output_give_back(void);
/* Bytes to keep at most; what is more is given back at once. */
void bn_output_set_limit(size_t bytes);
size_t bn_output_limit(void);
/* Bytes kept now. */
size_t bn_output_held(void);

#endif
