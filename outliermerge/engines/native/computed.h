/* Values that are computed of what files hold, as float32: numbers that codes and scales stand for,
 * and weights with the product of two factors added.
 *
 * The definition is in Python: ScaledTensor and CodeTensor of checkpoint/quantized/tensors.py, and
 * LowRankSum and Rescaled of checkpoint/adapters/tensors.py. Each operation is rounded to float32,
 * in the same order on every processor. */
#ifndef OUTLIERMERGE_COMPUTED_H
#define OUTLIERMERGE_COMPUTED_H

#include "low_rank.h"

enum { HIGH_NIBBLE = 'h', LOW_NIBBLE = 'l', E4M3 = '4', E5M2 = '5', INT8 = 'i', UINT8 = 'u' };
enum { DECODED = 1024 }; /* codes that are decoded at a time, so that they stay in the L1 cache */

/* What codes stand for. A scale is for `height` rows and `width` columns of a matrix of `rows` rows
 * and `columns` columns; matrices can be stacked. */
typedef struct {
    char code;
    int file;
    int64_t position; /* of the tensor's first byte */
    size_t rows, columns, height, width;
    size_t first_row; /* the row of scales with which the buffers begin */
    Py_buffer scales, zeros, table;
    float numbers[256]; /* what each code stands for, where `table` is given or codes are nibbles */
    float zero, factor, added;
    int only_scales, is_plain; /* whether all else, and scales too, would change nothing */
} Codes;

/* A computed source is made in a block that begins with the tensor's element `first`. */
struct Computed {
    int64_t first;
    Codes codes;
    LowRank low_rank;
    Computed *base; /* of a low rank's sum; NULL for codes */
};

INLINE int is_nibble(char code) { return code == HIGH_NIBBLE || code == LOW_NIBBLE; }

/* The byte in which an element begins. */
INLINE int64_t byte_of(char code, int64_t element) {
    return is_nibble(code) ? element / 2 : is_known(code) ? element * (int64_t)item_bytes(code) : element;
}

INLINE float of_e4m3(uint32_t code) {
    uint32_t size = code & 0x7F, sign = (code & 0x80) << 24;
    uint32_t small = bits_of((float)(int32_t)size * 0x1p-9f), normal = (size << 20) + (120u << 23);
    return float_of((size < 8 ? small : size < 0x7F ? normal : 0x7FC00000u) | sign);
}

INLINE float of_e5m2(uint32_t code) {
    uint16_t half = (uint16_t)(code << 8);
    return load(FLOAT16, &half, 0);
}

/* Look nibbles up: `odd` tells whether the first one is the second of its byte. */
static void decode_nibbles(const Codes *codes, const uint8_t *from, size_t odd, float *restrict to,
                           size_t num) {
    const unsigned first = codes->code == HIGH_NIBBLE ? 4 : 0;
    size_t i = 0;
    if (odd && num) to[i++] = codes->numbers[*from++ >> (4 - first) & 15];
#if defined(__AVX512F__)
    const __m512 table = _mm512_loadu_ps(codes->numbers);
    const __m128i low = _mm_set1_epi8(15);
    for (; i + 16 <= num; i += 16, from += 8) {
        __m128i bytes = _mm_loadl_epi64((const __m128i *)from);
        __m128i a = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), b = _mm_and_si128(bytes, low);
        __m128i order = first ? _mm_unpacklo_epi8(a, b) : _mm_unpacklo_epi8(b, a);
        _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(order), table));
    }
#elif defined(__AVX2__)
    const __m256 below = _mm256_loadu_ps(codes->numbers), above = _mm256_loadu_ps(codes->numbers + 8);
    const __m128i low = _mm_set1_epi8(15);
    for (; i + 8 <= num; i += 8, from += 4) {
        int32_t four;
        memcpy(&four, from, 4);
        __m128i bytes = _mm_cvtsi32_si128(four);
        __m128i a = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), b = _mm_and_si128(bytes, low);
        __m128i order = first ? _mm_unpacklo_epi8(a, b) : _mm_unpacklo_epi8(b, a);
        __m256i places = _mm256_cvtepu8_epi32(order);
        __m256 is_above = _mm256_castsi256_ps(_mm256_slli_epi32(places, 28));
        _mm256_storeu_ps(to + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, places),
                                                 _mm256_permutevar8x32_ps(above, places), is_above));
    }
#endif
    for (; i < num; i++) {
        unsigned shift = (i - odd) % 2 ? 4 - first : first;
        to[i] = codes->numbers[*from >> shift & 15];
        from += (i - odd) % 2;
    }
}

