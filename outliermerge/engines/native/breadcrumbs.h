/* Model Breadcrumbs: keep what is neither small nor large, with or without an elected sign.
 * Scalars: lambda, whether to normalize, how a sign is elected, and what is divided by where none
 * is. Vectors: the weights; the largest magnitudes that are dropped for being small; the largest
 * that are kept; the weights times what brings back the L1 norm. */
#ifndef OUTLIERMERGE_BREADCRUMBS_H
#define OUTLIERMERGE_BREADCRUMBS_H

#include "ties.h"

enum { NO_ELECTION, BY_SUM, BY_COUNT };

/* Infinities and NaN stay, so that a run notices them. */
INLINE float without_large(float value, float largest_kept) {
    float size = fabsf(value);
    return float_of((size > largest_kept) & (size < INFINITY) ? 0u : bits_of(value));
}

static void drop_large(float *restrict row, float largest_kept, size_t num) {
    for (size_t i = 0; i < num; i++) row[i] = without_large(row[i], largest_kept);
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
        if (total == 1)
            for (size_t i = 0; i < num; i++) out[i] = votes[i] * lambda;
        else
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

/* Votes by number are counted row by row, also of few models. */
static int is_by_count(const Call *call) { return (int)call->scalars[2] == BY_COUNT; }

static Agreement agreement_of_call(const Block *block, const Call *call) {
    const float *scalars = call->scalars;
    return agreement_of(block, scalars[0], scalars[3], (int)scalars[2] != NO_ELECTION,
                        scalars[1] != 0, call->vectors);
}

INLINE void merge_few_breadcrumbs(const Block *block, const Agreement *by, const float *limits,
                                  size_t start, size_t num, float *restrict out, char code,
                                  size_t models, int elects, int divides) {
    const Few few = few_of(block, start);
    const float *restrict base = block->base;
    for (size_t i = 0; i < num; i++) {
        float values[3];
        for (size_t model = 0; model < models; model++) {
            float value = load(code, few.from[model], i) - base[i];
            value = without_large(value, limits[models + model]);
            values[model] = trimmed(value, limits[model], limits[2 * models + model]);
        }
        out[i] = put_together_few(values, models, by, elects, divides);
    }
}

static void merge_breadcrumbs(const Block *block, const Call *call, size_t start, size_t num,
                              float *out) {
    const size_t models = block->num_models;
    const float *dropped = call->vectors + models, *kept = dropped + models;
    const float *scaled = kept + models;
    const Agreement by = agreement_of_call(block, call);
    if (!is_by_count(call))
        RETURN_FOR_FEW(block, FOR_AGREEMENT(by, merge_few_breadcrumbs(
            block, &by, dropped, start, num, out, CODE, MODELS, ELECTS, DIVIDES)));
    for (size_t model = 0; model < models; model++) {
        float *row = load_model(block, model, start, num);
        drop_large(row, kept[model], num);
        trim_row(row, out + ROW, dropped[model], scaled[model], model == 0, num);
    }
    put_together(block, call, num, out);
}

static const Method breadcrumbs = {"breadcrumbs", 4, 4, merge_breadcrumbs};

#endif
