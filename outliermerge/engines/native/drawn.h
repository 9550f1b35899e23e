/* What is kept of a row, where elements are kept at random by rank. */
#ifndef OUTLIERMERGE_DRAWN_H
#define OUTLIERMERGE_DRAWN_H

#include "statistics.h"
#include "whole_rows.h"

/* How a model's elements are kept, for all models: (M,). */
typedef struct {
    const float *chances, *epsilons;
    const uint64_t *keys; /* (M, 2) */
    int divide;           /* what is kept by the probability */
} Choice;

static void keep_some(Rows *rows, const Choice *choice, size_t model, float *values,
                      uint64_t place) {
    const double chance = choice->chances[model], epsilon = choice->epsilons[model];
    const uint64_t *keys = choice->keys + 2 * model;
    if (chance <= 0) {
        memset(values, 0, rows->elements * sizeof *values);
    } else if (chance >= 1 || rows->length < 2) {
        float factor = choice->divide ? (float)(1 / chance) : 1.0f;
        keep_at_random(values, keys, place, limit_of(chance), factor, rows->elements);
    } else {
        size_t stride = rows->elements / rows->length;
        rows->row.least = chance - epsilon;
        rows->row.range = 2 * epsilon;
        for (size_t i = 0; i < stride; i++)
            keep_by_rank(&rows->row, values + i, stride, keys, place + i, choice->divide);
    }
}

/* Sums of magnitudes of a row of each model (M, 2): of all, and of what is kept. */
typedef struct {
    double *sums; /* of the rows that begin in the block, one after the other; NULL if not wanted */
    float magnitudes[STEP];
} Norms;

static double norm_of(const float *values, size_t num, float *magnitudes) {
    Lanes lanes = {{{0}}};
    for (size_t i = 0; i < num; i += STEP) {
        size_t step = least(STEP, num - i);
        for (size_t k = 0; k < step; k++) magnitudes[k] = fabsf(values[i + k]);
        add_row(&lanes, magnitudes, step);
    }
    return sum_of(lanes);
}

typedef struct {
    Choice choice;
    Norms norms;
} RowsKept;

static void keep_of_row(Rows *rows, const WholeRow *row, void *with) {
    RowsKept *kept = with;
    double *sums = row->begins ? kept->norms.sums : NULL;
    for (size_t model = 0; model < row->models; model++) {
        float *own = row->values + model * row->apart, *space = kept->norms.magnitudes;
        if (sums) sums[2 * model] = norm_of(own, rows->elements, space);
        keep_some(rows, &kept->choice, model, own, row->place);
        if (sums) sums[2 * model + 1] = norm_of(own, rows->elements, space);
    }
    if (sums) kept->norms.sums += 2 * row->models;
}

#endif
