/* The rows around a piece, for methods that go by rows.
 *
 * Rows do not end where pieces end. A row is worked on as a whole, at its first element in a block,
 * and what lies in the next piece is carried over. So where blocks are cut changes nothing. */
#ifndef OUTLIERMERGE_WHOLE_ROWS_H
#define OUTLIERMERGE_WHOLE_ROWS_H

#include "block.h"
#include "ranks.h"

typedef struct {
    size_t elements, length; /* of a row; as many of them are ranked together: a strided part */
    uint64_t first;          /* the block's first element in the tensor */
    uint64_t carried;        /* where the row that was decided last begins; -1 at first */
    float *values;           /* what is made of the piece (M, PIECE) */
    float *carry, *base;     /* what is made of a row across pieces (M, elements); its base */
    char *stored;            /* such a row as it is stored */
    double *wide;            /* space for two rows in double */
    Ranked row;
} Rows;

static void free_rows(Rows *rows) {
    PyMem_RawFree(rows->values);
    PyMem_RawFree(rows->stored);
    PyMem_RawFree(rows->wide);
    PyMem_RawFree(rows->row.memory);
    *rows = (Rows){0};
}

/* Take (elements, length) of rows, and allocate what they need. */
static int take_rows(Rows *rows, const Block *block, size_t elements, size_t length,
                     uint64_t first) {
    size_t models = block->num_models, parts = block->num_elements + first % (elements + !elements);
    *rows = (Rows){.elements = elements, .length = length, .first = first, .carried = UINT64_MAX};
    if (elements == 0 || length == 0 || elements % length != 0 || elements > UINT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "a row has no such number of elements");
        return 0;
    }
    for (size_t i = 0; i < block->num_sources; i++)
        if (in_memory(block->places + i) && (first % elements || parts % elements)) {
            PyErr_SetString(PyExc_ValueError, "a buffer does not hold whole rows");
            return 0;
        }
    rows->values = PyMem_RawMalloc((models * (PIECE + elements) + elements) * sizeof(float));
    rows->stored = PyMem_RawMalloc(elements * sizeof(float));
    rows->wide = PyMem_RawMalloc(2 * elements * sizeof(double));
    if (rows->values == NULL || rows->stored == NULL || rows->wide == NULL ||
        !take_row(&rows->row, length)) {
        free_rows(rows);
        PyErr_NoMemory();
        return 0;
    }
    rows->carry = rows->values + models * PIECE;
    rows->base = rows->carry + models * elements;
    return 1;
}

/* Where a source's elements are, `start` counted from the block's beginning and maybe before it;
 * NULL if they cannot be read. The piece from `piece` on, of `num_piece`, has been read. */
static const char *stored_at(Block *block, Rows *rows, size_t source, int64_t start, size_t num,
                             size_t piece, size_t num_piece) {
    const Place *place = block->places + source;
    int64_t away = start - (int64_t)piece;
    if (away >= 0 && (size_t)away + num <= num_piece) return at(block, source, (size_t)away);
    if (in_memory(place))
        return (const char *)place->view.buf + start * (int64_t)item_bytes(place->code);
    if (read_all(place, start, num, rows->stored)) return rows->stored;
    block->failed = source;
    return NULL;
}

/* Load all models' task vectors of a row to `values`, `apart` from one another. */
static int load_whole_row(Block *block, Rows *rows, int64_t start, size_t piece, size_t num_piece,
                          float *values, size_t apart) {
    size_t num = rows->elements;
    int is_delta = block->num_sources > block->num_models;
    for (size_t source = 0; source < block->num_sources; source++) {
        const char *from = stored_at(block, rows, source, start, num, piece, num_piece);
        if (from == NULL) return 0;
        char code = block->places[source].code;
        float *to = values + (source - (size_t)is_delta) * apart;
        if (!is_delta)
            load_row(code, from, to, num);
        else if (source == 0)
            load_row(code, from, rows->base, num);
        else
            load_delta(code, from, rows->base, to, num);
    }
    return 1;
}

/* What is done with a row: its values, of each model (M, elements), are `apart` from one another and
 * are written over. */
typedef struct {
    float *values;
    size_t apart, models;
    uint64_t place; /* of its first element in the tensor */
    int begins;     /* whether it begins in the block */
} WholeRow;

typedef void (*OnRow)(Rows *rows, const WholeRow *row, void *with);

/* Work on the rows of a piece that has been read; rows->values is then what is made of it. */
static int work_on_rows(Block *block, Rows *rows, OnRow on_row, void *with, size_t piece,
                        size_t num) {
    const size_t models = block->num_models, elements = rows->elements;
    const uint64_t begin = rows->first + piece, end = begin + num;
    for (uint64_t place = begin - begin % elements; place < end; place += elements) {
        int64_t start = (int64_t)(place - rows->first); /* below 0 before the block */
        int is_inside = place >= begin && place + elements <= end;
        float *values = is_inside ? rows->values + (place - begin) : rows->carry;
        const WholeRow row = {values, is_inside ? PIECE : elements, models, place, start >= 0};
        if (is_inside || rows->carried != place) {
            if (!load_whole_row(block, rows, start, piece, num, values, row.apart)) return 0;
            on_row(rows, &row, with);
        }
        if (is_inside) continue;
        rows->carried = place;
        uint64_t from = place > begin ? place : begin;
        uint64_t to = place + elements < end ? place + elements : end;
        for (size_t model = 0; model < models; model++)
            memcpy(rows->values + model * PIECE + (from - begin),
                   rows->carry + model * elements + (from - place), (to - from) * sizeof(float));
    }
    return 1;
}

#endif
