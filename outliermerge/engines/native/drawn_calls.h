/* The statistic of methods that keep elements at random: what is left of the L1 norm. */
#ifndef OUTLIERMERGE_DRAWN_CALLS_H
#define OUTLIERMERGE_DRAWN_CALLS_H

#include "drawn.h"
#include "measure.h"

/* Add up magnitudes of a piece that has been read, before and after dropping, for each model. */
static void norms_of_piece(const Block *block, const Choice *choice, uint64_t place, size_t num,
                           double *sums) {
    float *kept = block->rows + block->num_models * ROW, *magnitudes = kept + ROW;
    for (size_t model = 0; model < block->num_models; model++) {
        const uint64_t limit = limit_of(choice->chances[model]);
        Lanes before = {{{0}}}, after = {{{0}}};
        for (size_t i = 0; i < num; i += STEP) {
            size_t step = least(STEP, num - i);
            load_base(block, i, step);
            memcpy(kept, load_model(block, model, i, step), step * sizeof *kept);
            for (size_t k = 0; k < step; k++) kept[k] = magnitudes[k] = fabsf(kept[k]);
            keep_at_random(kept, choice->keys + 2 * model, place + i, limit, 1.0f, step);
            add_row(&before, magnitudes, step);
            add_row(&after, kept, step);
        }
        sums[2 * model] = sum_of(before);
        sums[2 * model + 1] = sum_of(after);
    }
}

PyDoc_STRVAR(drawn_doc,
             "drawn(block, start, chances, epsilons, keys[, row, length[, kept]]) -> bytes\n\n"
             "Sums of each model's magnitudes, and of those kept at random. chances and epsilons are "
             "float32 (M,), keys as of merge, start the block's first element in the tensor. By "
             "default in each piece of 65,536 elements, float64 (pieces, M, 2). With rows of so many "
             "elements, of which as many as `length` are ranked together, probabilities go by rank, "
             "from chance - epsilon to chance + epsilon; the sums are those of the rows that begin in "
             "the block, float64 (rows, M, 2). A block in files may begin and end within a row, which "
             "is then read as a whole. kept, a writable buffer, gets a bit for each element of the "
             "tensor, (M, bytes) with 4 bytes to spare, for a block that begins at a multiple of 8.");

static PyObject *py_drawn(PyObject *module, PyObject *args) {
    Block block;
    unsigned long long first;
    const char *chances, *epsilons, *keys;
    Py_ssize_t sizes[3], elements = 0, length = 0;
    int failed = 0, error = 0;
    Py_buffer view = {0};
    Kept bits;
    if (!PyArg_ParseTuple(args, "O&Ky#y#y#|nnw*", take, &block, &first, &chances, sizes, &epsilons,
                          sizes + 1, &keys, sizes + 2, &elements, &length, &view))
        return NULL;
    const size_t models = block.num_models, vector = models * sizeof(float);
    Rows rows = {0};
    size_t num_units = (block.num_elements + PIECE - 1) / PIECE;
    char *memory = PyMem_RawMalloc(models * (2 * sizeof(float) + 2 * sizeof(uint64_t)));
    PyObject *result = NULL;
    if ((size_t)sizes[0] != vector || (size_t)sizes[1] != vector ||
        (size_t)sizes[2] != models * 2 * sizeof(uint64_t) || elements < 0 || length < 0)
        PyErr_SetString(PyExc_ValueError, "numbers and keys for each model are needed");
    else if (memory == NULL)
        PyErr_NoMemory();
    else if (view.buf != NULL && (first % 8 || !elements))
        PyErr_SetString(PyExc_ValueError, "bits are kept of rows, from a multiple of 8 on");
    else if (takes_kept(&bits, &view, &block, first) && (!elements || take_rows(&rows, &block, (size_t)elements, (size_t)length, first))) {
        if (elements) {
            uint64_t size = (uint64_t)elements, last = first + block.num_elements;
            num_units = (last + size - 1) / size - (first + size - 1) / size;
        }
        result = PyBytes_FromStringAndSize(
            NULL, (Py_ssize_t)(num_units * models * 2 * sizeof(double)));
    }
    if (result != NULL) {
        uint64_t *own_keys = (uint64_t *)memory;
        float *numbers = (float *)(own_keys + 2 * models);
        memcpy(own_keys, keys, (size_t)sizes[2]);
        memcpy(numbers, chances, vector);
        memcpy(numbers + models, epsilons, vector);
        RowsKept kept = {{numbers, numbers + models, own_keys, 0},
                         (double *)PyBytes_AS_STRING(result)};
        Py_BEGIN_ALLOW_THREADS;
        for (size_t start = 0; start < block.num_elements && !failed; start += PIECE) {
            size_t num = least(PIECE, block.num_elements - start);
            failed = !fetch(&block, start, num);
            if (!failed && elements) {
                failed = !work_on_rows(&block, &rows, keep_of_row, &kept, start, num);
                if (bits.bits != NULL) pack_kept(&bits, &block, &rows, first + start, num);
            } else if (!failed) {
                norms_of_piece(&block, &kept.choice, first + start, num, kept.sums);
                kept.sums += 2 * models;
            }
            error = errno;
        }
        Py_END_ALLOW_THREADS;
    }
    PyMem_RawFree(memory);
    if (elements) free_rows(&rows);
    PyBuffer_Release(&view);
    return finished(&block, result, failed, error);
}

#endif
