/* What is kept of the rows around a piece, where elements are kept at random by rank.
 *
 * Rows do not end where pieces end. A row is decided as a whole, at its first element in a block,
 * and what lies in the next piece is carried over. So where blocks are cut changes nothing. */
#ifndef OUTLIERMERGE_DRAWN_H
#define OUTLIERMERGE_DRAWN_H

#include "block.h"
#include "ranks.h"
#include "statistics.h"

/* How a model's elements are kept, for all models: (M,). */
typedef struct {
    const float *chances, *epsilons;
    const uint64_t *keys; /* (M, 2) */
    int divide;           /* what is kept by the probability */
} Choice;

typedef struct {
    size_t elements, length; /* of a row; as many of them are ranked together: a strided part */
    uint64_t first;          /* the block's first element in the tensor */
    uint64_t carried;        /* where the row that was decided last begins; -1 at first */
    float *values;           /* what is kept of the piece (M, PIECE) */
    float *carry, *base;     /* what is kept of a row across pieces (M, elements); its base */
    char *stored;            /* such a row as it is stored */
    Ranked row;
} Rows;

static void free_rows(Rows *rows) {
    PyMem_RawFree(rows->values);
    PyMem_RawFree(rows->stored);
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
        if (block->places[i].file < 0 && (first % elements || parts % elements)) {
            PyErr_SetString(PyExc_ValueError, "a buffer does not hold whole rows");
            return 0;
        }
    rows->values = PyMem_RawMalloc((models * (PIECE + elements) + elements) * sizeof(float));
    rows->stored = PyMem_RawMalloc(elements * sizeof(float));
    if (rows->values == NULL || rows->stored == NULL || !take_row(&rows->row, length)) {
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
    int64_t bytes = start * (int64_t)item_bytes(place->code);
    if (place->file < 0) return (const char *)place->view.buf + bytes;
    Place moved = *place;
    moved.position += bytes;
    if (read_all(&moved, 0, num, rows->stored)) return rows->stored;
    block->failed = source;
    return NULL;
}

static void keep_some(Rows *rows, const Choice *choice, size_t model, float *values,
                      uint64_t place) {
    const double chance = choice->chances[model], epsilon = choice->epsilons[model];
    const uint64_t *keys = choice->keys + 2 * model;
    if (chance <= 0) {
        memset(values, 0, rows->elements * sizeof *values);
    } else if (chance >= 1 || rows->length < 2) {
        float factor = choice->divide ? (float)(1 / chance) : 1.0f;
        keep_at_random(values, keys, place, limit_of(chance), factor, rows->elements);
    } else {
        size_t stride = rows->elements / rows->length;
        rows->row.least = chance - epsilon;
        rows->row.range = 2 * epsilon;
        for (size_t i = 0; i < stride; i++)
            keep_by_rank(&rows->row, values + i, stride, keys, place + i, choice->divide);
    }
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

/* Sums of magnitudes of a row of each model (M, 2): of all, and of what is kept. */
typedef struct {
    double *sums; /* of the rows that begin in the block, one after the other; NULL if not wanted */
    float magnitudes[STEP];
} Norms;

static double norm_of(const float *values, size_t num, float *magnitudes) {
    Lanes lanes = {{{0}}};
    for (size_t i = 0; i < num; i += STEP) {
        size_t step = least(STEP, num - i);
        for (size_t k = 0; k < step; k++) magnitudes[k] = fabsf(values[i + k]);
        add_row(&lanes, magnitudes, step);
    }
    return sum_of(lanes);
}

/* Write what is kept of a piece that has been read to rows->values. */
static int keep_of_piece(Block *block, Rows *rows, const Choice *choice, Norms *norms,
                         size_t piece, size_t num) {
    const size_t models = block->num_models, elements = rows->elements;
    const uint64_t begin = rows->first + piece, end = begin + num;
    for (uint64_t place = begin - begin % elements; place < end; place += elements) {
        int64_t start = (int64_t)(place - rows->first); /* below 0 before the block */
        int is_inside = place >= begin && place + elements <= end;
        float *values = is_inside ? rows->values + (place - begin) : rows->carry;
        size_t apart = is_inside ? PIECE : elements;
        if (is_inside || rows->carried != place) {
            if (!load_whole_row(block, rows, start, piece, num, values, apart)) return 0;
            for (size_t model = 0; model < models; model++) {
                float *own = values + model * apart;
                double *sums = start >= 0 ? norms->sums : NULL;
                if (sums) sums[2 * model] = norm_of(own, elements, norms->magnitudes);
                keep_some(rows, choice, model, own, place);
                if (sums) sums[2 * model + 1] = norm_of(own, elements, norms->magnitudes);
            }
            if (norms->sums && start >= 0) norms->sums += 2 * models;
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
