/* DARE: keep elements at random, with or without an elected sign.
 * Scalars: as of breadcrumbs. Vectors: the weights; the probabilities to keep an element; what
 * kept elements are multiplied by; the weights times what brings back the L1 norm.
 * The numbers are those of rng.py: of the model's keys and the element's place alone. */
#ifndef OUTLIERMERGE_DARE_H
#define OUTLIERMERGE_DARE_H

#include "breadcrumbs.h"

INLINE uint64_t mix(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    return bits ^ (bits >> 31);
}

/* A number in [0, 1) is 53 bits: it is below a probability if they are below `limit`. */
static void keep_at_random(float *restrict row, const uint64_t *keys, uint64_t start,
                           uint64_t limit, float factor, size_t num) {
    const uint64_t first = keys[0], second = keys[1];
    for (size_t i = 0; i < num; i++) {
        uint64_t bits = mix(mix((start + i + 1) * 0x9E3779B97F4A7C15u + first) ^ second);
        float kept = (bits >> 11) < limit ? 1.0f : 0.0f;
        row[i] = row[i] * kept * factor; /* infinity times 0 is NaN, so that a run notices it */
    }
}

static void merge_dare(const Block *block, const Call *call, size_t start, size_t num, float *out) {
    const size_t models = block->num_models;
    const float *chances = call->vectors + models, *factors = chances + models;
    const float *scaled = factors + models;
    for (size_t model = 0; model < models; model++) {
        float *row = load_model(block, model, start, num);
        uint64_t limit = (uint64_t)ceil((double)chances[model] * 9007199254740992.0);
        if (limit == 0) memset(row, 0, num * sizeof *row);
        keep_at_random(row, call->keys + 2 * model, call->place, limit, factors[model], num);
        trim_row(row, out + ROW, -1.0f, scaled[model], model == 0, num);
    }
    put_together(block, call, num, out);
}

static const Method dare = {"dare", 4, 4, merge_dare};

#endif
