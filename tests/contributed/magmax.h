/* The change of the largest magnitude, the first of equals. Scalar 0: lambda. */
#ifndef OUTLIERMERGE_MAGMAX_H
#define OUTLIERMERGE_MAGMAX_H

#include "method.h"

/* Keep in out what is larger; NaN is neither passed over nor replaced. */
static void keep_larger(char code, const void *from, const float *restrict base,
                        float *restrict out, size_t num) {
    FOR_DTYPE(code, for (size_t i = 0; i < num; i++) {
        float delta = load(CODE, from, i) - base[i];
        out[i] = fabsf(delta) <= fabsf(out[i]) || out[i] != out[i] ? out[i] : delta;
    });
}

static void merge_magmax(const Block *block, const Call *call, size_t start, size_t num,
                         float *out) {
    for (size_t model = 0; model < block->num_models; model++) {
        size_t source = source_of(block, model);
        char code = block->places[source].code;
        if (model == 0)
            load_delta(code, at(block, source, start), block->base, out, num);
        else
            keep_larger(code, at(block, source, start), block->base, out, num);
    }
    scale_row(out, call->scalars[0], num);
}

static const Method magmax = {"magmax", 1, 0, merge_magmax};

#endif
