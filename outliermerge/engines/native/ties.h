/* TIES: trim, elect a sign, merge the elements that agree with it. Scalars: lambda, whether to
 * normalize. Vectors: the weights; for each model the largest magnitude that is dropped; the
 * weights times the factors that restore the L1 norm. */
#ifndef OUTLIERMERGE_TIES_H
#define OUTLIERMERGE_TIES_H

#include "method.h"

/* Trim a row in place, scale it, and add it to the votes for a sign. */
static void trim_row(float *restrict row, float *restrict votes, float largest_dropped,
                     float scaled_weight, int is_first, size_t num) {
    for (size_t i = 0; i < num; i++) {
        float kept = fabsf(row[i]) <= largest_dropped ? 0.0f : row[i];
        row[i] = kept * scaled_weight;
        votes[i] = is_first ? row[i] : votes[i] + row[i];
    }
}

/* Add the elements that agree with the elected sign (+1 where the votes sum to 0), and their
 * weights. */
static void add_agreeing(const float *restrict row, const float *restrict votes, float weight,
                         int is_first, float *restrict out, float *restrict divisor, size_t num) {
    for (size_t i = 0; i < num; i++) {
        float agreeing = votes[i] < 0 ? -row[i] : row[i];
        agreeing = agreeing <= 0 ? 0.0f : agreeing;
        float share = agreeing > 0 ? weight : 0.0f;
        out[i] = is_first ? agreeing : out[i] + agreeing;
        divisor[i] = is_first ? share : divisor[i] + share;
    }
}

static void finish_ties(float *restrict out, const float *restrict votes,
                        const float *restrict divisor, int normalize, float factor, size_t num) {
    for (size_t i = 0; i < num; i++) {
        float merged = votes[i] < 0 ? -out[i] : out[i];
        float by = normalize && divisor[i] != 0 ? divisor[i] : 1.0f;
        out[i] = merged / by * factor;
    }
}

static void merge_ties(const Block *block, const Call *call, size_t start, size_t num, float *out) {
    const size_t models = block->num_models;
    const float lambda = call->scalars[0], normalize = call->scalars[1];
    const float *weights = call->vectors, *dropped = weights + models, *scaled = dropped + models;
    float *votes = out + ROW, *divisor = out + 2 * ROW;
    for (size_t model = 0; model < models; model++) {
        float *row = load_model(block, model, start, num);
        trim_row(row, votes, dropped[model], scaled[model], model == 0, num);
    }
    for (size_t model = 0; model < models; model++)
        add_agreeing(block->rows + model * ROW, votes, weights[model], model == 0, out, divisor,
                     num);
    finish_ties(out, votes, divisor, normalize != 0, lambda, num);
}

static const Method ties = {"ties", 2, 3, merge_ties};

#endif
