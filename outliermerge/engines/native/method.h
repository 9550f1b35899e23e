/* What a merge method is: it turns rows of a block into a row of the output, as the torch function
 * of its name defines it.
 *
 * A step of a block is worked on model by model; between models it stays in the first cache.
 * Numbers are float32, as in torch, and sums over models go in the models' order.
 *
 * To add one: a header like weighted_sum.h, and its name in methods.h. */
#ifndef OUTLIERMERGE_METHOD_H
#define OUTLIERMERGE_METHOD_H

#include "block.h"

/* What a method is called with, for the whole tensor. */
typedef struct {
    const float *scalars;
    const float *vectors; /* (K, M) */
    uint64_t *counts;     /* (M,), added to */
    uint64_t place;       /* of the step's first element in the tensor */
    const uint64_t *keys; /* of random numbers, (M, 2) */
} Call;

typedef struct {
    const char *name;
    size_t num_scalars, num_vectors;
    /* Write a step's merged task vectors, or weights, to out; rows 1 and 2 behind it are free. */
    void (*merge)(const Block *, const Call *, size_t start, size_t num, float *out);
} Method;

#endif
