/* The min-sigma rule, with counts of each model's outliers.
 * Scalars: the threshold, lambda. Vector 0: the weights. */
#ifndef OUTLIERMERGE_MIN_SIGMA_H
#define OUTLIERMERGE_MIN_SIGMA_H

#include "method.h"

INLINE uint32_t min_sigma_row(char code, const void *from, const float *restrict base,
                              float threshold, float divisor, float inverse, float weight,
                              int is_first, float *restrict out, size_t num) {
    uint32_t num_outliers = 0;
    for (size_t i = 0; i < num; i++) {
        float delta = load(code, from, i) - base[i];
        float shared = inverse != 0 ? delta * inverse : delta / divisor;
        int is_outlier = !(fabsf(delta) <= threshold);
        float kept = (is_outlier ? delta : shared) * weight;
        num_outliers += (uint32_t)is_outlier;
        out[i] = is_first ? kept : out[i] + kept;
    }
    return num_outliers;
}

/* out (+)= weight * (delta if it is an outlier, else delta / divisor); returns how many are
 * outliers. */
static uint32_t add_min_sigma(char code, const void *from, const float *restrict base,
                              float threshold, float divisor, float weight, int is_first,
                              float *restrict out, size_t num) {
    int exponent;
    int is_exact = frexpf(divisor, &exponent) == 0.5f; /* then multiplying is exact */
    uint32_t found = 0;
    FOR_DTYPE(code, {
        if (is_exact && is_first)
            found = min_sigma_row(CODE, from, base, threshold, 1, 1 / divisor, weight, 1, out, num);
        else if (is_exact)
            found = min_sigma_row(CODE, from, base, threshold, 1, 1 / divisor, weight, 0, out, num);
        else
            found = min_sigma_row(CODE, from, base, threshold, divisor, 0, weight, is_first, out,
                                  num);
    });
    return found;
}

static void merge_min_sigma(const Block *block, const Call *call, size_t start, size_t num,
                            float *out) {
    const float threshold = call->scalars[0], lambda = call->scalars[1];
    for (size_t model = 0; model < block->num_models; model++) {
        size_t source = source_of(block, model);
        call->counts[model] += add_min_sigma(
            block->places[source].code, at(block, source, start), block->base, threshold,
            (float)block->num_models, call->vectors[model], model == 0, out, num);
    }
    if (lambda != 1) scale_row(out, lambda, num);
}

static const Method min_sigma = {"min_sigma", 2, 1, merge_min_sigma};

#endif
