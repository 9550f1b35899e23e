/* NearSwap: take from the one model what is near the base's weight. Scalar: t. */
#ifndef OUTLIERMERGE_NEARSWAP_H
#define OUTLIERMERGE_NEARSWAP_H

#include "method.h"

static void merge_nearswap(const Block *block, const Call *call, size_t start, size_t num,
                           float *restrict out) {
    const float t = call->scalars[0];
    const float *restrict row = load_model(block, 0, start, num);
    for (size_t i = 0; i < num; i++) {
        float size = fabsf(row[i]);
        float share = 1.0f / (size < 1e-6f ? 1e-6f : size) * t; /* as torch divides a number */
        share = share < 0 ? 0.0f : share;
        share = share > 1 ? 1.0f : share;
        out[i] = row[i] * share;
    }
}

static const Method nearswap = {"nearswap", 1, 0, merge_nearswap};

#endif
