/* TIES: trim, elect a sign, merge the elements that agree with it. Scalars: lambda, whether to
 * normalize. Vectors: the weights; for each model the largest magnitude that is dropped; the
 * weights times the factors that restore the L1 norm. */
#ifndef OUTLIERMERGE_TIES_H
#define OUTLIERMERGE_TIES_H

#include "few.h"
#include "method.h"

/* Bits are chosen and not values: of these the compiler makes no branches. */
INLINE float trimmed(float value, float largest_dropped, float scaled_weight) {
    return float_of(fabsf(value) <= largest_dropped ? 0u : bits_of(value)) * scaled_weight;
}

INLINE float negated_if(int condition, float value) {
    return float_of(bits_of(value) ^ (condition ? 0x80000000u : 0u));
}

/* An element with the elected sign turned to +; 0 where it does not agree. */
INLINE float agreeing_with(float votes, float value) {
    float agreeing = negated_if(votes < 0, value);
    return float_of(agreeing <= 0 ? 0u : bits_of(agreeing));
}

INLINE float weight_if(float agreeing, float weight) {
    return float_of(agreeing > 0 ? bits_of(weight) : 0u);
}

INLINE float finished_ties(float sum, float votes, float divisor, int normalize, float factor) {
    float merged = negated_if(votes < 0, sum);
    return (normalize ? merged / (divisor != 0 ? divisor : 1.0f) : merged) * factor;
}

/* Trim a row in place, scale it, and add it to the votes for a sign. */
static void trim_row(float *restrict row, float *restrict votes, float largest_dropped,
                     float scaled_weight, int is_first, size_t num) {
    for (size_t i = 0; i < num; i++) {
        row[i] = trimmed(row[i], largest_dropped, scaled_weight);
        votes[i] = is_first ? row[i] : votes[i] + row[i];
    }
}

/* Add the elements that agree with the elected sign (+1 where the votes sum to 0), and their
 * weights. */
static void add_agreeing(const float *restrict row, const float *restrict votes, float weight,
                         int is_first, float *restrict out, float *restrict divisor, size_t num) {
    for (size_t i = 0; i < num; i++) {
        float agreeing = agreeing_with(votes[i], row[i]);
        float share = weight_if(agreeing, weight);
        out[i] = is_first ? agreeing : out[i] + agreeing;
        divisor[i] = is_first ? share : divisor[i] + share;
    }
}

static void finish_ties(float *restrict out, const float *restrict votes,
                        const float *restrict divisor, int normalize, float factor, size_t num) {
    for (size_t i = 0; i < num; i++)
        out[i] = finished_ties(out[i], votes[i], divisor[i], normalize, factor);
}

enum { NO_DIVISION, DIVISION, BY_INVERSE };

/* How few models' elements are put together. */
typedef struct {
    float lambda, total, weights[3];
    int elects, divides;
} Agreement;

/* Whether every sum of weights is a power of two, whose inverse is exact. */
static int are_powers_of_two(const float *weights, size_t models) {
    for (unsigned chosen = 1; chosen < 1u << models; chosen++) {
        float sum = 0;
        for (size_t model = 0; model < models; model++)
            sum += chosen >> model & 1 ? weights[model] : 0.0f;
        if ((bits_of(sum) & 0x807FFFFF) != 0 || !(sum > 0x1p-60f && sum < 0x1p60f)) return 0;
    }
    return 1;
}

static Agreement agreement_of(const Block *block, float lambda, float total, int elects,
                              int normalize, const float *weights) {
    const size_t models = least(3, block->num_models);
    Agreement by = {.lambda = lambda, .total = total, .elects = elects};
    memcpy(by.weights, weights, models * sizeof *weights);
    by.divides = !(elects ? normalize : total != 1) ? NO_DIVISION
                 : elects && are_powers_of_two(weights, models) ? BY_INVERSE
                                                                : DIVISION;
    return by;
}

/* Put together elements that are weighted: the sign that their sum has is elected, or none. */
INLINE float put_together_few(const float *values, size_t models, const Agreement *by, int elects,
                              int divides) {
    float votes = values[0], sum = 0, divisor = 0;
    for (size_t model = 1; model < models; model++) votes += values[model];
    if (!elects) return (divides ? votes / by->total : votes) * by->lambda;
    for (size_t model = 0; model < models; model++) {
        float agreeing = agreeing_with(votes, values[model]);
        float share = weight_if(agreeing, by->weights[model]);
        sum = model ? sum + agreeing : agreeing;
        divisor = model ? divisor + share : share;
    }
    if (divides != BY_INVERSE) return finished_ties(sum, votes, divisor, divides, by->lambda);
    float inverse = float_of(divisor != 0 ? 0x7F000000 - bits_of(divisor) : bits_of(1));
    return negated_if(votes < 0, sum) * inverse * by->lambda;
}

/* Compile a statement for each way to put elements together, in it constants ELECTS, DIVIDES. */
#define FOR_AGREEMENT(by, ...)                      \
    do {                                            \
        if ((by).elects && (by).divides == BY_INVERSE) {   \
            enum { ELECTS = 1, DIVIDES = BY_INVERSE };     \
            __VA_ARGS__;                            \
        } else if ((by).elects && (by).divides) {          \
            enum { ELECTS = 1, DIVIDES = DIVISION };       \
            __VA_ARGS__;                            \
        } else if ((by).elects) {                   \
            enum { ELECTS = 1, DIVIDES = NO_DIVISION };    \
            __VA_ARGS__;                            \
        } else if ((by).divides) {                  \
            enum { ELECTS = 0, DIVIDES = DIVISION };       \
            __VA_ARGS__;                            \
        } else {                                    \
            enum { ELECTS = 0, DIVIDES = NO_DIVISION };    \
            __VA_ARGS__;                            \
        }                                           \
    } while (0)

INLINE void merge_few_ties(const Block *block, const Agreement *by, const float *dropped,
                           const float *scaled, size_t start, size_t num, float *restrict out,
                           char code, size_t models, int divides) {
    const Few few = few_of(block, start);
    const float *restrict base = block->base;
    for (size_t i = 0; i < num; i++) {
        float values[3];
        for (size_t model = 0; model < models; model++)
            values[model] = trimmed(load(code, few.from[model], i) - base[i], dropped[model],
                                    scaled[model]);
        out[i] = put_together_few(values, models, by, 1, divides);
    }
}

static void merge_ties(const Block *block, const Call *call, size_t start, size_t num, float *out) {
    const size_t models = block->num_models;
    const float lambda = call->scalars[0], normalize = call->scalars[1];
    const float *weights = call->vectors, *dropped = weights + models, *scaled = dropped + models;
    const Agreement by = agreement_of(block, lambda, 1, 1, normalize != 0, weights);
    RETURN_FOR_FEW(block, FOR_AGREEMENT(by, if (ELECTS) merge_few_ties(
        block, &by, dropped, scaled, start, num, out, CODE, MODELS, DIVIDES)));
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
