/* Sums of squares of what lies in a window of variances, for each variance that is there: so they
 * are known from wherever in the window on elements are selected. */
#ifndef OUTLIERMERGE_LEVELS_H
#define OUTLIERMERGE_LEVELS_H

#include "measure.h"

enum { MOST_LEVELS = 2048, SLOTS = 2 * MOST_LEVELS };

/* A level is a variance in a piece. */
typedef struct {
    size_t models, most, num; /* levels that a piece may have; those of this piece */
    int fits;                 /* whether no piece had more */
    double *found, *end;      /* (levels, 1 + M): a variance, and sums; where this piece's begin */
    uint32_t bins[MOST_LEVELS], counts[MOST_LEVELS];
    uint16_t slots[SLOTS]; /* a table of levels, counted from 1, by a hash of their bins */
} Levels;

static Levels *take_levels(const Block *block) {
    size_t models = block->num_models, num_pieces = (block->num_elements + PIECE - 1) / PIECE;
    size_t most = least(MOST_LEVELS, PIECE / (1 + models));
    Levels *levels = PyMem_RawCalloc(1, sizeof *levels);
    double *found = PyMem_RawMalloc(num_pieces * most * (1 + models) * sizeof *found + 1);
    if (levels == NULL || found == NULL) {
        PyMem_RawFree(levels);
        PyMem_RawFree(found);
        return NULL;
    }
    levels->models = models;
    levels->most = most;
    levels->fits = 1;
    levels->found = levels->end = found;
    return levels;
}

static void free_levels(Levels *levels) {
    if (levels != NULL) PyMem_RawFree(levels->found);
    PyMem_RawFree(levels);
}

/* Return the number of a bin's level, which may be a new one; levels->most where there is no room. */
static size_t level_of(Levels *levels, uint32_t bin) {
    for (uint32_t slot = bin * 0x9E3779B1u % SLOTS;; slot = (slot + 1) % SLOTS) {
        size_t at = levels->slots[slot];
        if (at && levels->bins[at - 1] == bin) return at - 1;
        if (at) continue;
        if (levels->num == levels->most) return levels->most;
        at = levels->num++;
        levels->slots[slot] = (uint16_t)levels->num;
        levels->bins[at] = bin;
        levels->counts[at] = 0;
        memset(levels->end + at * (1 + levels->models), 0, (1 + levels->models) * sizeof(double));
        return at;
    }
}

/* Add what a row of variances has in the window; the block's rows are the models'. */
static void add_levels(Levels *levels, const Block *block, const float *variances, size_t num,
                       Histogram *into) {
    uint32_t picked[STEP + 16];
    size_t num_picked = pick(variances, into->bins, picked, &into->num_above, num);
    for (size_t i = 0; i < num_picked; i++) {
        uint32_t place = picked[i], bin = bin_of(into->bins, variances[place]);
        size_t level = level_of(levels, bin);
        if (level == levels->most) {
            levels->fits = 0;
            __atomic_fetch_add((uint64_t *)into->view.buf + bin, 1, __ATOMIC_RELAXED);
            continue;
        }
        levels->counts[level]++;
        double *sums = levels->end + level * (1 + levels->models);
        sums[0] = variances[place];
        for (size_t model = 0; model < levels->models; model++) {
            double value = block->rows[model * ROW + place];
            sums[1 + model] += value * value;
        }
    }
}

/* Count the levels of a piece, and begin another piece. */
static void finish_levels(Levels *levels, Histogram *into) {
    for (size_t i = 0; i < levels->num; i++)
        __atomic_fetch_add((uint64_t *)into->view.buf + levels->bins[i], levels->counts[i],
                           __ATOMIC_RELAXED);
    levels->end += levels->num * (1 + levels->models);
    levels->num = 0;
    memset(levels->slots, 0, sizeof levels->slots);
}

#endif
