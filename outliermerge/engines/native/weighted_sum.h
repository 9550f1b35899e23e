/* The weighted sum of the models. Vector 0: the weights. */
#ifndef OUTLIERMERGE_WEIGHTED_SUM_H
#define OUTLIERMERGE_WEIGHTED_SUM_H

#include "few.h"
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

INLINE void merge_few_weighted(const Block *block, const float *weights, size_t start, size_t num,
                               float *restrict out, char code, size_t models) {
    const Few few = few_of(block, start);
    const float *restrict base = block->base;
    for (size_t i = 0; i < num; i++) {
        float sum = (load(code, few.from[0], i) - base[i]) * weights[0];
        for (size_t model = 1; model < models; model++)
            sum += (load(code, few.from[model], i) - base[i]) * weights[model];
        out[i] = sum;
    }
}

static void merge_weighted_sum(const Block *block, const Call *call, size_t start, size_t num,
                               float *out) {
    RETURN_FOR_FEW(block, merge_few_weighted(block, call->vectors, start, num, out, CODE, MODELS));
    for (size_t model = 0; model < block->num_models; model++) {
        size_t source = source_of(block, model);
        add_weighted(block->places[source].code, at(block, source, start), block->base,
                     call->vectors[model], model == 0, out, num);
    }
}

static const Method weighted_sum = {"weighted_sum", 0, 1, merge_weighted_sum};

#endif
