/* Statistics of a block: moments, sums and histograms of magnitudes. */
#ifndef OUTLIERMERGE_MEASURE_H
#define OUTLIERMERGE_MEASURE_H

#include "block.h"
#include "statistics.h"

/* Memory for two sums of each model in each piece. */
static PyObject *sums_of_pieces(const Block *block) {
    size_t num_pieces = (block->num_elements + PIECE - 1) / PIECE;
    return PyBytes_FromStringAndSize(
        NULL, (Py_ssize_t)(num_pieces * block->num_models * 2 * sizeof(double)));
}

PyDoc_STRVAR(moments_doc,
             "moments(block) -> bytes\n\n"
             "Mean and sum of squared deviations of each model in each piece of 65,536 elements, "
             "float64 (pieces, M, 2).");

static PyObject *py_moments(PyObject *module, PyObject *args) {
    Block block;
    int failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O&", take, &block)) return NULL;
    size_t models = block.num_models;
    char *memory = PyMem_RawMalloc(models * sizeof(Moments) + 64);
    Moments *moments = (Moments *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    PyObject *result = memory == NULL ? PyErr_NoMemory() : sums_of_pieces(&block);
    if (result != NULL) {
        char *out = PyBytes_AS_STRING(result);
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t num = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, num);
            error = errno;
            for (size_t i = 0; i < num && !failed; i += STEP) {
                size_t step = least(STEP, num - i);
                load_base(&block, i, step);
                for (size_t model = 0; model < models; model++) {
                    float *row = load_model(&block, model, i, step);
                    if (i == 0) start_moments(moments + model, row, step);
                    add_moments(moments + model, row, step);
                }
            }
            for (size_t model = 0; model < models && !failed; model++) {
                double sums[2];
                finish_moments(moments + model, num, sums);
                memcpy(out, sums, sizeof sums);
                out += sizeof sums;
            }
        }
        Py_END_ALLOW_THREADS;
    }
    PyMem_RawFree(memory);
    return finished(&block, result, failed, error);
}

PyDoc_STRVAR(magnitudes_doc,
             "magnitudes(block, thresholds) -> bytes\n\n"
             "Sum of each model's magnitudes in each piece of 65,536 elements, and of those that "
             "are not below its threshold (float32, M), float64 (pieces, M, 2).");

static PyObject *py_magnitudes(PyObject *module, PyObject *args) {
    Block block;
    const char *thresholds;
    Py_ssize_t num_bytes;
    int failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O&y#", take, &block, &thresholds, &num_bytes)) return NULL;
    size_t models = block.num_models;
    PyObject *result = NULL;
    if (num_bytes != (Py_ssize_t)(models * sizeof(float)))
        PyErr_SetString(PyExc_ValueError, "a threshold for each model is needed");
    else
        result = sums_of_pieces(&block);
    if (result != NULL) {
        char *out = PyBytes_AS_STRING(result);
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t num = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, num);
            error = errno;
            for (size_t model = 0; model < models && !failed; model++) {
                Lanes whole = {{{0}}}, kept = {{{0}}};
                float threshold, *some = block.rows + models * ROW;
                memcpy(&threshold, thresholds + model * sizeof threshold, sizeof threshold);
                for (size_t i = 0; i < num; i += STEP) {
                    size_t step = least(STEP, num - i);
                    load_base(&block, i, step);
                    float *row = load_model(&block, model, i, step);
                    take_magnitudes(row, some, threshold, step);
                    add_row(&whole, row, step);
                    add_row(&kept, some, step);
                }
                const double sums[2] = {sum_of(whole), sum_of(kept)};
                memcpy(out, sums, sizeof sums);
                out += sizeof sums;
            }
        }
        Py_END_ALLOW_THREADS;
    }
    return finished(&block, result, failed, error);
}

/* The histogram of one model's magnitudes by their bits: bins of 2^shift from `low` on, and a last
 * bin for all magnitudes above. */
typedef struct {
    Bins bins;
    Py_buffer view; /* uint64 counts, shared by threads */
    uint32_t *own;  /* this thread's counts for a wide window; added to `view` at the end */
    uint64_t num_above;
} Histogram;

/* List where magnitudes of a row are in the window, and count those above it. */
static size_t pick(const float *restrict row, Bins bins, uint32_t *restrict picked,
                   uint64_t *num_above, size_t num) {
    size_t num_picked = 0;
#if defined(__AVX512F__)
    const uint32_t width = bins.num_bins << bins.shift;
    const __m512i magnitude = _mm512_set1_epi32(MAGNITUDE), one = _mm512_set1_epi32(1);
    const __m512i low = _mm512_set1_epi32((int)bins.low), end = _mm512_set1_epi32((int)width);
    __m512i above = _mm512_setzero_si512();
    __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (size_t i = 0; i < num; i += 16) {
        __mmask16 valid = num - i >= 16 ? 0xFFFF : (__mmask16)((1u << (num - i)) - 1);
        __m512i bits = _mm512_and_si512(_mm512_maskz_loadu_epi32(valid, row + i), magnitude);
        __m512i offsets = _mm512_sub_epi32(bits, low);
        __mmask16 inside = _mm512_mask_cmplt_epu32_mask(valid, offsets, end);
        __mmask16 from_low = _mm512_mask_cmpge_epu32_mask(valid, bits, low);
        above = _mm512_mask_add_epi32(above, from_low & (__mmask16)~inside, above, one);
        _mm512_storeu_si512(picked + num_picked, _mm512_maskz_compress_epi32(inside, places));
        places = _mm512_add_epi32(places, _mm512_set1_epi32(16));
        num_picked += (size_t)__builtin_popcount(inside);
    }
    *num_above += (uint32_t)_mm512_reduce_add_epi32(above);
#else
    uint32_t offsets[STEP];
    uint8_t inside[STEP];
    if (num < STEP) memset(inside, 0, sizeof inside);
    *num_above += find_bins(row, bins, offsets, inside, num);
    for (size_t i = 0; i < num; i += 8) {
        uint64_t left;
        memcpy(&left, inside + i, 8);
        for (; left != 0; left &= left - 1) /* each turn handles one set bit */
            picked[num_picked++] = (uint32_t)i + (uint32_t)(__builtin_ctzll(left) >> 3);
    }
#endif
    return num_picked;
}

