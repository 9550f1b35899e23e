/* DELLA: keep elements at random by rank in their row, with or without an elected sign.
 * Scalars: as of breadcrumbs; whether what is kept is divided by its probability. Vectors: the
 * weights; the mean probabilities to keep an element; how far the probabilities go from it; the
 * weights times what brings back the L1 norm. What is kept is given, or ranked anew. */
#ifndef OUTLIERMERGE_DELLA_H
#define OUTLIERMERGE_DELLA_H

#include "breadcrumbs.h"

static int prepare_della(Block *block, Call *call, size_t piece, size_t num) {
    const size_t models = block->num_models;
    RowsKept kept = {.choice = {call->vectors + models, call->vectors + 2 * models, call->keys,
                                  call->scalars[4] != 0}};
    return work_on_rows(block, call->rows, keep_of_row, &kept, piece, num);
}

/* `kept` are rows of 1 where an element of a model is kept, else 0. */
INLINE void merge_few_della(const Block *block, const Agreement *agreement, const float *kept,
                            const float *scaled, size_t start, size_t num, float *restrict out,
                            char code, size_t models, int elects, int divides) {
    const Few few = few_of(block, start);
    const Agreement by = *agreement;
    const float *restrict base = block->base;
    for (size_t i = 0; i < num; i++) {
        float values[3];
        for (size_t model = 0; model < models; model++) {
            float value = load(code, few.from[model], i) - base[i];
            values[model] = value * kept[model * ROW + i] * scaled[model];
        }
        out[i] = put_together_few(values, models, &by, elects, divides);
    }
}

static void merge_della(const Block *block, const Call *call, size_t start, size_t num,
                        float *out) {
    const size_t models = block->num_models;
    const float *scaled = call->vectors + 3 * models;
    const Agreement by = agreement_of_call(block, call);
    const int is_known = call->kept.bits != NULL, is_few = code_of_few(block) && !is_by_count(call);
    for (size_t model = 0; model < models && is_known; model++) {
        float *row = block->rows + model * ROW, *kept = is_few ? row : out;
        unpack_kept(&call->kept, model, call->place, kept, num);
        if (is_few) continue;
        load_model(block, model, start, num);
        for (size_t i = 0; i < num; i++) row[i] *= kept[i];
    }
    if (is_known && is_few)
        RETURN_FOR_FEW(block, FOR_AGREEMENT(by, merge_few_della(
            block, &by, block->rows, scaled, start, num, out, CODE, MODELS, ELECTS, DIVIDES)));
    for (size_t model = 0; model < models; model++) {
        float *row = block->rows + model * ROW;
        if (!is_known) memcpy(row, call->rows->values + model * PIECE + start, num * sizeof *row);
        trim_row(row, out + ROW, -1.0f, scaled[model], model == 0, num);
    }
    put_together(block, call, num, out);
}

static const Method della = {"della", 5, 4, merge_della, prepare_della};

#endif
