/* Statistics of a block's models beside one another: variances over models, sums of squares of
 * what is selected, and how many elements a model changes alone. */
#ifndef OUTLIERMERGE_SPREAD_H
#define OUTLIERMERGE_SPREAD_H

#include "levels.h"
#include "sce.h"

/* Sums of squares of each model in a piece; `memory` has room for 64 bytes more. */
static Lanes *lanes_in(char *memory) {
    return (Lanes *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
}

/* Add squares of what is selected for its variance; the rows are overwritten. */
static void add_selected(Lanes *squares, const Block *block, const float *variances, float from,
                         size_t num) {
    for (size_t model = 0; model < block->num_models; model++) {
        float *row = block->rows + model * ROW;
        keep_selected(row, variances, from, num);
        add_squares(squares + model, row, num);
    }
}

/* Write a piece's sums, and return where the next ones go. */
static char *write_sums(const Lanes *squares, size_t models, char *out) {
    for (size_t model = 0; model < models; model++, out += sizeof(double)) {
        const double sum = sum_of(squares[model]);
        memcpy(out, &sum, sizeof sum);
    }
    return out;
}

static PyObject *squares_of_pieces(const Block *block) {
    size_t num_pieces = (block->num_elements + PIECE - 1) / PIECE;
    return PyBytes_FromStringAndSize(NULL,
                                     (Py_ssize_t)(num_pieces * block->num_models * sizeof(double)));
}

PyDoc_STRVAR(variances_doc,
             "variances(block, low, shift, counts) -> (num_nonzero, squares, levels)\n\n"
             "Count the variances over models by their bits, as histogram counts magnitudes, and how "
             "many are not 0. If shift is 0, squares are the sums that the function squares returns "
             "for what lies above the window, and levels are each variance in the window of a piece "
             "and the sums of squares there, float64 (levels, 1 + M), or None where a piece has too "
             "many; else both are None.");

static PyObject *py_variances(PyObject *module, PyObject *args) {
    Block block;
    PyObject *low, *counts, *sums = NULL, *result = NULL;
    unsigned int shift;
    int failed = 0, error = 0;
    Histogram into = {0};
    if (!PyArg_ParseTuple(args, "O&OIO", take, &block, &low, &shift, &counts)) return NULL;
    const size_t models = block.num_models;
    uint64_t num_nonzero = 0;
    int is_taken = block.num_elements <= UINT32_MAX && take_histogram(&into, counts, low, shift);
    if (!is_taken && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a block is too large");
    Levels *levels = NULL;
    char *memory = NULL;
    if (is_taken && shift == 0) {
        sums = squares_of_pieces(&block);
        levels = take_levels(&block);
        memory = PyMem_RawMalloc(models * sizeof(Lanes) + 64);
        if (levels == NULL || memory == NULL) PyErr_NoMemory();
    }
    if (!PyErr_Occurred()) {
        const uint32_t end = into.bins.low + (into.bins.num_bins << shift);
        const float above = end > INFINITE ? NAN : float_of(end); /* no value is above NaN */
        float *means = block.rows + models * ROW, *variances = means + ROW;
        char *out = sums ? PyBytes_AS_STRING(sums) : NULL;
        Lanes *squares = lanes_in(memory);
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t num = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, num);
            error = errno;
            if (levels) memset(squares, 0, models * sizeof *squares);
            for (size_t i = 0; i < num && !failed; i += STEP) {
                size_t step = least(STEP, num - i);
                load_base(&block, i, step);
                load_varied(&block, i, step, means, variances);
                uint32_t nonzero = 0;
                for (size_t k = 0; k < step; k++) nonzero += variances[k] != 0;
                num_nonzero += nonzero;
                if (levels) {
                    add_levels(levels, &block, variances, step, &into);
                    add_selected(squares, &block, variances, above, step);
                } else {
                    count_row(variances, step, &into);
                }
            }
            if (levels && !failed) {
                finish_levels(levels, &into);
                out = write_sums(squares, models, out);
            }
        }
        if (!failed) finish_counts(&into);
        Py_END_ALLOW_THREADS;
        result = Py_BuildValue("(KOy#)", num_nonzero, sums ? sums : Py_None,
                               levels && levels->fits ? (char *)levels->found : NULL,
                               levels ? (Py_ssize_t)((char *)levels->end - (char *)levels->found) : 0);
    }
    if (is_taken) {
        PyBuffer_Release(&into.view);
        PyMem_RawFree(into.own);
    }
    Py_XDECREF(sums);
    free_levels(levels);
    PyMem_RawFree(memory);
    return finished(&block, result, failed, error);
}

