/* Statistics of a row of float32 values. Sums are float64 in sixteen lanes, whatever the size of
 * the processor's registers, so that all processors give the same bits. */
#ifndef OUTLIERMERGE_STATISTICS_H
#define OUTLIERMERGE_STATISTICS_H

#include "convert.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
enum { WIDTH = 8 };
#elif defined(__AVX2__)
enum { WIDTH = 4 };
#else
enum { WIDTH = 2 };
#endif
enum { LANES = 16, VECTORS = LANES / WIDTH };

typedef double Doubles __attribute__((vector_size(WIDTH * 8)));
typedef struct {
    Doubles parts[VECTORS];
} Lanes;

INLINE Doubles doubles_of(const float *from) {
#if defined(__AVX512F__)
    /* For __builtin_convertvector gcc 12 does not emit this instruction. */
    return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(from));
#else
    typedef float Floats __attribute__((vector_size(WIDTH * 4)));
    Floats values;
    memcpy(&values, from, sizeof values);
    return __builtin_convertvector(values, Doubles);
#endif
}

INLINE Doubles magnitudes_of(Doubles values) {
    typedef int64_t Integers __attribute__((vector_size(WIDTH * 8)));
    return (Doubles)((Integers)values & INT64_MAX);
}

INLINE double sum_of(Lanes lanes) {
    double total = 0;
    for (int part = 0; part < VECTORS; part++)
        for (int lane = 0; lane < WIDTH; lane++) total += lanes.parts[part][lane];
    return total;
}

/* Sums of a chunk's deviations from `shift`, and of their squares. */
typedef struct {
    double shift;
    Lanes sums, squares;
} Moments;

static void add_row(Lanes *into, const float *restrict row, size_t num) {
    Lanes sums = *into;
    size_t i = 0;
    for (; i + LANES <= num; i += LANES)
        for (int part = 0; part < VECTORS; part++)
            sums.parts[part] += doubles_of(row + i + part * WIDTH);
    for (size_t lane = 0; i < num; i++, lane++)
        sums.parts[lane / WIDTH][lane % WIDTH] += row[i];
    *into = sums;
}

static void add_squares(Lanes *into, const float *restrict row, size_t num) {
    Lanes sums = *into;
    size_t i = 0;
    for (; i + LANES <= num; i += LANES)
        for (int part = 0; part < VECTORS; part++) {
            Doubles values = doubles_of(row + i + part * WIDTH);
            sums.parts[part] += values * values;
        }
    for (size_t lane = 0; i < num; i++, lane++)
        sums.parts[lane / WIDTH][lane % WIDTH] += (double)row[i] * (double)row[i];
    *into = sums;
}

/* Take the mean of the first step as shift. If it is far from the mean of the other steps, the
 * standard deviation is at least that distance over sqrt(steps), so little precision is lost. */
static void start_moments(Moments *moments, const float *row, size_t num) {
    Lanes first = {{{0}}};
    add_row(&first, row, num);
    memset(moments, 0, sizeof *moments);
    moments->shift = sum_of(first) / (double)num;
}

static void add_moments(Moments *moments, const float *restrict row, size_t num) {
    Lanes sums = moments->sums, squares = moments->squares;
    const double shift = moments->shift;
    size_t i = 0;
    for (; i + LANES <= num; i += LANES)
        for (int part = 0; part < VECTORS; part++) {
            Doubles away = doubles_of(row + i + part * WIDTH) - shift;
            sums.parts[part] += away;
            squares.parts[part] += away * away;
        }
    for (size_t lane = 0; i < num; i++, lane++) {
        double away = row[i] - shift;
        sums.parts[lane / WIDTH][lane % WIDTH] += away;
        squares.parts[lane / WIDTH][lane % WIDTH] += away * away;
    }
    moments->sums = sums;
    moments->squares = squares;
}

/* Write the mean and the sum of squared deviations from it. */
static void finish_moments(const Moments *moments, size_t num, double *out) {
    double sum = sum_of(moments->sums);
    double squares = sum_of(moments->squares) - sum * sum / (double)num;
    out[0] = moments->shift + sum / (double)num;
    out[1] = squares < 0 ? 0 : squares;
}

static void take_magnitudes(float *restrict row, float *restrict kept, float threshold,
                            size_t num) {
    for (size_t i = 0; i < num; i++) {
        row[i] = fabsf(row[i]);
        kept[i] = row[i] >= threshold ? row[i] : 0.0f;
    }
}

/* A histogram of magnitudes by their bits: bins of 2^shift from `low` on; the last bin, num_bins,
 * is for all magnitudes above. */
typedef struct {
    uint32_t low, shift, num_bins;
} Bins;

/* For each value write its bits minus low, and whether it is in the window. */
static uint32_t find_bins(const float *restrict row, Bins bins, uint32_t *restrict offsets,
                          uint8_t *restrict inside, size_t num) {
    const uint32_t low = bins.low, width = bins.num_bins << bins.shift;
    uint32_t num_above = 0;
    for (size_t i = 0; i < num; i++) {
        uint32_t bits = bits_of(row[i]) & MAGNITUDE, offset = bits - low;
        offsets[i] = offset;
        inside[i] = offset < width;
        num_above += (bits >= low) & (offset >= width);
    }
    return num_above;
}

/* Count into this thread's own bins: for a window that contains most values. */
static void count_many(Bins bins, const uint32_t *restrict offsets, const uint8_t *restrict inside,
                       uint32_t *restrict counts, size_t num) {
    for (size_t i = 0; i < num; i++)
        if (inside[i]) counts[offsets[i] >> bins.shift]++;
}

/* Count into bins that threads share: for a window that contains few values. `inside` has room for
 * a multiple of eight entries; those from num on are zero. */
static void count_few(Bins bins, const uint32_t *restrict offsets, const uint8_t *restrict inside,
                      uint64_t *restrict counts, size_t num) {
    for (size_t i = 0; i < num; i += 8) {
        uint64_t left;
        memcpy(&left, inside + i, 8);
        for (; left != 0; left &= left - 1) { /* each turn handles one set bit */
            size_t at = i + (size_t)(__builtin_ctzll(left) >> 3);
            __atomic_fetch_add(counts + (offsets[at] >> bins.shift), 1, __ATOMIC_RELAXED);
        }
    }
}

#endif
