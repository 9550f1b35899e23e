/* What is kept of a row, where elements are kept at random by rank. */
#ifndef OUTLIERMERGE_DRAWN_H
#define OUTLIERMERGE_DRAWN_H

#include "statistics.h"
#include "whole_rows.h"

/* How a model's elements are kept, for all models: (M,). */
typedef struct {
    const float *chances, *epsilons;
    const uint64_t *keys; /* (M, 2) */
    int divide;           /* what is kept by the probability */
} Choice;

static void keep_some(Rows *rows, const Choice *choice, size_t model, float *values,
                      uint64_t place) {
    const double chance = choice->chances[model], epsilon = choice->epsilons[model];
    const uint64_t *keys = choice->keys + 2 * model;
    if (chance <= 0) {
        memset(values, 0, rows->elements * sizeof *values);
    } else if (chance >= 1 || rows->length < 2) {
        float factor = choice->divide ? (float)(1 / chance) : 1.0f;
        keep_at_random(values, keys, place, limit_of(chance), factor, rows->elements);
    } else {
        size_t stride = rows->elements / rows->length;
        rows->row.least = chance - epsilon;
        rows->row.range = 2 * epsilon;
        for (size_t i = 0; i < stride; i++)
            keep_by_rank(&rows->row, values + i, stride, keys, place + i, choice->divide);
    }
}

/* Sums of magnitudes of a row of each model (M, 2): of all, and of what is kept. */
typedef struct {
    double *sums; /* of the rows that begin in the block, one after the other; NULL if not wanted */
} Norms;

static double norm_of(const float *restrict values, size_t num) {
    float magnitudes[LANES];
    Lanes lanes = {{{0}}};
    size_t i = 0;
    for (; i + LANES <= num; i += LANES)
        for (int part = 0; part < VECTORS; part++)
            lanes.parts[part] += magnitudes_of(doubles_of(values + i + part * WIDTH));
    for (size_t k = i; k < num; k++) magnitudes[k - i] = fabsf(values[k]);
    add_row(&lanes, magnitudes, num - i);
    return sum_of(lanes);
}

/* A bit for each element of a tensor that is kept, for all models; 0 also where it is NaN. */
typedef struct {
    uint8_t *bits; /* NULL where they are not wanted or known */
    size_t apart;  /* bytes from one model's to the next one's, with 4 to spare */
} Kept;

static int takes_kept(Kept *kept, const Py_buffer *view, const Block *block, uint64_t first) {
    *kept = (Kept){view->buf, (size_t)view->len / block->num_models};
    if (view->buf == NULL || (kept->apart >= 4 && first / 8 <= kept->apart - 4 &&
                              (first + block->num_elements + 7) / 8 <= kept->apart - 4))
        return 1;
    PyErr_SetString(PyExc_ValueError, "a buffer for what is kept is too short");
    return 0;
}

/* Write the bits of a piece that begins at `place`, a multiple of 8, from what is left of it. */
static void pack_kept(const Kept *kept, const Block *block, const Rows *rows, uint64_t place,
                      size_t num) {
    for (size_t model = 0; model < block->num_models; model++) {
        float values[32] = {0};
        uint8_t *to = kept->bits + model * kept->apart + place / 8;
        for (size_t i = 0; i < num; i += 32) {
            const float *from = rows->values + model * PIECE + i;
            if (num - i < 32) from = memcpy(values, from, (num - i) * sizeof *values);
            uint32_t bits = 0;
            for (int k = 0; k < 32; k++)
                bits |= (uint32_t)((from[k] < 0) | (from[k] > 0)) << k;
            for (size_t k = 0; k < 4 && i + 8 * k < num; k++) to[i / 8 + k] = (uint8_t)(bits >> 8 * k);
        }
    }
}

/* Write 1 where an element is kept, else 0. */
static void unpack_kept(const Kept *kept, size_t model, uint64_t place, float *restrict row,
                        size_t num) {
    const uint8_t *bits = kept->bits + model * kept->apart;
    for (size_t i = 0; i < num; i += 16) { /* rows have room for more than a step */
        uint32_t some;
        memcpy(&some, bits + (place + i) / 8, sizeof some);
        some >>= (place + i) % 8;
        for (unsigned k = 0; k < 16; k++) row[i + k] = some >> k & 1 ? 1.0f : 0.0f;
    }
}

typedef struct {
    Choice choice;
    Norms norms;
} RowsKept;

static void keep_of_row(Rows *rows, const WholeRow *row, void *with) {
    RowsKept *kept = with;
    double *sums = row->begins ? kept->norms.sums : NULL;
    for (size_t model = 0; model < row->models; model++) {
        float *own = row->values + model * row->apart;
        if (sums) sums[2 * model] = norm_of(own, rows->elements);
        keep_some(rows, &kept->choice, model, own, row->place);
        if (sums) sums[2 * model + 1] = norm_of(own, rows->elements);
    }
    if (sums) kept->norms.sums += 2 * row->models;
}

#endif
