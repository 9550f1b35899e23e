/* Magnitudes of a row in bins, which bound the ranks in DELLA's choice (ranks.h). */
#ifndef OUTLIERMERGE_RANK_BINS_H
#define OUTLIERMERGE_RANK_BINS_H

#include "random.h"

enum {
    ZEROS = 16,     /* bins for zeros, so that counting many of them one by one does not stall */
    MOST_BINS = 2048,
    OCTAVES = 16,   /* that the bins span below the largest magnitude */
    COLUMNS = 16,   /* of the table of bins */
    GROUPS = 64,    /* of bins, of the upper half of the octaves */
};

typedef uint32_t Counts __attribute__((vector_size(COLUMNS * 4)));

/* Memory for a row, and what is known of it. Bins follow one another down the columns of a table, so
 * that all columns are added up at once. */
typedef struct {
    size_t length;
    double least, range;   /* the probability of rank 0, and how much larger the last one's is */
    unsigned digits;       /* of the number of bins */
    uint32_t *sizes;       /* magnitudes' bits */
    uint32_t *other;       /* magnitudes by bin, or an order */
    uint32_t *unsure, *at; /* elements whose rank is to be counted, and where they are by bin */
    uint16_t *bins, *tops; /* places in the table; the first 16 random bits */
    uint8_t *kept, *open, *alike;
    uint32_t *counts, *starts; /* of bins; the first rank in them */
    uint16_t lows[GROUPS], highs[GROUPS]; /* bounds of a group's probabilities, in steps of 2^-16 */
    void *memory;
} Ranked;

static int take_row(Ranked *row, size_t length) {
    size_t padded = (length + 63) / 64 * 64, bins = MOST_BINS + ZEROS;
    row->length = length;
    row->digits = 9;
    while ((size_t)4 << row->digits <= length && 1 << row->digits < MOST_BINS) row->digits++;
    row->memory = PyMem_RawCalloc(padded * 22 + bins * 9 + 64, 1);
    if (row->memory == NULL) return 0;
    uint32_t *next = (uint32_t *)(((uintptr_t)row->memory + 63) & ~(uintptr_t)63);
    row->sizes = next;
    row->other = next += padded;
    row->unsure = next += padded;
    row->at = next += padded;
    row->counts = next += padded;
    row->starts = next += bins;
    row->bins = (uint16_t *)(next += bins);
    row->tops = row->bins + padded;
    row->kept = (uint8_t *)(row->tops + padded);
    row->open = row->kept + padded;
    row->alike = row->open + padded;
    for (size_t i = length; i < padded; i++) row->sizes[i] = UINT32_MAX; /* below none */
    return 1;
}

/* All NaN are alike, and larger than infinity. Returns the largest. */
INLINE uint32_t take_sizes(const float *restrict values, size_t stride, uint32_t *restrict sizes,
                           size_t num) {
    uint32_t most = 0;
    for (size_t i = 0; i < num; i++) {
        uint32_t size = bits_of(values[i * stride]) & MAGNITUDE;
        size = size > INFINITE ? INFINITE + 1u : size;
        sizes[i] = size;
        most = size > most ? size : most;
    }
    return most;
}

static void take_tops(uint64_t counter, uint64_t step, uint64_t second_key,
                      uint16_t *restrict tops, size_t num) {
    for (size_t i = 0; i < num; i++) {
        tops[i] = (uint16_t)(first_bits(counter, second_key) >> 48);
        counter += step;
    }
}

/* Find the bins, and count them. */
static void count_sizes(const Ranked *row, uint32_t most) {
    const uint32_t *restrict sizes = row->sizes;
    uint16_t *restrict bins = row->bins;
    uint32_t *restrict counts = row->counts;
    const uint32_t columns = row->digits - 4, shift = 23 - columns; /* OCTAVES is 2^4 */
    const uint32_t span = 1u << (row->digits + shift), low = most >= span ? most + 1 - span : 0;
    const uint32_t below = (1u << columns) - 1, zeros = 1u << row->digits;
    const size_t length = row->length;
    for (size_t i = 0; i < length; i++) {
        uint32_t bin = (sizes[i] > low ? sizes[i] - low : 0) >> shift;
        uint32_t place = (bin & below) * COLUMNS | bin >> columns;
        bins[i] = (uint16_t)(sizes[i] ? place : zeros + i % ZEROS);
    }
    memset(counts, 0, (zeros + ZEROS) * sizeof *counts);
#pragma GCC unroll 4
    for (size_t i = 0; i < length; i++) counts[bins[i]]++;
    for (size_t i = 0; i < ZEROS; i++) counts[0] += counts[zeros + i];
}

/* Write each bin's first rank, and the bounds of groups: a quarter of a step apart from those that
 * rounding could give. The first group has all bins of the lower half of the octaves, too. */
static void bound_groups(Ranked *row) {
    const Counts *counts = (const Counts *)row->counts;
    Counts *starts = (Counts *)row->starts, sums = {0}, before;
    const size_t rows = (size_t)1 << row->digits >> 4, step = rows / 8;
    for (size_t i = 0; i < rows; i++) {
        starts[i] = sums;
        sums += counts[i];
    }
    uint32_t total = 0;
    for (int column = 0; column < COLUMNS; column++) {
        before[column] = total;
        total += sums[column];
    }
    for (size_t i = 0; i < rows; i++) starts[i] += before;
    uint32_t num_zeros = 0;
    for (size_t i = (size_t)1 << row->digits; i < ((size_t)1 << row->digits) + ZEROS; i++) {
        row->starts[i] = num_zeros;
        num_zeros += row->counts[i];
    }
    row->starts[0] = num_zeros; /* they are counted there, too */
    row->counts[0] -= num_zeros;
    float first[GROUPS + 1];
    for (size_t group = 0; group < GROUPS; group++)
        first[group] = (float)row->starts[group % 8 * step * COLUMNS + 8 + group / 8];
    first[0] = 0;
    first[GROUPS] = (float)total;
    const float least = (float)(row->least * 65536);
    const float slope = (float)(row->range * 65536 / (double)(row->length - 1));
    for (size_t group = 0; group < GROUPS; group++) {
        float one = first[group] * slope + least, other = first[group + 1] * slope + least;
        float low = (one < other ? one : other) - 0.25f, high = (one < other ? other : one) + 0.25f;
        row->lows[group] = (uint16_t)(low < 0 ? 0.0f : low > 65535 ? 65535.0f : low);
        row->highs[group] = (uint16_t)(high < 0 ? 0.0f : high > 65535 ? 65535.0f : high);
    }
}

#endif