static void decode(const Codes *codes, const uint8_t *restrict from, size_t odd,
                   float *restrict to, size_t num) {
    if (is_known(codes->code))
        load_row(codes->code, from, to, num);
    else if (is_nibble(codes->code))
        decode_nibbles(codes, from, odd, to, num);
    else if (codes->table.buf != NULL)
        for (size_t i = 0; i < num; i++) to[i] = codes->numbers[from[i]];
    else if (codes->code == E4M3)
        for (size_t i = 0; i < num; i++) to[i] = of_e4m3(from[i]);
    else if (codes->code == E5M2)
        for (size_t i = 0; i < num; i++) to[i] = of_e5m2(from[i]);
    else if (codes->code == INT8)
        for (size_t i = 0; i < num; i++) to[i] = (float)(int8_t)from[i];
    else
        for (size_t i = 0; i < num; i++) to[i] = (float)from[i];
}

static void scale_run(const Codes *codes, size_t block, float *restrict values, size_t num) {
    const float scale = codes->scales.buf != NULL ? ((const float *)codes->scales.buf)[block] : 1;
    const float point = codes->zeros.buf != NULL ? ((const float *)codes->zeros.buf)[block] : 0;
    const float zero = codes->zero, factor = codes->factor, added = codes->added;
    if (codes->only_scales)
        for (size_t i = 0; i < num; i++) values[i] *= scale;
    else
        for (size_t i = 0; i < num; i++)
            values[i] = ((values[i] - point) - zero) * scale * factor + added;
}

/* Multiply a run of values from an element of the tensor on. */
static void scale_values(const Codes *codes, int64_t element, float *values, size_t num) {
    const size_t per_row = (codes->columns + codes->width - 1) / codes->width;
    const size_t per_matrix = (codes->rows + codes->height - 1) / codes->height;
    size_t row = (size_t)element / codes->columns, column = (size_t)element % codes->columns;
    while (num > 0) {
        size_t scale_row = row / codes->rows * per_matrix + row % codes->rows / codes->height;
        size_t begin = (scale_row - codes->first_row) * per_row;
        size_t left = least(num, codes->columns - column);
        num -= left;
        for (size_t block = column / codes->width; left > 0; block++) {
            size_t run = least(left, (block + 1) * codes->width - column);
            scale_run(codes, begin + block, values, run);
            values += run;
            column += run;
            left -= run;
        }
        column = 0;
        row++;
    }
}

/* Codes are read to the end of the memory for their values, which are then made from its beginning
 * on: a value is never longer than what is left to decode. */
static int compute_codes(const Computed *computed, int64_t start, size_t num, float *into) {
    const Codes *codes = &computed->codes;
    const int64_t first = computed->first + start, end = first + (int64_t)num;
    const int64_t low = byte_of(codes->code, first);
    const int64_t high = is_nibble(codes->code) ? (end + 1) / 2 : byte_of(codes->code, end);
    char *stored = (char *)(into + num) - (high - low);
    if (!read_bytes(codes->file, stored, (size_t)(high - low), codes->position + low)) return 0;
    uint8_t some[DECODED * 4 + 64];
    for (size_t done = 0; done < num; done += DECODED) {
        size_t step = least(DECODED, num - done);
        int64_t element = first + (int64_t)done;
        int64_t at = byte_of(codes->code, element);
        size_t odd = is_nibble(codes->code) ? (size_t)(element % 2) : 0;
        int64_t until = is_nibble(codes->code) ? (element + (int64_t)step + 1) / 2
                                               : byte_of(codes->code, element + (int64_t)step);
        memcpy(some, stored + (at - low), (size_t)(until - at));
        decode(codes, some, odd, into + done, step);
        if (!codes->is_plain) scale_values(codes, element, into + done, step);
    }
    return 1;
}

static int compute(const Computed *computed, int64_t start, size_t num, float *into) {
    if (computed->base == NULL) return compute_codes(computed, start, num, into);
    if (!compute(computed->base, start, num, into)) return 0;
    add_low_rank(&computed->low_rank, (size_t)(computed->first + start), num, into);
    return 1;
}

static void release_computed(Computed *computed) {
    if (computed->base != NULL) release_computed(computed->base);
    PyBuffer_Release(&computed->codes.scales);
    PyBuffer_Release(&computed->codes.zeros);
    PyBuffer_Release(&computed->codes.table);
    release_low_rank(&computed->low_rank);
    PyMem_RawFree(computed);
}

/* Parse the tensor's element with which the block begins, (file descriptor, position of the tensor),
 * the code's kind, rows, columns, height, width, first row of scales,
 * scales, zeros, table (float32 or None), zero, factor, added. */
