/* SCE: select what differs most between models, elect a sign, merge what agrees by weights.
 * Scalars: the least variance selected, 0 for all; the least divisor. Vector: the weights. */
#ifndef OUTLIERMERGE_SCE_H
#define OUTLIERMERGE_SCE_H

#include "ties.h"

static void add_deviations(const float *restrict row, const float *restrict means, int is_first,
                           float *restrict sums, size_t num) {
    for (size_t i = 0; i < num; i++) {
        float away = row[i] - means[i];
        sums[i] = is_first ? away * away : sums[i] + away * away;
    }
}

static void sum_rows(const Block *block, float *restrict sums, size_t num) {
    memcpy(sums, block->rows, num * sizeof *sums);
    for (size_t model = 1; model < block->num_models; model++) {
        const float *restrict row = block->rows + model * ROW;
        for (size_t i = 0; i < num; i++) sums[i] += row[i];
    }
}

/* Write the variance over the models of each element of the rows that have been loaded, one
 * operation after the other as `variance` of spread.py. */
static void find_variances(const Block *block, float *restrict means, float *restrict variances,
                           size_t num) {
    const float share = (float)(1.0 / (double)block->num_models);
    sum_rows(block, means, num);
    scale_row(means, share, num);
    for (size_t model = 0; model < block->num_models; model++)
        add_deviations(block->rows + model * ROW, means, model == 0, variances, num);
    scale_row(variances, share, num);
}

/* Infinities and NaN that are not selected become NaN, so that a run notices them. */
static void keep_selected(float *restrict row, const float *restrict variances, float least,
                          size_t num) {
    for (size_t i = 0; i < num; i++) row[i] *= variances[i] >= least ? 1.0f : 0.0f;
}

/* The variance of few values, with the operations of find_variances. */
INLINE float variance_of(const float *values, size_t models) {
    const float share = (float)(1.0 / (double)models);
    float mean = values[0], sum = 0;
    for (size_t model = 1; model < models; model++) mean += values[model];
    mean *= share;
    for (size_t model = 0; model < models; model++) {
        float away = values[model] - mean;
        sum = model ? sum + away * away : away * away;
    }
    return sum * share;
}

INLINE void load_few_varied(const Block *block, size_t start, size_t num,
                            float *restrict variances, char code, size_t models) {
    const Few few = few_of(block, start);
    const float *restrict base = block->base;
    float *restrict rows = block->rows;
    for (size_t i = 0; i < num; i++) {
        float values[3];
        for (size_t model = 0; model < models; model++)
            rows[model * ROW + i] = values[model] = load(code, few.from[model], i) - base[i];
        variances[i] = variance_of(values, models);
    }
}

/* Load the rows of all models, and find their variances. The row of means is overwritten. */
static void load_varied(const Block *block, size_t start, size_t num, float *means,
                        float *variances) {
    RETURN_FOR_FEW(block, load_few_varied(block, start, num, variances, CODE, MODELS));
    for (size_t model = 0; model < block->num_models; model++)
        load_model(block, model, start, num);
    find_variances(block, means, variances, num);
}

/* Load the rows of all models, and drop what is not selected. The two rows are overwritten. */
static void load_selected(const Block *block, size_t start, size_t num, float least, float *means,
                          float *variances) {
    if (!(least > 0)) {
        for (size_t model = 0; model < block->num_models; model++)
            load_model(block, model, start, num);
        return;
    }
    load_varied(block, start, num, means, variances);
    for (size_t model = 0; model < block->num_models; model++)
        keep_selected(block->rows + model * ROW, variances, least, num);
}

static void add_weighted_agreeing(const float *restrict row, const float *restrict votes,
                                  float weight, int is_first, float *restrict out,
                                  float *restrict divisor, size_t num) {
    for (size_t i = 0; i < num; i++) {
        float agreeing = votes[i] < 0 ? -row[i] : row[i];
        agreeing = agreeing <= 0 ? 0.0f : agreeing;
        float share = agreeing > 0 ? weight : 0.0f;
        out[i] = is_first ? agreeing * weight : out[i] + agreeing * weight;
        divisor[i] = is_first ? share : divisor[i] + share;
    }
}

INLINE void merge_few_sce(const Block *block, const Call *call, size_t start, size_t num,
                          float *restrict out, char code, size_t models, int selects) {
    const Few few = few_of(block, start);
    const float *restrict base = block->base;
    const float least = call->scalars[0], least_divisor = call->scalars[1];
    float weights[3];
    memcpy(weights, call->vectors, models * sizeof *weights);
    for (size_t i = 0; i < num; i++) {
        float values[3], votes = 0, sum = 0, divisor = 0;
        for (size_t model = 0; model < models; model++)
            values[model] = load(code, few.from[model], i) - base[i];
        if (selects) {
            float selected = variance_of(values, models) >= least ? 1.0f : 0.0f;
            for (size_t model = 0; model < models; model++) values[model] *= selected;
        }
        for (size_t model = 0; model < models; model++)
            votes = model ? votes + values[model] : values[model];
        for (size_t model = 0; model < models; model++) {
            float agreeing = agreeing_with(votes, values[model]), part = agreeing * weights[model];
            float share = weight_if(agreeing, weights[model]);
            sum = model ? sum + part : part;
            divisor = model ? divisor + share : share;
        }
        float by = divisor == 0 ? 1.0f : divisor;
        by = divisor < least_divisor ? least_divisor : by;
        out[i] = negated_if(votes < 0, sum) / by;
    }
}

static void merge_sce(const Block *block, const Call *call, size_t start, size_t num,
                      float *restrict out) {
    const float least_divisor = call->scalars[1];
    if (call->scalars[0] > 0)
        RETURN_FOR_FEW(block, merge_few_sce(block, call, start, num, out, CODE, MODELS, 1));
    RETURN_FOR_FEW(block, merge_few_sce(block, call, start, num, out, CODE, MODELS, 0));
    float *restrict votes = out + ROW, *restrict divisor = out + 2 * ROW;
    load_selected(block, start, num, call->scalars[0], votes, divisor);
    sum_rows(block, votes, num);
    for (size_t model = 0; model < block->num_models; model++)
        add_weighted_agreeing(block->rows + model * ROW, votes, call->vectors[model], model == 0,
                              out, divisor, num);
    for (size_t i = 0; i < num; i++) {
        float by = divisor[i] == 0 ? 1.0f : divisor[i];
        by = divisor[i] < least_divisor ? least_divisor : by;
        out[i] = (votes[i] < 0 ? -out[i] : out[i]) / by;
    }
}

static const Method sce = {"sce", 2, 1, merge_sce};

#endif
