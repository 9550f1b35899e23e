/* The weighted sum of the models. Vector 0: the weights. */
#ifndef OUTLIERMERGE_WEIGHTED_SUM_H
#define OUTLIERMERGE_WEIGHTED_SUM_H

#include "method.h"

/* out (+)= weight * delta */
static void add_weighted(char code, const void *from, const float *restrict base, float weight,
                         int is_first, float *restrict out, size_t num) {
    if (is_first)
        FOR_DTYPE(code, for (size_t i = 0; i < num; i++) {
            out[i] = (load(CODE, from, i) - base[i]) * weight;
        });
    else
        FOR_DTYPE(code, for (size_t i = 0; i < num; i++) {
            out[i] += (load(CODE, from, i) - base[i]) * weight;
        });
}

static void merge_weighted_sum(const Block *block, const Call *call, size_t start, size_t num,
                               float *out) {
    for (size_t model = 0; model < block->num_models; model++) {
        size_t source = source_of(block, model);
        add_weighted(block->places[source].code, at(block, source, start), block->base,
                     call->vectors[model], model == 0, out, num);
    }
}

static const Method weighted_sum = {"weighted_sum", 0, 1, merge_weighted_sum};

#endif
