/* DARE: keep elements at random, with or without an elected sign.
 * Scalars: as of breadcrumbs. Vectors: the weights; the probabilities to keep an element; what
 * kept elements are multiplied by; the weights times what brings back the L1 norm. */
#ifndef OUTLIERMERGE_DARE_H
#define OUTLIERMERGE_DARE_H

#include "breadcrumbs.h"
#include "random.h"

/* What each of few models' elements is drawn by, and multiplied by where it is kept. */
typedef struct {
    uint64_t counters[3], second_keys[3], below[3];
    float factors[3], scaled[3];
    int is_told; /* whether the first bits tell all */
} Drawing;

static Drawing drawing_of(const Block *block, const Call *call) {
    const size_t models = block->num_models;
    Drawing by = {.is_told = 1};
    for (size_t model = 0; model < least(3, models); model++) {
        const uint64_t *keys = call->keys + 2 * model, limit = limit_of(call->vectors[models + model]);
        by.counters[model] = counter_of(call->place, keys);
        by.second_keys[model] = keys[1];
        by.below[model] = limit << 11;
        by.factors[model] = call->vectors[2 * models + model];
        by.scaled[model] = call->vectors[3 * models + model];
        by.is_told &= limit > 0 && is_told_by_first(limit);
    }
    return by;
}

INLINE void merge_few_dare(const Block *block, const Agreement *agreement, const Drawing *drawing,
                           size_t start, size_t num, float *restrict out, char code,
                           size_t models, int elects, int divides) {
    const Few few = few_of(block, start);
    const Agreement by = *agreement;
    const Drawing draw = *drawing;
    const float *restrict base = block->base;
    uint64_t way = 0;
    for (size_t i = 0; i < num; i++) {
        float values[3];
        for (size_t model = 0; model < models; model++) {
            uint64_t bits = first_bits(draw.counters[model] + way, draw.second_keys[model]);
            float kept = bits < draw.below[model] ? 1.0f : 0.0f;
            float value = load(code, few.from[model], i) - base[i];
            values[model] = value * kept * draw.factors[model] * draw.scaled[model];
        }
        out[i] = put_together_few(values, models, &by, elects, divides);
        way += GAMMA;
    }
}

static void merge_dare(const Block *block, const Call *call, size_t start, size_t num, float *out) {
    const size_t models = block->num_models;
    const float *chances = call->vectors + models, *factors = chances + models;
    const float *scaled = factors + models;
    const Agreement by = agreement_of_call(block, call);
    const Drawing drawing = drawing_of(block, call);
    if (!is_by_count(call) && drawing.is_told)
        RETURN_FOR_FEW(block, FOR_AGREEMENT(by, merge_few_dare(
            block, &by, &drawing, start, num, out, CODE, MODELS, ELECTS, DIVIDES)));
    for (size_t model = 0; model < models; model++) {
        float *row = load_model(block, model, start, num);
        uint64_t limit = limit_of(chances[model]);
        if (limit == 0) memset(row, 0, num * sizeof *row);
        keep_at_random(row, call->keys + 2 * model, call->place, limit, factors[model], num);
        trim_row(row, out + ROW, -1.0f, scaled[model], model == 0, num);
    }
    put_together(block, call, num, out);
}

static const Method dare = {"dare", 4, 4, merge_dare};

#endif
