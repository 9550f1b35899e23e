/* PCB: models compete for each element by their scores. See competition.py.
 * Scalar: lambda. Vectors: the least and the largest magnitude, the least score that wins and the
 * largest score, and the weights. */
#ifndef OUTLIERMERGE_PCB_H
#define OUTLIERMERGE_PCB_H

#include "functions.h"
#include "measure.h"
#include "method.h"
#include "sce.h"

enum { LARGEST_POWER = 80 };
#define SMALL 1e-3

/* tanh of a number; of small ones by its series, since 1 - exp loses their digits. */
INLINE double tanh_of(double x, int all_small) {
    const double size = fabs(x), series = size - size * size * size / 3;
    if (all_small) return copysign(series, x);
    const double power = exp_of(-2 * size);
    return copysign(size < SMALL ? series : (1 - power) / (1 + power), x);
}

/* Comparisons keep NaN. */
INLINE float clamped(float value, float from, float to) {
    return value < from ? from : value > to ? to : value;
}

INLINE void score_values(const float *restrict row, const float *restrict sums, float from, float to,
                         size_t models, int all_small, float *restrict scores, size_t num) {
    const double width = (double)to - from, factor = width <= 0 ? 1 : 1 / width;
    const double power = (double)models;
    const double spared = models > LARGEST_POWER ? (double)(models - LARGEST_POWER) : 0;
    for (size_t i = 0; i < num; i++) {
        const double place = ((double)clamped(fabsf(row[i]), from, to) - from) * factor;
        const double size = exp_of(place * place * power - spared);
        scores[i] = (float)(size * tanh_of((double)row[i] * sums[i], all_small));
    }
}

/* Write exp(N x^2) tanh(delta * sum), with x where |delta| is between its bounds, from 0 to 1; of
 * more than 80 models divided by exp(N - 80). */
static void score_model(const float *restrict row, const float *restrict sums, float from, float to,
                        size_t models, float *restrict scores, size_t num) {
    int all_small = 1; /* as a rule; then half of the exponentials are spared */
    for (size_t i = 0; i < num; i++) all_small &= fabs((double)row[i] * sums[i]) < SMALL;
    if (all_small)
        score_values(row, sums, from, to, models, 1, scores, num);
    else
        score_values(row, sums, from, to, models, 0, scores, num);
}

/* Load a step of all models, and write their sum. */
static void load_summed(const Block *block, size_t start, size_t num, float *sums) {
    for (size_t model = 0; model < block->num_models; model++) load_model(block, model, start, num);
    sum_rows(block, sums, num);
}

/* Scores below 0 count as 0. Returns the largest, or `largest` if that is larger. */
static float take_positive(float *restrict scores, float largest, size_t num) {
    for (size_t i = 0; i < num; i++) {
        scores[i] = scores[i] < 0 ? 0.0f : scores[i];
        largest = scores[i] > largest ? scores[i] : largest;
    }
    return largest;
}

PyDoc_STRVAR(scores_doc,
             "scores(block, bounds, lows, shift, counts) -> bytes\n\n"
             "Count the scores of PCB, as histogram counts magnitudes, those below 0 as 0. bounds are "
             "the least and the largest magnitude of each model, float32 (2, M). Returns the largest "
             "score of each model, float32 (M,).");

