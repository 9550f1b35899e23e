/* Merges of a block, in one or several ways, from its places to others. */
#ifndef OUTLIERMERGE_MERGE_H
#define OUTLIERMERGE_MERGE_H

#include "block.h"

/* A merge method with its parameters, and where its output goes. */
typedef struct Variant Variant;
typedef void (*Method)(const Block *, const Variant *, size_t start, size_t num, float *out);

struct Variant {
    Method method;
    float threshold, lambda;
    int normalize, is_finite;
    float *weights; /* (M,) */
    float *dropped; /* (M,): magnitudes up to these are trimmed */
    float *scaled;  /* (M,): weights times what brings back the L1 norm */
    uint64_t *num_outliers;
    Place out;
    char *stored; /* the output: where it goes, or in scratch memory on its way to a file */
    PyObject *digests;
};

/* The methods: each writes a step's merged task vectors, or weights, to out. */

static void weighted_sum(const Block *block, const Variant *with, size_t start, size_t num,
                         float *out) {
    for (size_t model = 0; model < block->num_models; model++) {
        size_t source = source_of(block, model);
        add_weighted(block->places[source].code, at(block, source, start), block->base,
                     with->weights[model], model == 0, out, num);
    }
}

static void min_sigma(const Block *block, const Variant *with, size_t start, size_t num,
                      float *out) {
    for (size_t model = 0; model < block->num_models; model++) {
        size_t source = source_of(block, model);
        with->num_outliers[model] += add_min_sigma(
            block->places[source].code, at(block, source, start), block->base, with->threshold,
            (float)block->num_models, with->weights[model], model == 0, out, num);
    }
    if (with->lambda != 1) scale_row(out, with->lambda, num);
}

static void ties(const Block *block, const Variant *with, size_t start, size_t num, float *out) {
    float *votes = out + ROW, *divisor = out + 2 * ROW;
    for (size_t model = 0; model < block->num_models; model++) {
        float *row = load_model(block, model, start, num);
        trim_row(row, votes, with->dropped[model], with->scaled[model], model == 0, num);
    }
    for (size_t model = 0; model < block->num_models; model++)
        add_agreeing(block->rows + model * ROW, votes, with->weights[model], model == 0, out,
                     divisor, num);
    finish_ties(out, votes, divisor, with->normalize, with->lambda, num);
}

static Method find_method(const char *name) {
    if (strcmp(name, "weighted_sum") == 0) return weighted_sum;
    if (strcmp(name, "min_sigma") == 0) return min_sigma;
    if (strcmp(name, "ties") == 0) return ties;
    return NULL;
}

/* Take (method, (threshold, lambda, normalize), parameters, code, out). */
static int take_variant(Variant *variant, PyObject *tuple, const Block *block, Scratch *scratch) {
    const char *name, *packed;
    Py_ssize_t num_packed;
    PyObject *out;
    int code;
    size_t models = block->num_models, num_pieces = (block->num_elements + PIECE - 1) / PIECE;
    variant->is_finite = 1;
    if (!PyArg_ParseTuple(tuple, "s(ffp)y#CO", &name, &variant->threshold, &variant->lambda,
                          &variant->normalize, &packed, &num_packed, &code, &out))
        return 0;
    variant->method = find_method(name);
    if (variant->method == NULL || num_packed != (Py_ssize_t)(3 * models * sizeof(float))) {
        PyErr_SetString(PyExc_ValueError, "no such method, or not its parameters");
        return 0;
    }
    if (!take_place(&variant->out, out, code, block->num_elements, PyBUF_WRITABLE)) return 0;
    variant->weights = PyMem_RawMalloc(3 * models * sizeof(float));
    variant->num_outliers = PyMem_RawCalloc(models, sizeof(uint64_t));
    variant->stored = variant->out.file < 0 ? variant->out.view.buf
                                            : take_room(scratch, &variant->out, block->num_elements);
    variant->digests =
        PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(num_pieces * DIGEST_BYTES));
    if (variant->weights == NULL || variant->num_outliers == NULL || variant->stored == NULL ||
        variant->digests == NULL) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        release_place(&variant->out);
        return 0;
    }
    memcpy(variant->weights, packed, (size_t)num_packed);
    variant->dropped = variant->weights + models;
    variant->scaled = variant->dropped + models;
    return 1;
}

