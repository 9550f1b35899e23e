/* Where elements are: in memory, in a file, or computed of what is in files (computed.h). */
#ifndef OUTLIERMERGE_PLACES_H
#define OUTLIERMERGE_PLACES_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <unistd.h>

#include "rows.h"

typedef struct Computed Computed;

typedef struct {
    char code;
    int file;   /* -1 for memory, and for what is computed */
    int direct; /* the same file, opened for direct writes; -1 where it is not */
    int64_t position;
    Py_buffer view;
    Computed *computed; /* NULL for what is stored */
} Place;

static Computed *take_computed(PyObject *from);
static void release_computed(Computed *computed);
static int compute(const Computed *computed, int64_t start, size_t num, float *into);

INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

INLINE int is_known(int code) { return code == BFLOAT16 || code == FLOAT16 || code == FLOAT32; }

INLINE int in_memory(const Place *place) { return place->file < 0 && place->computed == NULL; }

/* Parse a buffer, a tuple (file descriptor, position[, descriptor for direct writes]), or what
 * take_computed takes, which has room for num_elements elements of a dtype. */
static int take_place(Place *place, PyObject *from, int code, size_t num_elements, int flags) {
    place->code = (char)code;
    place->file = place->direct = -1;
    place->computed = NULL;
    if (!is_known(code)) {
        PyErr_SetString(PyExc_ValueError, "an unknown dtype");
        return 0;
    }
    if (PyTuple_Check(from) && PyTuple_GET_SIZE(from) && PyUnicode_Check(PyTuple_GET_ITEM(from, 0))) {
        if (code == FLOAT32 && flags == PyBUF_SIMPLE)
            return (place->computed = take_computed(from)) != NULL;
        PyErr_SetString(PyExc_ValueError, "values are computed as float32, to be read");
        return 0;
    }
    if (PyTuple_Check(from)) {
        long long position;
        if (!PyArg_ParseTuple(from, "iL|i", &place->file, &position, &place->direct)) return 0;
        place->position = position;
        if (place->file >= 0 && position >= 0) return 1;
        place->file = -1;
        PyErr_SetString(PyExc_ValueError, "a file descriptor or a position is negative");
        return 0;
    }
    if (PyObject_GetBuffer(from, &place->view, flags)) return 0;
    if ((size_t)place->view.len / item_bytes(place->code) < num_elements) {
        PyBuffer_Release(&place->view);
        PyErr_SetString(PyExc_ValueError, "a buffer is too short");
        return 0;
    }
    return 1;
}

static void release_place(Place *place) {
    if (in_memory(place)) PyBuffer_Release(&place->view);
    if (place->computed != NULL) release_computed(place->computed);
}

static size_t piece_bytes(const Place *place, size_t num) { return num * item_bytes(place->code); }

static int read_bytes(int file, char *into, size_t left, int64_t position) {
    while (left > 0) {
        ssize_t got = pread(file, into, left, (off_t)position);
        if (got <= 0) {
            if (got < 0 && errno == EINTR) continue;
            if (got == 0) errno = 0;
            return 0;
        }
        into += got;
        position += got;
        left -= (size_t)got;
    }
    return 1;
}

/* Read elements of a place that is not in memory; `start` may be before the block's beginning. */
static int read_all(const Place *place, int64_t start, size_t num, char *into) {
    if (place->computed != NULL) return compute(place->computed, start, num, (float *)into);
    int64_t position = place->position + start * (int64_t)item_bytes(place->code);
    return read_bytes(place->file, into, piece_bytes(place, num), position);
}

/* Raise the error of a failed read or write; its last argument is the index of the place. */
static void raise_failure(int error, size_t place) {
    PyObject *type = error == 0 ? PyExc_EOFError : PyExc_OSError;
    PyObject *arguments = error == 0 ? Py_BuildValue("(sn)", "the file ends early", (Py_ssize_t)place)
                                     : Py_BuildValue("(isn)", error, strerror(error), (Py_ssize_t)place);
    if (arguments != NULL) PyErr_SetObject(type, arguments);
    Py_XDECREF(arguments);
}

#endif
