/* Inner products of a block's models, in double, for each piece of 65,536 elements.
 *
 * The product of two float32 values is exact in double. So a fused multiply-add gives the same bits
 * as a product followed by a sum, and processors with and without it agree. */
#ifndef OUTLIERMERGE_GRAM_H
#define OUTLIERMERGE_GRAM_H

#include "block.h"
#include "statistics.h"

/* PART is the number of elements of each row that are worked on at a time, so that a few rows fit
 * in the L1 cache. HIGH by WIDE rows are multiplied at a time, so that the sums stay in registers.
 * */
enum { PART = 256, HIGH = 2, WIDE = 4 };

typedef struct {
    size_t num_rows;
    double *values; /* (R, PART) */
    Lanes *sums;    /* (R, R), only the upper triangle is used */
    void *memory;
} Products;

INLINE Doubles added_product(Doubles a, Doubles b, Doubles sum) {
#if defined(__AVX512F__)
    return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif defined(__FMA__)
    return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
#else
    return sum + a * b;
#endif
}

/* Add the products of `high` rows from i on with `wide` rows from j on. num is a multiple of the
 * number of lanes. */
INLINE void add_tile(const Products *to, size_t i, size_t j, size_t high, size_t wide, size_t num) {
    for (size_t part = 0; part < VECTORS; part++) {
        Doubles sums[HIGH][WIDE];
        for (size_t a = 0; a < high; a++)
            for (size_t b = 0; b < wide; b++)
                sums[a][b] = to->sums[(i + a) * to->num_rows + j + b].parts[part];
        const double *left = to->values + i * PART + part * WIDTH;
        const double *right = to->values + j * PART + part * WIDTH;
        for (size_t at = 0; at < num; at += LANES)
            for (size_t b = 0; b < wide; b++) {
                Doubles value;
                memcpy(&value, right + b * PART + at, sizeof value);
                for (size_t a = 0; a < high; a++) {
                    Doubles other;
                    memcpy(&other, left + a * PART + at, sizeof other);
                    sums[a][b] = added_product(other, value, sums[a][b]);
                }
            }
        for (size_t a = 0; a < high; a++)
            for (size_t b = 0; b < wide; b++)
                to->sums[(i + a) * to->num_rows + j + b].parts[part] = sums[a][b];
    }
}

/* Add all products of some elements. The tile sizes are constants, so that the compiler keeps the
 * sums in registers. */
static void add_products(const Products *to, size_t num) {
    size_t rows = to->num_rows;
    for (size_t i = 0; i < rows; i += HIGH)
        for (size_t j = i; j < rows; j += WIDE) {
            size_t high = least(HIGH, rows - i), wide = least(WIDE, rows - j);
            if (high == 2 && wide == 4)
                add_tile(to, i, j, 2, 4, num);
            else if (high == 2 && wide == 3)
                add_tile(to, i, j, 2, 3, num);
            else if (high == 2 && wide == 2)
                add_tile(to, i, j, 2, 2, num);
            else if (high == 2)
                add_tile(to, i, j, 2, 1, num);
            else
                add_tile(to, i, j, 1, 1, num);
        }
}

/* Add the products of a group of lanes of few rows. */
INLINE void add_lanes(Lanes *sums, const float *const *from, size_t rows) {
    for (int part = 0; part < VECTORS; part++) {
        Doubles values[3];
        for (size_t row = 0; row < rows; row++) values[row] = doubles_of(from[row] + part * WIDTH);
        for (size_t i = 0, k = 0; i < rows; i++)
            for (size_t j = i; j < rows; j++, k++)
                sums[k].parts[part] = added_product(values[i], values[j], sums[k].parts[part]);
    }
}

