/* Statistics of a block's models beside one another: variances over models, sums of squares of
 * what is selected, and how many elements a model changes alone. */
#ifndef OUTLIERMERGE_SPREAD_H
#define OUTLIERMERGE_SPREAD_H

#include "measure.h"
#include "sce.h"

PyDoc_STRVAR(variances_doc,
             "variances(block, low, shift, counts) -> int\n\n"
             "Count the variances over models by their bits, as histogram counts magnitudes. Returns "
             "how many are not 0.");

static PyObject *py_variances(PyObject *module, PyObject *args) {
    Block block;
    PyObject *low, *counts;
    unsigned int shift;
    int failed = 0, error = 0;
    Histogram into = {0};
    if (!PyArg_ParseTuple(args, "O&OIO", take, &block, &low, &shift, &counts)) return NULL;
    uint64_t num_nonzero = 0;
    int is_taken = block.num_elements <= UINT32_MAX && take_histogram(&into, counts, low, shift);
    if (!is_taken && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a block is too large");
    if (is_taken) {
        float *means = block.rows + block.num_models * ROW, *variances = means + ROW;
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t num = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, num);
            error = errno;
            for (size_t i = 0; i < num && !failed; i += STEP) {
                size_t step = least(STEP, num - i);
                load_base(&block, i, step);
                for (size_t model = 0; model < block.num_models; model++)
                    load_model(&block, model, i, step);
                find_variances(&block, means, variances, step);
                uint32_t nonzero = 0;
                for (size_t k = 0; k < step; k++) nonzero += variances[k] != 0;
                num_nonzero += nonzero;
                count_row(variances, step, &into);
            }
        }
        if (!failed) finish_counts(&into);
        Py_END_ALLOW_THREADS;
        PyBuffer_Release(&into.view);
        PyMem_RawFree(into.own);
    }
    return finished(&block, is_taken ? PyLong_FromUnsignedLongLong(num_nonzero) : NULL, failed,
                    error);
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
    size_t models = block.num_models, num_pieces = (block.num_elements + PIECE - 1) / PIECE;
    char *memory = PyMem_RawMalloc(models * sizeof(Moments) + 64);
    Moments *moments = (Moments *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    PyObject *result = memory == NULL ? PyErr_NoMemory()
                                      : PyBytes_FromStringAndSize(
                                            NULL, (Py_ssize_t)(num_pieces * models * 8));
    if (result != NULL) {
        char *out = PyBytes_AS_STRING(result);
        float *means = block.rows + models * ROW, *variances = means + ROW;
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t num = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, num);
            error = errno;
            memset(moments, 0, models * sizeof *moments); /* so deviations are those from 0 */
            for (size_t i = 0; i < num && !failed; i += STEP) {
                size_t step = least(STEP, num - i);
                load_base(&block, i, step);
                load_selected(&block, i, step, from, means, variances);
                for (size_t model = 0; model < models; model++)
                    add_moments(moments + model, block.rows + model * ROW, step);
            }
            for (size_t model = 0; model < models && !failed; model++) {
                const double sum = sum_of(moments[model].squares);
                memcpy(out, &sum, sizeof sum);
                out += sizeof sum;
            }
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
