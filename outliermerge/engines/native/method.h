/* The contract of a merge method: it computes a row of the output from the rows of a block, with
 * the same result as the torch function of the same name.
 *
 * A method works on a step of a block model by model; the sums stay in the L1 cache in between.
 * Arithmetic is in float32, as in torch, and sums over models are in the models' order.
 *
 * To add a method, write a header like weighted_sum.h, and add its name to methods.h. */
#ifndef OUTLIERMERGE_METHOD_H
#define OUTLIERMERGE_METHOD_H

#include "drawn.h"

/* The arguments of a method; they are the same for the whole tensor. */
typedef struct {
    const float *scalars;
    const float *vectors; /* (K, M) */
    uint64_t *counts;     /* (M,), added to */
    uint64_t place;       /* of the step's first element in the tensor */
    const uint64_t *keys; /* of random numbers, (M, 2) */
    Rows *rows;           /* for a method that prepares pieces; else NULL */
    Kept kept;            /* of a method that keeps by rank, where that is known */
} Call;

typedef struct {
    const char *name;
    size_t num_scalars, num_vectors;
    /* Write a step's merged task vector, or weights, to out. The two rows that follow out are free
     * for intermediate values. */
    void (*merge)(const Block *, const Call *, size_t start, size_t num, float *out);
    /* Look at a piece and the rows that it cuts before its steps are merged, or NULL. Returns 0 if
     * a source cannot be read. */
    int (*prepare)(Block *, Call *, size_t piece, size_t num);
} Method;

/* The merge of a method whose `prepare` has merged whole rows. */
static void merge_made(const Block *block, const Call *call, size_t start, size_t num,
                       float *out) {
    memcpy(out, call->rows->values + start, num * sizeof *out);
}

#endif
