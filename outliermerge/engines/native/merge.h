/* Merges of a block, in one or several ways, into memory or files. */
#ifndef OUTLIERMERGE_MERGE_H
#define OUTLIERMERGE_MERGE_H

#include "methods.h"

/* A merge method, its arguments, and where its output goes. */
typedef struct {
    const Method *method;
    Call call;
    float *numbers; /* its scalars and vectors */
    uint64_t *keys;
    Rows rows;
    Py_buffer kept;
    uint64_t first; /* the block's first element in the tensor */
    int is_finite;
    uint64_t rounding[2]; /* keys of random numbers to round by */
    int is_stochastic;
    Place out;
    char *stored; /* the output: in the caller's buffer, or in scratch memory until written */
    PyObject *digests;
} Variant;

/* Find a method by its name, and check the count of its scalars and vectors. */
static const Method *method_of(const char *name, size_t scalar_bytes, size_t vector_bytes,
                               size_t num_models) {
    const Method *method = find_method(name);
    if (method == NULL)
        return PyErr_Format(PyExc_ValueError, "no method is called %s", name), NULL;
    if (scalar_bytes == method->num_scalars * sizeof(float) &&
        vector_bytes == method->num_vectors * num_models * sizeof(float))
        return method;
    PyErr_Format(PyExc_ValueError, "%s takes %zu scalars and %zu vectors of %zu, as float32", name,
                 method->num_scalars, method->num_vectors, num_models);
    return NULL;
}

/* Parse (method, scalars, vectors, code, out[, keys, start, row, length[, kept[, rounding]]]). */
static int take_variant(Variant *variant, PyObject *tuple, const Block *block, Scratch *scratch) {
    const char *name, *scalars, *vectors, *keys = NULL, *rounding = NULL;
    Py_ssize_t scalar_bytes, vector_bytes, key_bytes = 0, row = 0, length = 0, rounding_bytes = 0;
    unsigned long long first = 0;
    PyObject *out;
    int code;
    size_t models = block->num_models, num_pieces = (block->num_elements + PIECE - 1) / PIECE;
    variant->is_finite = 1;
    if (!PyArg_ParseTuple(tuple, "sy#y#CO|y#Knnz*y#", &name, &scalars, &scalar_bytes, &vectors,
                          &vector_bytes, &code, &out, &keys, &key_bytes, &first,
                          &row, &length, &variant->kept, &rounding, &rounding_bytes))
        return 0;
    if (rounding != NULL && rounding_bytes != sizeof variant->rounding)
        return PyErr_SetString(PyExc_ValueError, "rounding takes two keys"), 0;
    variant->method = method_of(name, (size_t)scalar_bytes, (size_t)vector_bytes, models);
    if (variant->method == NULL) return 0;
    if (!take_place(&variant->out, out, code, block->num_elements, PyBUF_WRITABLE)) return 0;
    variant->first = first;
    variant->keys = PyMem_RawCalloc(2 * models, sizeof(uint64_t));
    variant->numbers = PyMem_RawMalloc((size_t)(scalar_bytes + vector_bytes) + 1);
    variant->call.counts = PyMem_RawCalloc(models, sizeof(uint64_t));
    variant->stored = variant->out.file < 0 ? variant->out.view.buf
                                            : take_room(scratch, &variant->out, block->num_elements);
    variant->digests =
        PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(num_pieces * DIGEST_BYTES));
    if (variant->keys == NULL || variant->numbers == NULL || variant->call.counts == NULL || variant->stored == NULL ||
        variant->digests == NULL) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        release_place(&variant->out);
        return 0;
    }
    if (!takes_kept(&variant->call.kept, &variant->kept, block, first)) {
        release_place(&variant->out);
        return 0;
    }
    if (variant->method->prepare != NULL && variant->kept.buf == NULL) {
        if (!take_rows(&variant->rows, block, (size_t)row, (size_t)length, first)) {
            release_place(&variant->out);
            return 0;
        }
        variant->call.rows = &variant->rows;
    }
    memcpy(variant->numbers, scalars, (size_t)scalar_bytes);
    memcpy((char *)variant->numbers + scalar_bytes, vectors, (size_t)vector_bytes);
    variant->is_stochastic = rounding != NULL && code != FLOAT32;
    if (variant->is_stochastic) memcpy(variant->rounding, rounding, sizeof variant->rounding);
    if (keys != NULL)
        memcpy(variant->keys, keys, least((size_t)key_bytes, 2 * models * sizeof(uint64_t)));
    variant->call.keys = variant->keys;
    variant->call.scalars = variant->numbers;
    variant->call.vectors = variant->numbers + variant->method->num_scalars;
    return 1;
}

