/* A block of several sources, read from memory or from files one piece at a time. */
#ifndef OUTLIERMERGE_BLOCK_H
#define OUTLIERMERGE_BLOCK_H

#include "places.h"
#include "xxh3.h"

/* A piece has one digest (its size is PIECE_ELEMENTS of checksum.py) and fits in a core's L2 cache. A row holds one step of a piece in float32
 * and fits in the L1 cache. Rows are more than a page apart, so that they do not evict one another
 * from the cache. */
enum { PIECE = 65536, STEP = 1024, ROW = STEP + 64, EXTRA_ROWS = 3, MAX_SOURCES = 4096 };

/* Direct writes, which bypass the page cache, write whole pages, and at least DIRECT_BYTES. */
enum { PAGE = 4096, DIRECT_BYTES = 1 << 18 };

typedef struct {
    Place *places;
    size_t num_sources, num_models, num_elements;
    size_t failed; /* index of the source that could not be read */
    const char **data; /* for each source, where the current piece begins */
    char *scratch;     /* pieces that are read from files */
    Py_buffer digests; /* of each source's pieces (S, pieces); not wanted if buf is NULL */
    void *memory;
    float *base;  /* subtracted from the models: zeros where there is no base */
    float *added; /* added at the end: the base, or -0, which changes no value */
    float *rows;  /* one for each model, and EXTRA_ROWS more */
} Block;

static void release_some(Block *block, size_t num_places) {
    for (size_t i = 0; i < num_places; i++) release_place(block->places + i);
    if (block->digests.buf != NULL) PyBuffer_Release(&block->digests);
    PyMem_RawFree(block->places);
    PyMem_RawFree(block->data);
    PyMem_RawFree(block->scratch);
    PyMem_RawFree(block->memory);
}

static void release(Block *block) { release_some(block, block->num_sources); }

/* The converter for "O&" of PyArg_ParseTuple. It parses (codes, sources, num_elements, is_delta [,
 * digests]). */
static int take(PyObject *tuple, void *target) {
    Block *block = target;
    const char *codes;
    Py_ssize_t num_codes, num_elements;
    PyObject *sources;
    int is_delta, has_files = 0;
    if (tuple == NULL) { /* called to clean up: a later argument was wrong */
        release(block);
        return 1;
    }
    Py_buffer digests = {0};
    if (!PyArg_ParseTuple(tuple, "y#O!np|w*", &codes, &num_codes, &PyTuple_Type, &sources,
                          &num_elements, &is_delta, &digests))
        return 0;
    if (digests.buf != NULL && (num_elements < 0 || (size_t)digests.len < (size_t)num_codes *
                                (((size_t)num_elements + PIECE - 1) / PIECE) * DIGEST_BYTES)) {
        PyBuffer_Release(&digests);
        PyErr_SetString(PyExc_ValueError, "a buffer for digests is too short");
        return 0;
    }
    if (PyTuple_GET_SIZE(sources) != num_codes || num_codes < 1 + is_delta ||
        num_codes > MAX_SOURCES || num_elements < 0) {
        if (digests.buf != NULL) PyBuffer_Release(&digests);
        PyErr_SetString(PyExc_ValueError, "a source for each code is needed");
        return 0;
    }
    size_t num_sources = (size_t)num_codes, num_models = num_sources - (size_t)is_delta;
    *block = (Block){.num_sources = num_sources, .num_models = num_models,
                     .num_elements = (size_t)num_elements, .digests = digests};
    block->places = PyMem_RawCalloc(num_sources, sizeof *block->places);
    block->data = PyMem_RawCalloc(num_sources, sizeof *block->data);
    block->memory = PyMem_RawMalloc((2 + num_models + EXTRA_ROWS) * ROW * sizeof(float) + 64);
    if (block->places == NULL || block->data == NULL || block->memory == NULL) {
        release_some(block, 0);
        PyErr_NoMemory();
        return 0;
    }
    for (size_t i = 0; i < num_sources; i++) {
        if (!take_place(block->places + i, PyTuple_GET_ITEM(sources, (Py_ssize_t)i), codes[i],
                        block->num_elements, PyBUF_SIMPLE)) {
            release_some(block, i);
            return 0;
        }
        has_files |= !in_memory(block->places + i);
    }
    size_t longest = least(PIECE, block->num_elements) * sizeof(float);
    if (has_files && (block->scratch = PyMem_RawMalloc(num_sources * longest + 1)) == NULL) {
        release(block);
        PyErr_NoMemory();
        return 0;
    }
    block->base = (float *)(((uintptr_t)block->memory + 63) & ~(uintptr_t)63);
    block->added = is_delta ? block->base : block->base + ROW;
    block->rows = block->base + 2 * ROW;
    for (size_t i = 0; i < STEP; i++) {
        block->base[i] = 0.0f;
        block->base[ROW + i] = -0.0f;
    }
    return Py_CLEANUP_SUPPORTED;
}