PyDoc_STRVAR(squares_doc,
             "squares(block, least) -> bytes\n\n"
             "Sum of squares of each model in each piece of 65,536 elements, where the variance over "
             "models is not below `least`; float64 (pieces, M).");

static PyObject *py_squares(PyObject *module, PyObject *args) {
    Block block;
    float from;
    int failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O&f", take, &block, &from)) return NULL;
    const size_t models = block.num_models;
    char *memory = PyMem_RawMalloc(models * sizeof(Lanes) + 64);
    PyObject *result = memory == NULL ? PyErr_NoMemory() : squares_of_pieces(&block);
    if (result != NULL) {
        Lanes *squares = lanes_in(memory);
        char *out = PyBytes_AS_STRING(result);
        float *means = block.rows + models * ROW, *variances = means + ROW;
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t num = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, num);
            error = errno;
            memset(squares, 0, models * sizeof *squares);
            for (size_t i = 0; i < num && !failed; i += STEP) {
                size_t step = least(STEP, num - i);
                load_base(&block, i, step);
                load_selected(&block, i, step, from, means, variances);
                for (size_t model = 0; model < models; model++)
                    add_squares(squares + model, block.rows + model * ROW, step);
            }
            if (!failed) out = write_sums(squares, models, out);
        }
        Py_END_ALLOW_THREADS;
    }
    PyMem_RawFree(memory);
    return finished(&block, result, failed, error);
}

/* Write to `counts` how many models have an element above epsilon. */
static void count_active(const float *restrict row, float epsilon, int is_first,
                         uint32_t *restrict counts, size_t num) {
    for (size_t i = 0; i < num; i++) {
        uint32_t active = fabsf(row[i]) > epsilon;
        counts[i] = is_first ? active : counts[i] + active;
    }
}

PyDoc_STRVAR(overlap_doc,
             "overlap(block, epsilon) -> bytes\n\n"
             "How many of each model's elements above epsilon no other model has, and how many others "
             "have too; uint64 (2, M).");

static PyObject *py_overlap(PyObject *module, PyObject *args) {
    Block block;
    float epsilon;
    int failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O&f", take, &block, &epsilon)) return NULL;
    size_t models = block.num_models;
    uint64_t *found = PyMem_RawCalloc(2 * models, sizeof *found);
    if (found == NULL) return finished(&block, PyErr_NoMemory(), 0, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
        size_t num = least(PIECE, block.num_elements - start);
        failed = !fetch(&block, start, num);
        error = errno;
        for (size_t i = 0; i < num && !failed; i += STEP) {
            size_t step = least(STEP, num - i);
            uint32_t counts[STEP];
            load_base(&block, i, step);
            for (size_t model = 0; model < models; model++)
                count_active(load_model(&block, model, i, step), epsilon, model == 0, counts, step);
            for (size_t model = 0; model < models; model++) {
                const float *restrict row = block.rows + model * ROW;
                uint32_t alone = 0, all = 0;
                for (size_t k = 0; k < step; k++) {
                    uint32_t active = fabsf(row[k]) > epsilon;
                    all += active;
                    alone += active & (counts[k] == 1);
                }
                found[model] += alone;
                found[models + model] += all - alone;
            }
        }
    }
    Py_END_ALLOW_THREADS;
    PyObject *result = PyBytes_FromStringAndSize((char *)found, (Py_ssize_t)(2 * models * 8));
    PyMem_RawFree(found);
    return finished(&block, result, failed, error);
}

#endif
