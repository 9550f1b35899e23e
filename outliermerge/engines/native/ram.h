/* RAM and RAM+: the mean over the models that change an element. In RAM+ what one model changes
 * alone is multiplied by that model's factor. Scalar: epsilon. Vector, of RAM+: the factors. */
#ifndef OUTLIERMERGE_RAM_H
#define OUTLIERMERGE_RAM_H

#include "method.h"

/* Add a row's active elements to `sums` and, times the factor, to `alone`; count the models. */
static void add_active(const float *restrict row, float epsilon, float factor, int is_first,
                       float *restrict sums, float *restrict alone, float *restrict counts,
                       size_t num) {
    for (size_t i = 0; i < num; i++) {
        float active = fabsf(row[i]) > epsilon ? 1.0f : 0.0f;
        float kept = row[i] * active; /* infinity and NaN times 0 are NaN: a run notices them */
        sums[i] = is_first ? kept : sums[i] + kept;
        alone[i] = is_first ? kept * factor : alone[i] + kept * factor;
        counts[i] = is_first ? active : counts[i] + active;
    }
}

static void merge_active(const Block *block, const Call *call, const float *factors, size_t start,
                         size_t num, float *out) {
    float *restrict sums = out, *restrict alone = out + ROW, *restrict counts = out + 2 * ROW;
    for (size_t model = 0; model < block->num_models; model++) {
        const float *row = load_model(block, model, start, num);
        add_active(row, call->scalars[0], factors ? factors[model] : 1.0f, model == 0, sums, alone,
                   counts, num);
    }
    for (size_t i = 0; i < num; i++) {
        float mean = sums[i] / (counts[i] < 1 ? 1.0f : counts[i]);
        sums[i] = counts[i] == 1 ? alone[i] : mean;
    }
}

static void merge_ram(const Block *block, const Call *call, size_t start, size_t num, float *out) {
    merge_active(block, call, NULL, start, num, out);
}

static void merge_ramplus(const Block *block, const Call *call, size_t start, size_t num,
                          float *out) {
    merge_active(block, call, call->vectors, start, num, out);
}

static const Method ram = {"ram", 1, 0, merge_ram}, ramplus = {"ramplus", 1, 1, merge_ramplus};

#endif
