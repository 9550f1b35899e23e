/* Consensus TA: the weighted sum where enough models have a use for it.
 * Scalars: how many must, lambda. Vectors: the weights, and the factors of TALL masks. */
#ifndef OUTLIERMERGE_CONSENSUS_H
#define OUTLIERMERGE_CONSENSUS_H

#include "method.h"

static void add_scaled(const float *restrict row, float weight, int is_first, float *restrict sums,
                       size_t num) {
    for (size_t i = 0; i < num; i++)
        sums[i] = is_first ? row[i] * weight : sums[i] + row[i] * weight;
}

static void add_uses(const float *restrict row, const float *restrict sums, float factor,
                     int is_first, float *restrict uses, size_t num) {
    for (size_t i = 0; i < num; i++) {
        float use = fabsf(row[i]) > fabsf(sums[i] - row[i]) * factor ? 1.0f : 0.0f;
        uses[i] = is_first ? use : uses[i] + use;
    }
}

static void merge_consensus(const Block *block, const Call *call, size_t start, size_t num,
                            float *out) {
    const size_t models = block->num_models;
    const float *weights = call->vectors, *factors = weights + models;
    float *restrict uses = out + ROW;
    for (size_t model = 0; model < models; model++)
        add_scaled(load_model(block, model, start, num), weights[model], model == 0, out, num);
    for (size_t model = 0; model < models; model++)
        add_uses(block->rows + model * ROW, out, factors[model], model == 0, uses, num);
    for (size_t i = 0; i < num; i++)
        out[i] = out[i] * (uses[i] >= call->scalars[0] ? 1.0f : 0.0f) * call->scalars[1];
}

static const Method consensus = {"consensus", 2, 2, merge_consensus};

#endif