static PyObject *py_scores(PyObject *module, PyObject *args) {
    Block block;
    PyObject *lows, *counts;
    const char *bounds;
    Py_ssize_t num_bytes;
    unsigned int shift;
    int failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O&y#O!IO!", take, &block, &bounds, &num_bytes, &PyTuple_Type, &lows,
                          &shift, &PyTuple_Type, &counts))
        return NULL;
    const size_t models = block.num_models;
    Histogram *all = PyMem_RawCalloc(models, sizeof *all);
    float *limits = PyMem_RawMalloc((size_t)num_bytes + 1);
    float *largest = PyMem_RawCalloc(models, sizeof *largest);
    if (all == NULL || limits == NULL || largest == NULL)
        PyErr_NoMemory();
    else if ((size_t)PyTuple_GET_SIZE(lows) != models || (size_t)PyTuple_GET_SIZE(counts) != models ||
             (size_t)num_bytes != 2 * models * sizeof *limits || block.num_elements > UINT32_MAX)
        PyErr_SetString(PyExc_ValueError, "bounds and counts for each model are needed");
    size_t num_taken = 0;
    for (; num_taken < models && !PyErr_Occurred(); num_taken++)
        if (!take_histogram(all + num_taken, PyTuple_GET_ITEM(counts, (Py_ssize_t)num_taken),
                            PyTuple_GET_ITEM(lows, (Py_ssize_t)num_taken), shift))
            break;
    if (!PyErr_Occurred()) {
        memcpy(limits, bounds, (size_t)num_bytes);
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t length = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, length);
            error = errno;
            for (size_t i = 0; i < length && !failed; i += STEP) {
                float sums[STEP], scores[STEP];
                size_t step = least(STEP, length - i);
                load_base(&block, i, step);
                load_summed(&block, i, step, sums);
                for (size_t model = 0; model < models; model++) {
                    score_model(block.rows + model * ROW, sums, limits[model], limits[models + model],
                              models, scores, step);
                    largest[model] = take_positive(scores, largest[model], step);
                    count_row(scores, step, all + model);
                }
            }
        }
        for (size_t model = 0; model < models && !failed; model++) finish_counts(all + model);
        Py_END_ALLOW_THREADS;
    }
    PyObject *result = PyErr_Occurred() ? NULL
                                        : PyBytes_FromStringAndSize(
                                              (char *)largest, (Py_ssize_t)(models * sizeof *largest));
    for (size_t i = 0; i < num_taken; i++) {
        PyBuffer_Release(&all[i].view);
        PyMem_RawFree(all[i].own);
    }
    PyMem_RawFree(all);
    PyMem_RawFree(limits);
    PyMem_RawFree(largest);
    return finished(&block, result, failed, error);
}

/* Add a model's share of what is won, and the shares. Infinite changes become NaN, and all of a model
 * whose bounds are NaN. */
static void add_won(const float *restrict row, const float *restrict scores, float from, float to,
                    float low, float width, float weight, int is_first, float *restrict out,
                    float *restrict shares, size_t num) {
    const float unknown = from != from ? from : to != to ? to : 0.0f;
    for (size_t i = 0; i < num; i++) {
        const float alone = (scores[i] >= low) & (scores[i] > 0) ? 1.0f : 0.0f;
        const float share = width > 0 ? clamped((scores[i] - low) / width, 0, 1) : alone;
        const float size = clamped(fabsf(row[i]), from, to);
        const float sign = row[i] == 0 ? 0.0f : copysignf(1, row[i]);
        const float won = (sign * size + (row[i] - row[i]) + unknown) * share * weight;
        out[i] = is_first ? won : out[i] + won;
        shares[i] = is_first ? share : shares[i] + share;
    }
}

static void merge_pcb(const Block *block, const Call *call, size_t start, size_t num, float *out) {
    const size_t models = block->num_models;
    const float *least_of = call->vectors, *most_of = least_of + models, *low = most_of + models,
                *high = low + models, *weights = high + models;
    float *restrict scores = out + ROW, *restrict shares = out + 2 * ROW;
    float sums[STEP];
    load_summed(block, start, num, sums);
    for (size_t model = 0; model < models; model++) {
        const float *row = block->rows + model * ROW;
        score_model(row, sums, least_of[model], most_of[model], models, scores, num);
        add_won(row, scores, least_of[model], most_of[model], low[model], high[model] - low[model],
                weights[model], model == 0, out, shares, num);
    }
    for (size_t i = 0; i < num; i++)
        out[i] = out[i] / (shares[i] < 1e-12f ? 1e-12f : shares[i]) * call->scalars[0];
}

static const Method pcb = {"pcb", 1, 5, merge_pcb};

#endif
