/* Model Breadcrumbs: keep what is neither small nor large, with or without an elected sign.
 * Scalars: lambda, whether to normalize, how a sign is elected, and what is divided by where none
 * is. Vectors: the weights; the largest magnitudes that are dropped for being small; the largest
 * that are kept; the weights times what brings back the L1 norm. */
#ifndef OUTLIERMERGE_BREADCRUMBS_H
#define OUTLIERMERGE_BREADCRUMBS_H

#include "ties.h"

enum { NO_ELECTION, BY_SUM, BY_COUNT };

/* Infinities and NaN stay, so that a run notices them. */
static void drop_large(float *restrict row, float largest_kept, size_t num) {
    for (size_t i = 0; i < num; i++) {
        float size = fabsf(row[i]);
        row[i] = (size > largest_kept) & (size < INFINITY) ? 0.0f : row[i];
    }
}

/* Let every model have one vote. NaN votes for nothing. */
static void count_votes(const float *restrict row, float *restrict votes, int is_first,
                        size_t num) {
    for (size_t i = 0; i < num; i++) {
        float vote = (float)((row[i] > 0) - (row[i] < 0));
        votes[i] = is_first ? vote : votes[i] + vote;
    }
}

/* Merge rows that are weighted and added up as votes, the row behind the output's. */
static void put_together(const Block *block, const Call *call, size_t num, float *out) {
    const size_t models = block->num_models;
    const float lambda = call->scalars[0], normalize = call->scalars[1], total = call->scalars[3];
    const int election = (int)call->scalars[2];
    float *votes = out + ROW, *divisor = out + 2 * ROW;
    if (election == NO_ELECTION) {
        for (size_t i = 0; i < num; i++) out[i] = votes[i] / total * lambda;
        return;
    }
    for (size_t model = 0; model < models && election == BY_COUNT; model++)
        count_votes(block->rows + model * ROW, votes, model == 0, num);
    for (size_t model = 0; model < models; model++)
        add_agreeing(block->rows + model * ROW, votes, call->vectors[model], model == 0, out,
                     divisor, num);
    finish_ties(out, votes, divisor, normalize != 0, lambda, num);
}

static void merge_breadcrumbs(const Block *block, const Call *call, size_t start, size_t num,
                              float *out) {
    const size_t models = block->num_models;
    const float *dropped = call->vectors + models, *kept = dropped + models;
    const float *scaled = kept + models;
    for (size_t model = 0; model < models; model++) {
        float *row = load_model(block, model, start, num);
        drop_large(row, kept[model], num);
        trim_row(row, out + ROW, dropped[model], scaled[model], model == 0, num);
    }
    put_together(block, call, num, out);
}

static const Method breadcrumbs = {"breadcrumbs", 4, 4, merge_breadcrumbs};

#endif
