/* The Python module of the kernels. They run without the GIL.
 *
 * A block is (codes, sources, num_elements, is_delta): for each source the code of its dtype (b
 * bfloat16, e float16, f float32), and a buffer or (file descriptor, position). With is_delta the
 * first source is the base, which is subtracted from the models. A fifth entry is optional: a
 * writable buffer for the digests of each source's pieces (S, pieces, 16 bytes). Failed reads and
 * writes raise OSError(errno, text, place) or EOFError(text, place); place is the index of the
 * source, or the number of sources plus the index of the output. Reads and writes that are
 * interrupted or done in part are continued. setup.py compiles this file for several generations of
 * processors. */
#include "computed.h"
#include "distribution_calls.h"
#include "drawn_calls.h"
#include "gram.h"
#include "measure.h"
#include "merge.h"
#include "spread.h"

static int are_finite(char code, const void *values, size_t num) {
    uint32_t most = 0;
    FOR_DTYPE(code, for (size_t i = 0; i < num; i++) {
        uint32_t size = bits_of(load(CODE, values, i)) & MAGNITUDE;
        most = size > most ? size : most;
    });
    return most < INFINITE;
}

PyDoc_STRVAR(copy_doc,
             "copy(code, source, num_elements, out[, scratch]) -> (is_finite, digests)\n\n"
             "Copy elements from a buffer or (file descriptor, position) to another, with a digest "
             "of 16 bytes for each piece of 65,536 elements. scratch is as for merge.");

static PyObject *py_copy(PyObject *module, PyObject *args) {
    int code, failed = 0, writes = 0, error = 0, is_finite = 1;
    Py_ssize_t num_elements;
    PyObject *source, *target;
    Place from, to;
    Scratch scratch = {0};
    if (!PyArg_ParseTuple(args, "COnO|w*", &code, &source, &num_elements, &target, &scratch.view))
        return NULL;
    size_t num_all = num_elements < 0 ? 0 : (size_t)num_elements;
    if (num_elements < 0) PyErr_SetString(PyExc_ValueError, "a number of elements is negative");
    if (num_elements < 0 || !take_place(&from, source, code, num_all, PyBUF_SIMPLE)) {
        PyBuffer_Release(&scratch.view);
        return NULL;
    }
    if (!take_place(&to, target, code, num_all, PyBUF_WRITABLE)) {
        release_place(&from);
        PyBuffer_Release(&scratch.view);
        return NULL;
    }
    char *all = to.file >= 0 ? take_room(&scratch, &to, num_all) : to.view.buf;
    PyObject *result = NULL;
    PyObject *digests = PyBytes_FromStringAndSize(
        NULL, (Py_ssize_t)((num_all + PIECE - 1) / PIECE * DIGEST_BYTES));
    if (!PyErr_Occurred()) {
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < num_all && !failed; start += PIECE) {
            size_t num = least(PIECE, num_all - start), first = piece_bytes(&from, start);
            char *data = all + first;
            if (in_memory(&from))
                memmove(data, (const char *)from.view.buf + first, piece_bytes(&from, num));
            else
                failed = !read_all(&from, (int64_t)start, num, data);
            error = errno;
            if (failed) break;
            is_finite &= are_finite((char)code, data, num);
            digest(&from, data, num, digest_in(digests, start / PIECE));
        }
        if (!failed && to.file >= 0) {
            failed = writes = !write_all(&to, num_all, all);
            error = errno;
        }
        Py_END_ALLOW_THREADS;
        if (failed)
            raise_failure(error, (size_t)writes);
        else
            result = Py_BuildValue("(NO)", PyBool_FromLong(is_finite), digests);
    }
    Py_XDECREF(digests);
    PyBuffer_Release(&scratch.view);
    release_place(&from);
    release_place(&to);
    return result;
}

PyDoc_STRVAR(all_finite_doc,
             "all_finite(code, buffer, num_elements) -> bool\n\n"
             "Tell whether no value is infinite or NaN.");

static PyObject *py_all_finite(PyObject *module, PyObject *args) {
    int code;
    Py_ssize_t num_elements;
    Py_buffer view;
    if (!PyArg_ParseTuple(args, "Cy*n", &code, &view, &num_elements)) return NULL;
    size_t num = (size_t)num_elements;
    int fits = is_known(code) && num_elements >= 0 &&
               (size_t)view.len / item_bytes((char)code) >= num;
    int is_finite = 1;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS;
        is_finite = are_finite((char)code, view.buf, num);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&view);
    if (!fits) return PyErr_Format(PyExc_ValueError, "too short, or of an unknown dtype");
    return PyBool_FromLong(is_finite);
}

PyDoc_STRVAR(equal_doc, "equal(a, b) -> bool\n\nTell whether two buffers hold the same bytes.");

static PyObject *py_equal(PyObject *module, PyObject *args) {
    Py_buffer a, b;
    int is_equal;
    if (!PyArg_ParseTuple(args, "y*y*", &a, &b)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    is_equal = a.len == b.len && memcmp(a.buf, b.buf, (size_t)a.len) == 0;
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&a);
    PyBuffer_Release(&b);
    return PyBool_FromLong(is_equal);
}

PyDoc_STRVAR(level_doc, "level() -> int\n\nThe generation of this processor, x86-64-v1 to v4; 0 for others.");

static PyObject *py_level(PyObject *module, PyObject *args) {
    long level = 0;
#ifdef __x86_64__
    level = 1;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("avx"))
        level = 3;
    if (level == 3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        level = 4;
#endif
    return PyLong_FromLong(level);
}

static PyMethodDef functions[] = {
    {"moments", py_moments, METH_VARARGS, moments_doc},
    {"magnitudes", py_magnitudes, METH_VARARGS, magnitudes_doc},
    {"histogram", py_histogram, METH_VARARGS, histogram_doc},
    {"drawn", py_drawn, METH_VARARGS, drawn_doc},
    {"variances", py_variances, METH_VARARGS, variances_doc},
    {"squares", py_squares, METH_VARARGS, squares_doc},
    {"scores", py_scores, METH_VARARGS, scores_doc},
    {"importance", py_importance, METH_VARARGS, importance_doc},
    {"overlap", py_overlap, METH_VARARGS, overlap_doc},
    {"gram", py_gram, METH_VARARGS, gram_doc},
    {"tally", py_tally, METH_VARARGS, tally_doc},
    {"filtered", py_filtered, METH_VARARGS, filtered_doc},
    {"patterns", py_patterns, METH_VARARGS, patterns_doc},
    {"tally_patterns", py_tally_patterns, METH_VARARGS, tally_patterns_doc},
    {"filtered_patterns", py_filtered_patterns, METH_VARARGS, filtered_patterns_doc},
    {"norms", py_norms, METH_VARARGS, norms_doc},
    {"methods", py_methods, METH_NOARGS, methods_doc},
    {"merge", py_merge, METH_VARARGS, merge_doc},
    {"copy", py_copy, METH_VARARGS, copy_doc},
    {"all_finite", py_all_finite, METH_VARARGS, all_finite_doc},
    {"equal", py_equal, METH_VARARGS, equal_doc},
    {"level", py_level, METH_NOARGS, level_doc},
    {NULL, NULL, 0, NULL},
};

#define NAME_OF(name) #name
#define INIT_OF(name) PyInit_##name
#define INIT(name) INIT_OF(name)
#define NAME(name) NAME_OF(name)

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, NAME(MODULE), "Fused kernels on storage dtypes.", -1, functions,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC INIT(MODULE)(void) { return PyModule_Create(&definition); }
