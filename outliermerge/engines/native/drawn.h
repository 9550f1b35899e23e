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

/* Add magnitudes to lanes, from the first one on. */
static void add_magnitudes(Lanes *into, const float *restrict values, size_t num) {
    for (size_t lane = 0; lane < num; lane++)
        into->parts[lane / WIDTH][lane % WIDTH] += fabsf(values[lane]);
}

static double norm_of(const float *restrict values, size_t num) {
    const size_t whole = num / LANES * LANES;
    Lanes lanes = {{{0}}}, total;
    for (size_t i = 0; i < whole; i += LANES)
        for (int part = 0; part < VECTORS; part++)
            lanes.parts[part] += magnitudes_of(doubles_of(values + i + part * WIDTH));
    total = lanes; /* lanes stay in registers */
    add_magnitudes(&total, values + whole, num - whole);
    return sum_of(total);
}

/* Drop what is not kept, and add up magnitudes before and after. */
static void drop_and_add(const uint8_t *restrict kept, float *restrict values, size_t num,
                         double *sums) {
#if defined(__AVX512DQ__)
    const size_t whole = num / LANES * LANES;
    Lanes all = {{{0}}}, left = {{{0}}}, before, after;
    for (size_t i = 0; i < whole; i += LANES) {
        __m512 row = _mm512_loadu_ps(values + i);
        __m512i some = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(kept + i)));
        __m512 dropped = _mm512_mul_ps(row, _mm512_cvtepi32_ps(some));
        _mm512_storeu_ps(values + i, dropped);
        all.parts[0] += magnitudes_of((Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256(row)));
        all.parts[1] += magnitudes_of((Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps(row, 1)));
        left.parts[0] += magnitudes_of((Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256(dropped)));
        left.parts[1] += magnitudes_of((Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps(dropped, 1)));
    }
    before = all;
    after = left;
    add_magnitudes(&before, values + whole, num - whole);
    apply_kept(kept + whole, values + whole, 1, num - whole);
    add_magnitudes(&after, values + whole, num - whole);
    sums[0] = sum_of(before);
    sums[1] = sum_of(after);
#else
    sums[0] = norm_of(values, num);
    apply_kept(kept, values, 1, num);
    sums[1] = norm_of(values, num);
#endif
}

/* Drop some elements of a row. sums, if not NULL, are those of magnitudes before and after. */
static void keep_some(Rows *rows, const Choice *choice, size_t model, float *values,
                      uint64_t place, double *sums) {
    const double chance = choice->chances[model], epsilon = choice->epsilons[model];
    const uint64_t *keys = choice->keys + 2 * model;
    const size_t stride = rows->elements / rows->length;
    const int is_by_rank = chance > 0 && chance < 1 && rows->length > 1;
    rows->row.least = chance - epsilon;
    rows->row.range = 2 * epsilon;
    if (is_by_rank && sums && stride == 1) {
        choose_by_rank(&rows->row, values, 1, keys, place);
        drop_and_add(rows->row.kept, values, rows->elements, sums);
        return;
    }
    if (sums) sums[0] = norm_of(values, rows->elements);
    if (chance <= 0) {
        memset(values, 0, rows->elements * sizeof *values);
    } else if (!is_by_rank) {
        float factor = choice->divide ? (float)(1 / chance) : 1.0f;
        keep_at_random(values, keys, place, limit_of(chance), factor, rows->elements);
    }
    for (size_t i = 0; i < stride && is_by_rank; i++) {
        if (choice->divide) {
            divide_by_chance(&rows->row, values + i, stride, keys, place + i);
        } else {
            choose_by_rank(&rows->row, values + i, stride, keys, place + i);
            apply_kept(rows->row.kept, values + i, stride, rows->length);
        }
    }
    if (sums) sums[1] = norm_of(values, rows->elements);
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
    double *sums; /* of magnitudes of the rows that begin in the block (rows, M, 2): of all, and of
                   * what is kept; NULL if not wanted */
} RowsKept;

static void keep_of_row(Rows *rows, const WholeRow *row, void *with) {
    RowsKept *kept = with;
    double *sums = row->begins ? kept->sums : NULL;
    for (size_t model = 0; model < row->models; model++)
        keep_some(rows, &kept->choice, model, row->values + model * row->apart, row->place,
                  sums ? sums + 2 * model : NULL);
    if (sums) kept->sums += 2 * row->models;
}

#endif