/* Merge a piece that has been fetched, and digest it. */
static void merge_piece(Block *block, Variant *variant, size_t start, size_t num) {
    const Place *out = &variant->out;
    char *stored = variant->stored + piece_bytes(out, start);
    float *merged_row = block->rows + block->num_models * ROW;
    for (size_t i = 0; i < num; i += STEP) {
        size_t step = least(STEP, num - i);
        load_base(block, i, step);
        variant->method(block, variant, i, step, merged_row);
        variant->is_finite &=
            store_row(out->code, merged_row, block->added, stored + piece_bytes(out, i), step);
    }
    digest(out, stored, num, digest_in(variant->digests, start / PIECE));
}

/* (is_finite, counts, digests) */
static PyObject *result_of(const Variant *variant, size_t num_models) {
    PyObject *counts = PyTuple_New((Py_ssize_t)num_models);
    for (size_t model = 0; counts != NULL && model < num_models; model++)
        PyTuple_SET_ITEM(counts, (Py_ssize_t)model,
                         PyLong_FromUnsignedLongLong(variant->num_outliers[model]));
    return Py_BuildValue("(NNO)", PyBool_FromLong(variant->is_finite), counts, variant->digests);
}

PyDoc_STRVAR(merge_doc,
             "merge(block, variants[, scratch]) -> (digests, ((is_finite, counts, digests), ...))\n\n"
             "Merge a block in one or several ways. A variant is (method, (threshold, lambda,\n"
             "normalize), parameters, code, out): method is weighted_sum, min_sigma (takes\n"
             "threshold and lambda) or ties (lambda and normalize); parameters are float32 (3, M):\n"
             "weights, and for ties the largest magnitudes that are dropped and the scaled weights;\n"
             "out is a writable buffer, or (file descriptor, position[, descriptor of the same file for\n"
             "direct writes]), of the dtype of code. scratch is a writable buffer with room for all\n"
             "outputs that go to files, and two pages more for each.\n"
             "is_finite tells of the output, and so of all sources; counts are min_sigma's\n"
             "outliers of each model; digests are 16 bytes for each piece of 65,536 elements, of\n"
             "each source (S, pieces) and of each output, undefined for pieces of 240 bytes or\n"
             "fewer.");

static PyObject *py_merge(PyObject *module, PyObject *args) {
    Block block;
    PyObject *given, *result = NULL;
    Scratch scratch = {0};
    int failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O&O!|w*", take, &block, &PyTuple_Type, &given, &scratch.view))
        return NULL;
    size_t num_variants = (size_t)PyTuple_GET_SIZE(given), num_taken = 0;
    size_t num_pieces = (block.num_elements + PIECE - 1) / PIECE;
    Variant *variants = PyMem_RawCalloc(num_variants + 1, sizeof *variants);
    PyObject *digests = PyTuple_New((Py_ssize_t)block.num_sources);
    for (size_t i = 0; digests != NULL && i < block.num_sources && !PyErr_Occurred(); i++)
        PyTuple_SET_ITEM(digests, (Py_ssize_t)i,
                         PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(num_pieces * DIGEST_BYTES)));
    if (variants == NULL) PyErr_NoMemory();
    while (!PyErr_Occurred() && num_taken < num_variants)
        num_taken += (size_t)take_variant(
            variants + num_taken, PyTuple_GET_ITEM(given, (Py_ssize_t)num_taken), &block, &scratch);
    if (!PyErr_Occurred()) {
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t num = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, num);
            for (size_t i = 0; i < block.num_sources && !failed; i++)
                digest(block.places + i, block.data[i], num,
                       digest_in(PyTuple_GET_ITEM(digests, (Py_ssize_t)i), start / PIECE));
            error = errno;
            for (size_t i = 0; i < num_variants && !failed; i++)
                merge_piece(&block, variants + i, start, num);
        }
        for (size_t i = 0; i < num_variants && !failed; i++) {
            const Variant *variant = variants + i;
            failed = variant->out.file >= 0 &&
                     !write_all(&variant->out, block.num_elements, variant->stored);
            error = errno;
            if (failed) block.failed = block.num_sources + i;
        }
        Py_END_ALLOW_THREADS;
        PyObject *results = PyTuple_New((Py_ssize_t)num_variants);
        for (size_t i = 0; results != NULL && i < num_variants; i++)
            PyTuple_SET_ITEM(results, (Py_ssize_t)i, result_of(variants + i, block.num_models));
        result = Py_BuildValue("(ON)", digests, results);
    }
    for (size_t i = 0; variants != NULL && i < num_variants; i++) {
        if (i < num_taken) release_place(&variants[i].out);
        PyMem_RawFree(variants[i].weights);
        PyMem_RawFree(variants[i].num_outliers);
        Py_XDECREF(variants[i].digests);
    }
    PyMem_RawFree(variants);
    Py_XDECREF(digests);
    PyBuffer_Release(&scratch.view);
    return finished(&block, result, failed, error);
}

#endif
