/* Merge methods on rows of a block, as the torch functions of their names define them.
 *
 * A step of a block is worked on model by model; between models it stays in the first cache.
 * Parameters are float32, as in torch, and sums over models go in the models' order. */
#ifndef OUTLIERMERGE_METHODS_H
#define OUTLIERMERGE_METHODS_H

#include "convert.h"

static void load_row(char code, const void *from, float *restrict row, size_t num) {
    FOR_DTYPE(code, for (size_t i = 0; i < num; i++) row[i] = load(CODE, from, i));
}

/* A model's weights less the base's. */
static void load_delta(char code, const void *from, const float *restrict base,
                       float *restrict row, size_t num) {
    FOR_DTYPE(code, for (size_t i = 0; i < num; i++) row[i] = load(CODE, from, i) - base[i]);
}

/* Add the base's weights, round and store; returns whether all is finite. */
static int store_row(char code, const float *restrict row, const float *restrict base,
                     void *restrict to, size_t num) {
    uint32_t most = 0;
    FOR_DTYPE(code, for (size_t i = 0; i < num; i++) {
        uint32_t size = store(CODE, row[i] + base[i], to, i);
        most = size > most ? size : most;
    });
    return most < infinity_of(code);
}

/* out (+)= weight * delta */
static void add_weighted(char code, const void *from, const float *restrict base, float weight,
                         int is_first, float *restrict out, size_t num) {
    if (is_first)
        FOR_DTYPE(code, for (size_t i = 0; i < num; i++) {
            out[i] = (load(CODE, from, i) - base[i]) * weight;
        });
    else
        FOR_DTYPE(code, for (size_t i = 0; i < num; i++) {
            out[i] += (load(CODE, from, i) - base[i]) * weight;
        });
}

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

/* out (+)= weight * (delta where it is an outlier, else delta / divisor); returns the outliers. */
static uint32_t add_min_sigma(char code, const void *from, const float *restrict base,
                              float threshold, float divisor, float weight, int is_first,
                              float *restrict out, size_t num) {
    int exponent;
    int is_exact = frexpf(divisor, &exponent) == 0.5f; /* a power of two divides by multiplying */
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

/* Trim a row in place, scale it, and add it to the votes for a sign. */
static void trim_row(float *restrict row, float *restrict votes, float largest_dropped,
                     float scaled_weight, int is_first, size_t num) {
    for (size_t i = 0; i < num; i++) {
        float kept = fabsf(row[i]) <= largest_dropped ? 0.0f : row[i];
        row[i] = kept * scaled_weight;
        votes[i] = is_first ? row[i] : votes[i] + row[i];
    }
}

/* Add what agrees with the elected sign, +1 where the votes are even, and the weights of it. */
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

static void scale_row(float *restrict row, float factor, size_t num) {
    for (size_t i = 0; i < num; i++) row[i] *= factor;
}

#endif
