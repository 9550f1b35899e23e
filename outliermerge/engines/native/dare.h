/* DARE: keep elements at random, with or without an elected sign.
 * Scalars: as of breadcrumbs. Vectors: the weights; the probabilities to keep an element; what
 * kept elements are multiplied by; the weights times what brings back the L1 norm. */
#ifndef OUTLIERMERGE_DARE_H
#define OUTLIERMERGE_DARE_H

#include "breadcrumbs.h"
#include "random.h"

static void merge_dare(const Block *block, const Call *call, size_t start, size_t num, float *out) {
    const size_t models = block->num_models;
    const float *chances = call->vectors + models, *factors = chances + models;
    const float *scaled = factors + models;
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