/* Add all products of two or three rows, which need not be widened before. */
INLINE void add_few(const Products *to, const float *const *rows, size_t num_rows, size_t num) {
    const float *from[3];
    float last[3][LANES] = {{0}};
    Lanes sums[6];
    for (size_t i = 0, k = 0; i < num_rows; i++)
        for (size_t j = i; j < num_rows; j++) sums[k++] = to->sums[i * num_rows + j];
    size_t at = 0;
    for (; at + LANES <= num; at += LANES) {
        for (size_t row = 0; row < num_rows; row++) from[row] = rows[row] + at;
        add_lanes(sums, from, num_rows);
    }
    if (at < num) {
        for (size_t row = 0; row < num_rows; row++) {
            memcpy(last[row], rows[row] + at, (num - at) * sizeof(float));
            from[row] = last[row];
        }
        add_lanes(sums, from, num_rows);
    }
    for (size_t i = 0, k = 0; i < num_rows; i++)
        for (size_t j = i; j < num_rows; j++) to->sums[i * num_rows + j] = sums[k++];
}

/* Widen a part of a row to double, padded with 0 to whole lanes. */
static void widen_row(const float *restrict row, double *restrict values, size_t num) {
    size_t i = 0;
    for (; i + WIDTH <= num; i += WIDTH) {
        Doubles wide = doubles_of(row + i);
        memcpy(values + i, &wide, sizeof wide);
    }
    for (; i < (num + LANES - 1) / LANES * LANES; i++) values[i] = i < num ? row[i] : 0;
}

/* Multiply the rows of a piece that has been read, and write the upper triangle of the products. */
static void multiply_piece(Block *block, const Products *with, size_t num, char *out) {
    const size_t rows = with->num_rows, num_base = rows - block->num_models;
    memset(with->sums, 0, rows * rows * sizeof *with->sums);
    for (size_t i = 0; i < num; i += STEP) {
        size_t step = least(STEP, num - i);
        load_base(block, i, step);
        for (size_t model = 0; model < block->num_models; model++) load_model(block, model, i, step);
        const float *few[3];
        for (size_t row = 0; row < rows && rows <= 3; row++)
            few[row] = row < num_base ? block->base : block->rows + (row - num_base) * ROW;
        if (rows == 2) add_few(with, few, 2, step);
        if (rows == 3) add_few(with, few, 3, step);
        if (rows == 2 || rows == 3) continue;
        for (size_t k = 0; k < step; k += PART) {
            size_t some = least(PART, step - k);
            for (size_t row = 0; row < rows; row++)
                widen_row((row < num_base ? block->base : block->rows + (row - num_base) * ROW) + k,
                          with->values + row * PART, some);
            add_products(with, (some + LANES - 1) / LANES * LANES);
        }
    }
    for (size_t i = 0; i < rows; i++)
        for (size_t j = i; j < rows; j++) {
            const double sum = sum_of(with->sums[i * rows + j]);
            memcpy(out, &sum, sizeof sum);
            out += sizeof sum;
        }
}

PyDoc_STRVAR(gram_doc,
             "gram(block, with_base) -> bytes\n\n"
             "Inner products of models in each piece of 65,536 elements, float64 (pieces, "
             "R(R+1)/2): the upper triangles' rows one after another. with_base puts the base, "
             "as it is, before the models.");

static PyObject *py_gram(PyObject *module, PyObject *args) {
    Block block;
    int with_base, failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O&p", take, &block, &with_base)) return NULL;
    if (with_base && block.num_models == block.num_sources) {
        PyErr_SetString(PyExc_ValueError, "there is no base");
        return finished(&block, NULL, 0, 0);
    }
    size_t rows = block.num_models + (size_t)with_base;
    size_t num_pieces = (block.num_elements + PIECE - 1) / PIECE;
    size_t length = rows * (rows + 1) / 2 * sizeof(double);
    Products with = {.num_rows = rows};
    with.memory = PyMem_RawMalloc(rows * rows * sizeof(Lanes) + rows * PART * sizeof(double) + 64);
    with.sums = (Lanes *)(((uintptr_t)with.memory + 63) & ~(uintptr_t)63);
    with.values = (double *)(with.sums + rows * rows);
    PyObject *result = with.memory == NULL
                           ? PyErr_NoMemory()
                           : PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(num_pieces * length));
    if (result != NULL) {
        char *out = PyBytes_AS_STRING(result);
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t num = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, num);
            error = errno;
            if (!failed) multiply_piece(&block, &with, num, out + start / PIECE * length);
        }
        Py_END_ALLOW_THREADS;
    }
    PyMem_RawFree(with.memory);
    return finished(&block, result, failed, error);
}

#endif
