/* W + scale * L R, with one factor for each row of the sum where that is rescaled.
 *
 * Products are added up in the order of the ranks; each product and each sum is rounded to float32,
 * so that no value depends on where blocks are cut, nor on the processor. */
#ifndef OUTLIERMERGE_LOW_RANK_H
#define OUTLIERMERGE_LOW_RANK_H

#include "places.h"

typedef struct {
    size_t columns, first_row, rank; /* the buffers of what rows have begin with first_row */
    float scale;
    Py_buffer left, right;       /* L (rows, rank), R (rank, columns) */
    Py_buffer magnitudes, norms; /* (rows,): a row is multiplied by their quotient */
} LowRank;

/* GCC and Clang make instructions of it that the processor has. */
typedef float Vector __attribute__((vector_size(64)));
enum { ACROSS = sizeof(Vector) / sizeof(float), ROWS_AT_ONCE = 4 };

INLINE Vector load_vector(const float *from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

/* Add products to some columns of `rows` rows that are `columns` apart. */
INLINE void add_some_rows(const LowRank *of, const float *restrict left, const float *right,
                         float *restrict into, size_t rows, size_t num) {
    const size_t columns = of->columns, rank = of->rank;
    size_t column = 0;
    for (; column + 2 * ACROSS <= num; column += 2 * ACROSS) {
        Vector sums[ROWS_AT_ONCE][2] = {{{0}}};
        for (size_t k = 0; k < rank; k++) {
            const float *from = right + k * columns + column;
            Vector a = load_vector(from), b = load_vector(from + ACROSS);
            for (size_t i = 0; i < rows; i++) {
                sums[i][0] += left[i * rank + k] * a;
                sums[i][1] += left[i * rank + k] * b;
            }
        }
        for (size_t i = 0; i < rows; i++)
            for (size_t half = 0; half < 2; half++) {
                float *to = into + i * columns + column + half * ACROSS;
                Vector sum = load_vector(to) + sums[i][half] * of->scale;
                memcpy(to, &sum, sizeof sum);
            }
    }
    for (; column < num; column++)
        for (size_t i = 0; i < rows; i++) {
            float sum = 0;
            for (size_t k = 0; k < rank; k++) sum += left[i * rank + k] * right[k * columns + column];
            into[i * columns + column] += sum * of->scale;
        }
}

static void rescale_row(const LowRank *of, size_t row, float *restrict values, size_t num) {
    if (of->norms.buf == NULL) return;
    const float magnitude = ((const float *)of->magnitudes.buf)[row];
    const float factor = magnitude / ((const float *)of->norms.buf)[row];
    for (size_t i = 0; i < num; i++) values[i] *= factor;
}

/* Make elements of the sum of those of W, from an element of the tensor on. */
static void add_low_rank(const LowRank *of, size_t element, size_t num, float *into) {
    const size_t columns = of->columns, rank = of->rank;
    size_t row = element / columns - of->first_row, column = element % columns;
    const float *left = of->left.buf, *right = of->right.buf;
    while (num > 0) {
        if (column == 0 && num >= ROWS_AT_ONCE * columns) {
            add_some_rows(of, left + row * rank, right, into, ROWS_AT_ONCE, columns);
            for (size_t i = 0; i < ROWS_AT_ONCE; i++)
                rescale_row(of, row + i, into + i * columns, columns);
            row += ROWS_AT_ONCE;
            into += ROWS_AT_ONCE * columns;
            num -= ROWS_AT_ONCE * columns;
            continue;
        }
        size_t run = least(num, columns - column);
        add_some_rows(of, left + row * rank, right + column, into, 1, run);
        rescale_row(of, row, into, run);
        row++;
        into += run;
        num -= run;
        column = 0;
    }
}

static float row_norm(const float *restrict values, double *restrict squares, size_t num) {
    for (size_t i = 0; i < num; i++) squares[i] = (double)values[i] * (double)values[i];
    for (size_t half; num > 1; num = half) {
        half = (num + 1) / 2;
        const double *second = squares + half;
        for (size_t i = 0; i < num - half; i++) squares[i] += second[i];
    }
    return (float)sqrt(squares[0]);
}

static void release_low_rank(LowRank *of) {
    PyBuffer_Release(&of->left);
    PyBuffer_Release(&of->right);
    PyBuffer_Release(&of->magnitudes);
    PyBuffer_Release(&of->norms);
}

/* Parse the base, columns, the first row of the buffers, rank, scale, L, R, and the magnitudes and
 * norms of rows or None. */
static int take_low_rank(LowRank *of, PyObject *tuple, int64_t *first, PyObject **base) {
    const char *name;
    long long start;
    Py_ssize_t columns, first_row, rank;
    if (!PyArg_ParseTuple(tuple, "sLO!nnnfy*y*z*z*", &name, &start, &PyTuple_Type, base, &columns,
                          &first_row, &rank, &of->scale, &of->left, &of->right, &of->magnitudes,
                          &of->norms))
        return 0;
    *first = start;
    of->columns = (size_t)columns, of->first_row = (size_t)first_row, of->rank = (size_t)rank;
    if (start >= 0 && columns > 0 && first_row >= 0 && rank >= 0 && strcmp(name, "low_rank") == 0 &&
        of->right.len == rank * columns * (Py_ssize_t)sizeof(float) &&
        (of->norms.buf == NULL) == (of->magnitudes.buf == NULL) && PyTuple_GET_SIZE(*base))
        return 1;
    PyErr_SetString(PyExc_ValueError, "no such product");
    return 0;
}

#endif
