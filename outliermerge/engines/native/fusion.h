/* Arcee Fusion: take what is important of the second model. See importance.py. */
#ifndef OUTLIERMERGE_FUSION_H
#define OUTLIERMERGE_FUSION_H

#include "functions.h"
#include "measure.h"
#include "method.h"

/* The sum of numbers in double, in sixteen lanes. */
static double sum_of_doubles(const double *values, size_t num) {
    Lanes sums = {{{0}}};
    size_t i = 0;
    for (; i + LANES <= num; i += LANES)
        for (int part = 0; part < VECTORS; part++) {
            Doubles some;
            memcpy(&some, values + i + part * WIDTH, sizeof some);
            sums.parts[part] += some;
        }
    for (size_t lane = 0; i < num; i++, lane++) sums.parts[lane / WIDTH][lane % WIDTH] += values[i];
    return sum_of(sums);
}

static float largest_of(const float *restrict row, size_t num) {
    float lanes[LANES], most = row[0];
    size_t i = 0;
    for (size_t lane = 0; lane < LANES; lane++) lanes[lane] = most;
    for (; i + LANES <= num; i += LANES)
        for (size_t lane = 0; lane < LANES; lane++)
            lanes[lane] = row[i + lane] > lanes[lane] ? row[i + lane] : lanes[lane];
    for (size_t lane = 0; lane < LANES; lane++) most = lanes[lane] > most ? lanes[lane] : most;
    for (; i < num; i++) most = row[i] > most ? row[i] : most;
    return most;
}

/* Write the softmax of a row, and 1e-8 more. */
static void take_softmax(const float *restrict row, double *restrict shares, size_t num) {
    const float most = largest_of(row, num);
    for (size_t i = 0; i < num; i++) shares[i] = exp_of((double)row[i] - most);
    const double share = 1 / sum_of_doubles(shares, num);
    for (size_t i = 0; i < num; i++) shares[i] = shares[i] * share + 1e-8;
}

/* By how much the softmax of the second model's row diverges from the first one's. */
static float divergence_of(const Rows *rows, const WholeRow *row) {
    const size_t num = rows->elements;
    double *restrict first = rows->wide, *restrict second = rows->wide + num;
    take_softmax(row->values, first, num);
    take_softmax(row->values + row->apart, second, num);
    for (size_t i = 0; i < num; i++) second[i] *= log_of(second[i] / first[i]);
    const double sum = sum_of_doubles(second, num);
    return (float)(sum < 0 ? 0 : sum); /* which rounding alone makes of it */
}

static void score_row(const float *restrict first, const float *restrict second, float divergence,
                      float *restrict scores, size_t num) {
    for (size_t i = 0; i < num; i++) scores[i] = fabsf(second[i] - first[i]) * divergence;
}

typedef struct {
    Histogram *histograms;
    size_t num;
} Counted;

static void count_scores(Rows *rows, const WholeRow *row, void *with) {
    const Counted *counted = with;
    if (!row->begins) return;
    const float divergence = divergence_of(rows, row);
    for (size_t i = 0; i < rows->elements; i += STEP) {
        float scores[STEP];
        const size_t step = least(STEP, rows->elements - i);
        const float *first = row->values + i;
        score_row(first, first + row->apart, divergence, scores, step);
        for (size_t k = 0; k < counted->num; k++) count_row(scores, step, counted->histograms + k);
    }
}

PyDoc_STRVAR(importance_doc,
             "importance(block, start, row, lows, shift, counts)\n\n"
             "Count how important the changes of the second of two models are, by the bits of their "
             "scores, as histogram counts magnitudes: once for each of lows and counts. Those of the "
             "rows that begin in the block are counted; start is its first element in the tensor, and "
             "row the elements of a row. A block in files may begin and end within a row, which is "
             "then read as a whole.");

static PyObject *py_importance(PyObject *module, PyObject *args) {
    enum { MOST = 3 };
    Block block;
    PyObject *lows, *counts;
    unsigned long long first;
    Py_ssize_t elements;
    unsigned int shift;
    int failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O&KnO!IO!", take, &block, &first, &elements, &PyTuple_Type, &lows,
                          &shift, &PyTuple_Type, &counts))
        return NULL;
    Histogram histograms[MOST] = {{.num_above = 0}};
    Rows rows = {0};
    const size_t num = (size_t)PyTuple_GET_SIZE(counts);
    size_t num_taken = 0;
    if (num > MOST || (size_t)PyTuple_GET_SIZE(lows) != num || elements < 0 ||
        block.num_sources != 2 || block.num_models != 2 || block.num_elements > UINT32_MAX)
        PyErr_SetString(PyExc_ValueError, "two models, and a low for each of counts, are needed");
    else
        take_rows(&rows, &block, (size_t)elements, (size_t)elements, first);
    while (!PyErr_Occurred() && num_taken < num)
        num_taken += (size_t)take_histogram(
            histograms + num_taken, PyTuple_GET_ITEM(counts, (Py_ssize_t)num_taken),
            PyTuple_GET_ITEM(lows, (Py_ssize_t)num_taken), shift);
    if (!PyErr_Occurred()) {
        Counted counted = {histograms, num};
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t length = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, length) ||
                     !work_on_rows(&block, &rows, count_scores, &counted, start, length);
            error = errno;
        }
        for (size_t i = 0; i < num && !failed; i++) finish_counts(histograms + i);
        Py_END_ALLOW_THREADS;
    }
    for (size_t i = 0; i < num_taken; i++) {
        PyBuffer_Release(&histograms[i].view);
        PyMem_RawFree(histograms[i].own);
    }
    free_rows(&rows);
    return finished(&block, PyErr_Occurred() ? NULL : Py_NewRef(Py_None), failed, error);
}

/* Scalar: the least score that is taken from the second model. */
static void fuse_row(Rows *rows, const WholeRow *row, void *with) {
    const float least_score = *(const float *)with, divergence = divergence_of(rows, row);
    float *restrict first = row->values;
    const float *restrict second = row->values + row->apart;
    for (size_t i = 0; i < rows->elements; i++) {
        float score = fabsf(second[i] - first[i]) * divergence, none = first[i] - first[i];
        float taken = none == 0 ? second[i] : none; /* infinities and NaN must not be hidden */
        first[i] = score < least_score ? first[i] : taken;
    }
}

static int prepare_fusion(Block *block, Call *call, size_t piece, size_t num) {
    return work_on_rows(block, call->rows, fuse_row, (void *)call->scalars, piece, num);
}

static const Method arcee_fusion = {"arcee_fusion", 1, 0, merge_made, prepare_fusion};

#endif
