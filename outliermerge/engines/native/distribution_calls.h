/* Python's functions for the distribution of a source's elements: by rows, or by bit patterns. */
#ifndef OUTLIERMERGE_DISTRIBUTION_CALLS_H
#define OUTLIERMERGE_DISTRIBUTION_CALLS_H

#include "distribution.h"

static PyObject *told_tally(Tally tally) {
    tally.all.mean += tally.shift;
    return PyBytes_FromStringAndSize((const char *)&tally, offsetof(Tally, shift));
}

static PyObject *told_filtered(Filtered filtered) {
    filtered.kept.mean += filtered.kept_shift;
    filtered.without_small.mean += filtered.without_small_shift;
    return PyBytes_FromStringAndSize((const char *)&filtered, offsetof(Filtered, kept_shift));
}

/* Fill a row with a step of the source, minus the base where there is one. */
static void load_values(const Block *block, size_t start, size_t num, Row *row) {
    size_t source = block->num_sources - 1, whole = whole_lanes(num);
    const char *from = at(block, source, start);
    FOR_DTYPE(block->places[source].code,
              for (size_t i = 0; i < num; i++) row->values[i] = load(CODE, from, i));
    if (block->num_models < block->num_sources) {
        const char *base = at(block, 0, start);
        FOR_DTYPE(block->places[0].code,
                  for (size_t i = 0; i < num; i++) row->values[i] -= load(CODE, base, i));
    }
    for (size_t i = 0; i < whole; i++) {
        row->values[i] = i < num ? row->values[i] : 0;
        row->weights[i] = i < num ? 1 : 0;
    }
}

/* Fill a row with bit patterns and how often each occurs; returns whether any occurs. */
static int load_patterns(char code, const uint64_t *counts, size_t first, Row *row) {
    uint64_t any = 0;
    for (size_t i = 0; i < STEP; i++) any |= counts[first + i];
    if (!any) return 0;
    uint16_t patterns[STEP];
    for (size_t i = 0; i < STEP; i++) {
        patterns[i] = (uint16_t)(first + i);
        row->weights[i] = (double)counts[first + i];
    }
    FOR_DTYPE(code, for (size_t i = 0; i < STEP; i++) row->values[i] = load(CODE, patterns, i));
    return 1;
}

static void add_tables(uint64_t (*tables)[COUNTS], uint64_t *counts) {
    for (int table = 0; table < TABLES; table++)
        for (int i = 0; i < COUNTS; i++)
            if (tables[table][i])
                __atomic_fetch_add(counts + i, tables[table][i], __ATOMIC_RELAXED);
}

static int take_counts(Py_buffer *view, size_t num) {
    if ((size_t)view->len == num * sizeof(uint64_t)) return 1;
    PyErr_Format(PyExc_ValueError, "expected room for %zu counts", num);
    return 0;
}

/* Call a function with each row of a block; returns whether all could be read. */
INLINE int visit_rows(Block *block, void (*visit)(void *, Row *, size_t), void *into) {
    for (size_t start = 0; start < block->num_elements; start += PIECE) {
        size_t num = least(PIECE, block->num_elements - start);
        if (!fetch(block, start, num)) return 0;
        for (size_t i = 0; i < num; i += STEP) {
            Row row;
            load_values(block, i, least(STEP, num - i), &row);
            visit(into, &row, least(STEP, num - i));
        }
    }
    return 1;
}

typedef struct {
    Tally *into;
    double small;
} Tallying;

static void tally_visited(void *given, Row *row, size_t num) {
    Tallying *to = given;
    tally_row(to->into, row, to->small, num);
}

typedef struct {
    Filtered *into;
    Limits limits;
    uint64_t (*tables)[COUNTS];
} Filtering;

static void filter_visited(void *given, Row *row, size_t num) {
    Filtering *to = given;
    filter_row(to->into, row, to->limits, to->tables, num);
}

PyDoc_STRVAR(tally_doc,
             "tally(block, small) -> bytes\n\n"
             "Of the last source, less the first with is_delta, float64 (11): number, mean, sums "
             "of the powers 2 to 4 of what elements are away from it, least and greatest of the "
             "finite elements; how many are zero, below small in magnitude, not finite; the sum "
             "of magnitudes.");

static PyObject *py_tally(PyObject *module, PyObject *args) {
    Block block;
    Tally tally = {.all = NOTHING};
    double small;
    int failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O&d", take, &block, &small)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    failed = !visit_rows(&block, tally_visited, &(Tallying){&tally, small});
    error = errno;
    Py_END_ALLOW_THREADS;
    return finished(&block, told_tally(tally), failed, error);
}

PyDoc_STRVAR(filtered_doc,
             "filtered(block, (mean, low, high, deviation, small), counts) -> bytes\n\n"
             "Of the same elements, float64 (17): as tally's first seven of those from low to "
             "high, and of those that are not small either; how many are 2, 3 and 4 deviations "
             "away from the mean. counts, a writable buffer of 514 uint64, has bins of a 32nd "
             "deviation from -8 on, what lies below before them and what lies above behind. Any "
             "threads may add to it at once.");