static int write_bytes(int file, const char *from, size_t left, int64_t position) {
    while (left > 0) {
        ssize_t put = pwrite(file, from, left, (off_t)position);
        if (put <= 0) {
            if (put < 0 && errno == EINTR) continue;
            if (put == 0) errno = EIO; /* nothing was written, and trying again might never end */
            return 0;
        }
        from += put;
        position += put;
        left -= (size_t)put;
    }
    return 1;
}

/* The caller's memory for outputs before they are written to files. The caller reuses it, because
 * getting fresh pages from the system takes as long as writing them. */
typedef struct {
    Py_buffer view;
    size_t used;
} Scratch;

/* Return memory for a place's elements, or NULL. Its offset within a page equals the offset in the
 * file, so that direct writes can write whole pages. */
static char *take_room(Scratch *scratch, const Place *place, size_t num) {
    size_t needed = piece_bytes(place, num) + 2 * PAGE;
    uintptr_t memory = (uintptr_t)scratch->view.buf + scratch->used;
    if ((size_t)scratch->view.len - scratch->used < needed) {
        PyErr_SetString(PyExc_ValueError, "scratch is too small");
        return NULL;
    }
    scratch->used += needed;
    memory = (memory + PAGE - 1) & ~(uintptr_t)(PAGE - 1);
    return (char *)memory + place->position % PAGE;
}

/* Write all of a place's elements, from memory with the same offset within a page. */
static int write_all(const Place *place, size_t num, const char *from) {
    size_t num_bytes = piece_bytes(place, num);
    size_t head = (size_t)((PAGE - place->position % PAGE) % PAGE);
    if (place->direct < 0 || num_bytes < head + DIRECT_BYTES)
        return write_bytes(place->file, from, num_bytes, place->position);
    size_t whole = (num_bytes - head) / PAGE * PAGE, tail = num_bytes - head - whole;
    int64_t middle = place->position + (int64_t)head;
    int done = write_bytes(place->direct, from + head, whole, middle);
    if (!done && errno == EINVAL) /* this file system demands a larger alignment than a page */
        done = write_bytes(place->file, from + head, whole, middle);
    return done && write_bytes(place->file, from, head, place->position) &&
           write_bytes(place->file, from + head + whole, tail, middle + (int64_t)whole);
}

/* Read a piece of one source to memory. */
static int fetch_source(Block *block, size_t source, size_t start, size_t num) {
    const Place *place = block->places + source;
    if (in_memory(place)) {
        block->data[source] = (const char *)place->view.buf + piece_bytes(place, start);
        return 1;
    }
    char *into = block->scratch + source * least(PIECE, block->num_elements) * sizeof(float);
    block->data[source] = into;
    return read_all(place, (int64_t)start, num, into);
}

/* Pieces of SHORT_BYTES or fewer have no digest. */
static void digest(const Place *place, const char *data, size_t num, uint8_t *to) {
    if (piece_bytes(place, num) > SHORT_BYTES) xxh3_128(data, piece_bytes(place, num), to);
}

static uint8_t *digest_in(PyObject *bytes, size_t piece) {
    return (uint8_t *)PyBytes_AS_STRING(bytes) + piece * DIGEST_BYTES;
}

static int fetch(Block *block, size_t start, size_t num) {
    size_t num_pieces = (block->num_elements + PIECE - 1) / PIECE;
    for (size_t source = 0; source < block->num_sources; source++) {
        if (!fetch_source(block, source, start, num)) {
            block->failed = source;
            return 0;
        }
        if (block->digests.buf != NULL)
            digest(block->places + source, block->data[source], num,
                   (uint8_t *)block->digests.buf +
                       (source * num_pieces + start / PIECE) * DIGEST_BYTES);
    }
    return 1;
}

/* Release the block and return `result`, or raise if a place failed. */
static PyObject *finished(Block *block, PyObject *result, int failed, int error) {
    size_t place = block->failed;
    release(block);
    if (failed) {
        Py_CLEAR(result);
        raise_failure(error, place);
    }
    return result;
}

static const char *at(const Block *block, size_t source, size_t element) {
    return block->data[source] + piece_bytes(block->places + source, element);
}

static size_t source_of(const Block *block, size_t model) {
    return model + block->num_sources - block->num_models;
}

/* `start` counts elements from the beginning of the piece. */
static void load_base(const Block *block, size_t start, size_t num) {
    if (block->num_models < block->num_sources)
        load_row(block->places[0].code, at(block, 0, start), block->base, num);
}

/* Return a row with a model's task vector, or its weights. */
static float *load_model(const Block *block, size_t model, size_t start, size_t num) {
    float *row = block->rows + model * ROW;
    size_t source = source_of(block, model);
    load_delta(block->places[source].code, at(block, source, start), block->base, row, num);
    return row;
}

#endif
