/* What methods and statistics share: a row of values as float32, and back. */
#ifndef OUTLIERMERGE_ROWS_H
#define OUTLIERMERGE_ROWS_H

#include "convert.h"

static void load_row(char code, const void *from, float *restrict row, size_t num) {
    FOR_DTYPE(code, for (size_t i = 0; i < num; i++) row[i] = load(CODE, from, i));
}

/* A model's weights minus the base's. */
static void load_delta(char code, const void *from, const float *restrict base,
                       float *restrict row, size_t num) {
    FOR_DTYPE(code, for (size_t i = 0; i < num; i++) row[i] = load(CODE, from, i) - base[i]);
}

/* Add the base's weights, round and store; returns whether all stored values are finite. */
static int store_row(char code, const float *restrict row, const float *restrict base,
                     void *restrict to, size_t num) {
    uint32_t most = 0;
    FOR_DTYPE(code, for (size_t i = 0; i < num; i++) {
        uint32_t size = store(CODE, row[i] + base[i], to, i);
        most = size > most ? size : most;
    });
    return most < infinity_of(code);
}

static void scale_row(float *restrict row, float factor, size_t num) {
    for (size_t i = 0; i < num; i++) row[i] *= factor;
}

#endif