static PyObject *py_filtered(PyObject *module, PyObject *args) {
    Block block;
    Limits limits;
    Filtered filtered = {.kept = NOTHING, .without_small = NOTHING};
    Py_buffer counts;
    uint64_t tables[TABLES][COUNTS] = {{0}};
    int failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O&(ddddd)w*", take, &block, &limits.mean, &limits.low,
                          &limits.high, &limits.deviation, &limits.small, &counts))
        return NULL;
    PyObject *result = NULL;
    if (take_counts(&counts, COUNTS)) {
        Py_BEGIN_ALLOW_THREADS;
        failed = !visit_rows(&block, filter_visited, &(Filtering){&filtered, limits, tables});
        error = errno;
        if (!failed) add_tables(tables, counts.buf);
        Py_END_ALLOW_THREADS;
        result = told_filtered(filtered);
    }
    PyBuffer_Release(&counts);
    return finished(&block, result, failed, error);
}

static void count_patterns(const char *data, size_t num, uint32_t *tables) {
    uint32_t *first = tables, *second = first + PATTERNS, *third = second + PATTERNS;
    uint32_t *fourth = third + PATTERNS;
    size_t i = 0;
    for (; i + 4 <= num; i += 4) {
        uint64_t four;
        memcpy(&four, data + 2 * i, 8);
        first[four & 0xFFFF]++;
        second[four >> 16 & 0xFFFF]++;
        third[four >> 32 & 0xFFFF]++;
        fourth[four >> 48]++;
    }
    for (; i < num; i++) {
        uint16_t one;
        memcpy(&one, data + 2 * i, 2);
        first[one]++;
    }
}

PyDoc_STRVAR(patterns_doc,
             "patterns(block, counts)\n\n"
             "Count the bit patterns of one source of a 16-bit dtype: counts is a writable buffer "
             "of 65,536 uint64. Any threads may add to it at once.");

static PyObject *py_patterns(PyObject *module, PyObject *args) {
    Block block;
    Py_buffer counts;
    int failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O&w*", take, &block, &counts)) return NULL;
    uint32_t *tables = PyMem_RawCalloc(TABLES * PATTERNS, sizeof *tables);
    int fits = take_counts(&counts, PATTERNS);
    if (fits && (block.num_sources > 1 || item_bytes(block.places[0].code) != 2 ||
                 block.num_elements > UINT32_MAX)) {
        PyErr_SetString(PyExc_ValueError, "expected one source of a 16-bit dtype");
        fits = 0;
    }
    if (tables == NULL) PyErr_NoMemory();
    if (fits && tables != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t num = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, num);
            error = errno;
            if (!failed) count_patterns(at(&block, 0, 0), num, tables);
        }
        uint64_t *into = counts.buf;
        for (size_t i = 0; i < PATTERNS && !failed; i++) {
            uint64_t sum = 0;
            for (size_t table = 0; table < TABLES; table++) sum += tables[table * PATTERNS + i];
            if (sum) __atomic_fetch_add(into + i, sum, __ATOMIC_RELAXED);
        }
        Py_END_ALLOW_THREADS;
    }
    PyMem_RawFree(tables);
    PyBuffer_Release(&counts);
    return finished(&block, PyErr_Occurred() ? NULL : Py_NewRef(Py_None), failed, error);
}

static int take_patterns(PyObject *args, const char *format, int *code, Py_buffer *patterns,
                         double *small, Limits *limits, Py_buffer *counts) {
    int taken = counts == NULL
                    ? PyArg_ParseTuple(args, format, code, patterns, small)
                    : PyArg_ParseTuple(args, format, code, patterns, &limits->mean, &limits->low,
                                       &limits->high, &limits->deviation, &limits->small, counts);
    if (!taken) return 0;
    if (!is_known(*code) || item_bytes((char)*code) != 2)
        PyErr_SetString(PyExc_ValueError, "expected a 16-bit dtype");
    return !PyErr_Occurred() && take_counts(patterns, PATTERNS) &&
           (counts == NULL || take_counts(counts, COUNTS));
}

PyDoc_STRVAR(tally_patterns_doc,
             "tally_patterns(code, patterns, small) -> bytes\n\n"
             "As tally, of elements that `patterns` counted.");

static PyObject *py_tally_patterns(PyObject *module, PyObject *args) {
    int code;
    Py_buffer patterns = {0};
    double small;
    Tally tally = {.all = NOTHING};
    int taken = take_patterns(args, "Cy*d", &code, &patterns, &small, NULL, NULL);
    if (taken) {
        Row row;
        for (size_t first = 0; first < PATTERNS; first += STEP)
            if (load_patterns((char)code, patterns.buf, first, &row))
                tally_row(&tally, &row, small, STEP);
    }
    PyBuffer_Release(&patterns);
    return taken ? told_tally(tally) : NULL;
}

PyDoc_STRVAR(filtered_patterns_doc,
             "filtered_patterns(code, patterns, (mean, low, high, deviation, small), counts)\n\n"
             "As filtered, of elements that `patterns` counted.");

static PyObject *py_filtered_patterns(PyObject *module, PyObject *args) {
    int code;
    Py_buffer patterns = {0}, counts = {0};
    Limits limits;
    Filtered filtered = {.kept = NOTHING, .without_small = NOTHING};
    uint64_t tables[TABLES][COUNTS] = {{0}};
    int taken = take_patterns(args, "Cy*(ddddd)w*", &code, &patterns, NULL, &limits, &counts);
    if (taken) {
        Row row;
        for (size_t first = 0; first < PATTERNS; first += STEP)
            if (load_patterns((char)code, patterns.buf, first, &row))
                filter_row(&filtered, &row, limits, tables, STEP);
        add_tables(tables, counts.buf);
    }
    PyBuffer_Release(&patterns);
    PyBuffer_Release(&counts);
    return taken ? told_filtered(filtered) : NULL;
}

#endif