INLINE uint32_t bin_of(Bins bins, float value) {
    return ((bits_of(value) & MAGNITUDE) - bins.low) >> bins.shift;
}

static void count_row(const float *row, size_t num, Histogram *into) {
    const Bins bins = into->bins;
#if defined(__AVX512F__)
    if (into->own == NULL) {
        uint32_t picked[STEP + 16];
        uint64_t *counts = into->view.buf;
        size_t num_picked = pick(row, bins, picked, &into->num_above, num);
        for (size_t i = 0; i < num_picked; i++)
            __atomic_fetch_add(counts + bin_of(bins, row[picked[i]]), 1, __ATOMIC_RELAXED);
        return;
    }
#endif
    uint32_t offsets[STEP];
    uint8_t inside[STEP];
    if (num < STEP) memset(inside, 0, sizeof inside);
    into->num_above += find_bins(row, bins, offsets, inside, num);
    if (into->own != NULL)
        count_many(bins, offsets, inside, into->own, num);
    else
        count_few(bins, offsets, inside, into->view.buf, num);
}

static void finish_counts(Histogram *from) {
    uint64_t *counts = from->view.buf;
    for (size_t i = 0; from->own != NULL && i < from->bins.num_bins; i++)
        if (from->own[i]) __atomic_fetch_add(counts + i, from->own[i], __ATOMIC_RELAXED);
    __atomic_fetch_add(counts + from->bins.num_bins, from->num_above, __ATOMIC_RELAXED);
}

static int take_histogram(Histogram *into, PyObject *counts, PyObject *low, unsigned int shift) {
    unsigned long least_bits = PyLong_AsUnsignedLong(low);
    if (PyErr_Occurred() || PyObject_GetBuffer(counts, &into->view, PyBUF_WRITABLE)) return 0;
    uint64_t num_bins = (uint64_t)into->view.len / sizeof(uint64_t) - 1;
    if (into->view.len < 16 || shift > 16 || least_bits > MAGNITUDE ||
        least_bits + (num_bins << shift) > 0x80000000u) {
        PyErr_SetString(PyExc_ValueError, "no such window");
    } else {
        into->bins = (Bins){(uint32_t)least_bits, shift, (uint32_t)num_bins};
        if (shift == 0 || (into->own = PyMem_RawCalloc(num_bins, sizeof *into->own)) != NULL)
            return 1;
        PyErr_NoMemory();
    }
    PyBuffer_Release(&into->view);
    return 0;
}

PyDoc_STRVAR(histogram_doc,
             "histogram(block, lows, shift, counts)\n\n"
             "Count each model's magnitudes by their float32 bits: counts, a tuple of writable "
             "buffers of uint64, or None for a model that is left out, have a bin for every "
             "2^shift bits from the model's low on, and a last one for what lies above. With "
             "several times as many lows and counts as models, each model is counted as often, in "
             "the order of the models. Any threads may add to the same counts at once.");

static PyObject *py_histogram(PyObject *module, PyObject *args) {
    Block block;
    PyObject *lows, *counts;
    unsigned int shift;
    int failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O&O!IO!", take, &block, &PyTuple_Type, &lows, &shift,
                          &PyTuple_Type, &counts))
        return NULL;
    size_t models = block.num_models, num = (size_t)PyTuple_GET_SIZE(counts);
    Histogram *all = PyMem_RawCalloc(num + 1, sizeof *all);
    if (all == NULL) {
        PyErr_NoMemory();
    } else if ((size_t)PyTuple_GET_SIZE(lows) != num || num == 0 || num % models ||
               block.num_elements > UINT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "counts for each model are needed");
    } else {
        for (size_t i = 0; i < num && !PyErr_Occurred(); i++) {
            PyObject *buffer = PyTuple_GET_ITEM(counts, (Py_ssize_t)i);
            if (buffer != Py_None)
                take_histogram(all + i, buffer, PyTuple_GET_ITEM(lows, (Py_ssize_t)i), shift);
        }
    }
    if (!PyErr_Occurred()) {
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t length = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, length);
            error = errno;
            for (size_t i = 0; i < length && !failed; i += STEP) {
                size_t step = least(STEP, length - i);
                load_base(&block, i, step);
                for (size_t model = 0; model < models; model++) {
                    const float *row = NULL;
                    for (size_t k = model; k < num; k += models) {
                        if (all[k].bins.num_bins == 0) continue;
                        if (row == NULL) row = load_model(&block, model, i, step);
                        count_row(row, step, all + k);
                    }
                }
            }
        }
        for (size_t i = 0; i < num && !failed; i++)
            if (all[i].bins.num_bins) finish_counts(all + i);
        Py_END_ALLOW_THREADS;
    }
    for (size_t i = 0; all != NULL && i < num; i++)
        if (all[i].bins.num_bins) {
            PyBuffer_Release(&all[i].view);
            PyMem_RawFree(all[i].own);
        }
    PyMem_RawFree(all);
    return finished(&block, PyErr_Occurred() ? NULL : Py_NewRef(Py_None), failed, error);
}

#endif