/* Merge a piece that has been read, and compute the digest of the output. Returns 0 if more had to
 * be read and could not. */
static int merge_piece(Block *block, Variant *variant, size_t start, size_t num) {
    const Place *out = &variant->out;
    char *stored = variant->stored + piece_bytes(out, start);
    float *merged_row = block->rows + block->num_models * ROW;
    if (variant->call.rows && !variant->method->prepare(block, &variant->call, start, num)) return 0;
    for (size_t i = 0; i < num; i += STEP) {
        size_t step = least(STEP, num - i);
        load_base(block, i, step);
        variant->call.place = variant->first + start + i;
        variant->method->merge(block, &variant->call, i, step, merged_row);
        const float *added = block->added;
        if (variant->is_stochastic) {
            for (size_t k = 0; k < step; k++) merged_row[k] += added[k];
            round_row(out->code, merged_row, variant->rounding, variant->call.place, step);
            added = block->base + ROW; /* -0 */
        }
        variant->is_finite &=
            store_row(out->code, merged_row, added, stored + piece_bytes(out, i), step);
    }
    digest(out, stored, num, digest_in(variant->digests, start / PIECE));
    return 1;
}

/* (is_finite, counts, digests) */
static PyObject *result_of(const Variant *variant, size_t num_models) {
    PyObject *counts = PyTuple_New((Py_ssize_t)num_models);
    for (size_t model = 0; counts != NULL && model < num_models; model++)
        PyTuple_SET_ITEM(counts, (Py_ssize_t)model,
                         PyLong_FromUnsignedLongLong(variant->call.counts[model]));
    return Py_BuildValue("(NNO)", PyBool_FromLong(variant->is_finite), counts, variant->digests);
}

PyDoc_STRVAR(merge_doc,
             "merge(block, variants[, scratch]) -> (digests, ((is_finite, counts, digests), ...))\n\n"
             "Merge a block in one or several ways. A variant is (method, scalars, vectors, code, out\n"
             "[, keys, start, row, length[, kept[, rounding]]]): keys are two uint64 for each model, which random numbers\n"
             "are made of, and start is the block's first element in the tensor; row and length are\n"
             "as of drawn, for a method that goes by rows; kept, for della, is what drawn wrote, or None;\n"
             "rounding are two uint64 of random numbers, by which the output is rounded up or down;\n"
             "scalars and vectors are bytes of float32, as many scalars, and as many vectors of a\n"
             "number for each model, as methods() tells; out is a writable buffer, or (file descriptor, position[, descriptor of the same file for\n"
             "direct writes]), of the dtype of code. scratch is a writable buffer with room for all\n"
             "outputs that go to files, and two pages more for each.\n"
             "is_finite tells of the output, and so of all sources; counts are what the\n"
             "method counted of each model; digests are 16 bytes for each piece of 65,536 elements, of\n"
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
            for (size_t i = 0; i < num_variants && !failed; i++)
                failed = !merge_piece(&block, variants + i, start, num);
            error = errno;
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
        free_rows(&variants[i].rows);
        PyBuffer_Release(&variants[i].kept);
        PyMem_RawFree(variants[i].keys);
        PyMem_RawFree(variants[i].numbers);
        PyMem_RawFree(variants[i].call.counts);
        Py_XDECREF(variants[i].digests);
    }
    PyMem_RawFree(variants);
    Py_XDECREF(digests);
    PyBuffer_Release(&scratch.view);
    return finished(&block, result, failed, error);
}

#endif
