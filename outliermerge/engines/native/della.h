/* DELLA: keep elements at random by rank in their row, with or without an elected sign.
 * Scalars: as of breadcrumbs; whether what is kept is divided by its probability. Vectors: the
 * weights; the mean probabilities to keep an element; how far the probabilities go from it; the
 * weights times what brings back the L1 norm. */
#ifndef OUTLIERMERGE_DELLA_H
#define OUTLIERMERGE_DELLA_H

#include "breadcrumbs.h"
#include "drawn.h"

static int prepare_della(Block *block, Call *call, size_t piece, size_t num) {
    const size_t models = block->num_models;
    RowsKept kept = {.choice = {call->vectors + models, call->vectors + 2 * models, call->keys,
                                  call->scalars[4] != 0}};
    return work_on_rows(block, call->rows, keep_of_row, &kept, piece, num);
}

static void merge_della(const Block *block, const Call *call, size_t start, size_t num,
                        float *out) {
    const size_t models = block->num_models;
    const float *scaled = call->vectors + 3 * models;
    for (size_t model = 0; model < models; model++) {
        float *row = block->rows + model * ROW;
        memcpy(row, call->rows->values + model * PIECE + start, num * sizeof *row);
        trim_row(row, out + ROW, -1.0f, scaled[model], model == 0, num);
    }
    put_together(block, call, num, out);
}

static const Method della = {"della", 5, 4, merge_della, prepare_della};

#endif