static int take_codes(Codes *codes, PyObject *tuple, int64_t *first) {
    const char *name;
    int code;
    long long start, position;
    Py_ssize_t rows, columns, height, width, first_row;
    if (!PyArg_ParseTuple(tuple, "sL(iL)Cnnnnnz*z*z*fff", &name, &start, &codes->file, &position,
                          &code, &rows, &columns, &height, &width, &first_row, &codes->scales,
                          &codes->zeros, &codes->table, &codes->zero, &codes->factor,
                          &codes->added))
        return 0;
    *first = start;
    codes->position = position;
    codes->code = (char)code;
    if (start < 0 || codes->file < 0 || position < 0 || rows < 1 || columns < 1 || height < 1 ||
        width < 1 || first_row < 0 || strchr("befhl45iu", code) == NULL) {
        PyErr_SetString(PyExc_ValueError, "no such codes");
        return 0;
    }
    codes->rows = (size_t)rows, codes->columns = (size_t)columns;
    codes->height = (size_t)height, codes->width = (size_t)width;
    codes->first_row = (size_t)first_row;
    codes->only_scales = codes->zeros.buf == NULL && codes->zero == 0 && codes->factor == 1 &&
                         codes->added == 0 && signbit(codes->added); /* -0 + 0 is 0 */
    codes->is_plain = codes->only_scales && codes->scales.buf == NULL;
    for (int i = 0; i < 256; i++) codes->numbers[i] = (float)i;
    if (codes->table.buf != NULL)
        memcpy(codes->numbers, codes->table.buf,
               least((size_t)codes->table.len, sizeof codes->numbers));
    return 1;
}

/* Parse a tuple that begins with `codes` or `low_rank`, and the tensor's element with which the
 * block begins. */
static Computed *take_computed(PyObject *from) {
    PyObject *base = NULL;
    Computed *computed = PyMem_RawCalloc(1, sizeof *computed);
    if (computed == NULL) return (Computed *)PyErr_NoMemory();
    PyObject *name = PyTuple_GET_ITEM(from, 0);
    int done;
    if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, "codes") == 0)
        done = take_codes(&computed->codes, from, &computed->first);
    else
        done = take_low_rank(&computed->low_rank, from, &computed->first, &base) &&
               (computed->base = take_computed(base)) != NULL;
    if (done) return computed;
    release_computed(computed);
    return NULL;
}

PyDoc_STRVAR(norms_doc,
             "norms(place, num_rows, columns) -> bytes\n\n"
             "The norms of rows of a computed place, float32; squares are added up in float64 by "
             "halves: the second half to the first, until one is left.");

static PyObject *py_norms(PyObject *module, PyObject *args) {
    PyObject *from, *result = NULL;
    Py_ssize_t num_rows, columns;
    Place place;
    int failed = 0, error = 0;
    if (!PyArg_ParseTuple(args, "O!nn", &PyTuple_Type, &from, &num_rows, &columns)) return NULL;
    if (num_rows < 1 || columns < 1 || columns > PY_SSIZE_T_MAX / 64)
        return PyErr_Format(PyExc_ValueError, "no rows");
    if (!take_place(&place, from, FLOAT32, 0, PyBUF_SIMPLE)) return NULL;
    size_t step = (size_t)columns < 65536 ? 65536 / (size_t)columns : 1, width = (size_t)columns;
    float *values = PyMem_RawMalloc(step * width * sizeof *values);
    double *squares = PyMem_RawMalloc(width * sizeof *squares);
    if (values == NULL || squares == NULL)
        PyErr_NoMemory();
    else
        result = PyBytes_FromStringAndSize(NULL, num_rows * (Py_ssize_t)sizeof(float));
    if (result != NULL) {
        float *norms = (float *)PyBytes_AS_STRING(result);
        Py_BEGIN_ALLOW_THREADS;
        for (size_t row = 0; row < (size_t)num_rows && !failed; row += step) {
            size_t rows = least(step, (size_t)num_rows - row);
            failed = !read_all(&place, (int64_t)(row * width), rows * width, (char *)values);
            error = errno;
            for (size_t i = 0; i < rows && !failed; i++)
                norms[row + i] = row_norm(values + i * width, squares, width);
        }
        Py_END_ALLOW_THREADS;
    }
    PyMem_RawFree(values);
    PyMem_RawFree(squares);
    release_place(&place);
    if (failed) {
        Py_CLEAR(result);
        raise_failure(error, 0);
    }
    return result;
}

#endif
