/* The distribution of one source's elements, or of their differences from the base, in double.
 *
 * All functions work on rows of values with weights. A weight is 1, or 0 for a value that is left
 * out, or the number of times that a value occurs: 16-bit values are first counted by their bits,
 * because there are only 65,536 of them. */
#ifndef OUTLIERMERGE_DISTRIBUTION_H
#define OUTLIERMERGE_DISTRIBUTION_H

#include "block.h"
#include "statistics.h"

enum { PATTERNS = 65536, BINS = 512, COUNTS = BINS + 2, TABLES = 4 };

typedef int64_t Longs __attribute__((vector_size(WIDTH * 8)));

/* Values and weights, padded to whole lanes with weights of 0. */
typedef struct {
    double values[STEP], weights[STEP];
} Row;

/* Weight, mean, sums of the powers 2 to 4 of deviations from the mean, least and greatest value. */
typedef struct {
    double weight, mean, m2, m3, m4, least, greatest;
} Central;

#define NOTHING {.least = INFINITY, .greatest = -INFINITY}

/* Results of the first pass: moments of all finite elements; how many elements are zero, small or
 * not finite; Σ|x|. */
typedef struct {
    Central all;
    double num_zeros, num_small, num_non_finite, sum_of_magnitudes;
    double shift; /* not a result */
} Tally;

/* Arguments and results of the second pass. Elements between low and high are kept. */
typedef struct {
    double mean, low, high, deviation, small;
} Limits;

typedef struct {
    Central kept, without_small;
    double num_outside[3]; /* elements beyond 2, 3 and 4 standard deviations from the mean */
    double kept_shift, without_small_shift; /* not results */
} Filtered;

INLINE Doubles doubles_at(const double *from) {
    Doubles values;
    memcpy(&values, from, sizeof values);
    return values;
}

INLINE void store_at(double *to, Doubles values) { memcpy(to, &values, sizeof values); }

INLINE Doubles where(Longs mask, Doubles yes, Doubles no) {
    return (Doubles)(((Longs)yes & mask) | ((Longs)no & ~mask));
}

INLINE Doubles only(Longs mask, Doubles values) { return (Doubles)((Longs)values & mask); }

INLINE Doubles magnitude_of(Doubles values) {
    return (Doubles)((Longs)values & ((Longs){0} + INT64_MAX));
}

INLINE size_t whole_lanes(size_t num) { return (num + LANES - 1) / LANES * LANES; }

#define FOR_LANES(num)                                                \
    for (size_t i = 0; i < whole_lanes(num); i += LANES)              \
        for (int part = 0, at = (int)i; part < VECTORS; part++, at += WIDTH)

/* Combine with the moments of another sample (Pébay, Sandia report SAND2008-6212, 2008). */
static void combine(Central *into, Central other) {
    if (other.weight == 0) return;
    if (into->weight == 0) {
        *into = other;
        return;
    }
    double n = into->weight + other.weight, a = into->weight / n, b = other.weight / n;
    double gap = other.mean - into->mean, square = gap * gap, pairs = into->weight * b;
    into->m4 += other.m4 + pairs * square * square * (a * a - a * b + b * b) +
                6 * square * (a * a * other.m2 + b * b * into->m2) +
                4 * gap * (a * other.m3 - b * into->m3);
    into->m3 += other.m3 + pairs * square * gap * (a - b) +
                3 * gap * (a * other.m2 - b * into->m2);
    into->m2 += other.m2 + pairs * square;
    into->mean += gap * b;
    into->weight = n;
    into->least = other.least < into->least ? other.least : into->least;
    into->greatest = other.greatest > into->greatest ? other.greatest : into->greatest;
}

/* The moments of a row with weights; its mean is relative to shift. */
static Central central_of(const double *values, const double *weights, double shift, size_t num) {
    Lanes sums = {{{0}}}, totals = {{{0}}}, second = {{{0}}}, third = {{{0}}}, fourth = {{{0}}};
    Lanes low, high;
    for (int part = 0; part < VECTORS; part++) {
        low.parts[part] = (Doubles){0} + INFINITY;
        high.parts[part] = (Doubles){0} - INFINITY;
    }
    FOR_LANES(num) {
        Doubles value = doubles_at(values + at), weight = doubles_at(weights + at);
        Longs counts = weight > 0;
        totals.parts[part] += weight;
        sums.parts[part] += weight * (value - shift);
        low.parts[part] = where(counts & (value < low.parts[part]), value, low.parts[part]);
        high.parts[part] = where(counts & (value > high.parts[part]), value, high.parts[part]);
    }
    Central found = NOTHING;
    found.weight = sum_of(totals);
    if (found.weight == 0) return found;
    found.mean = sum_of(sums) / found.weight;
    const double mean = found.mean;
    FOR_LANES(num) {
        Doubles away = doubles_at(values + at) - shift - mean, square = away * away;
        Doubles weighted = square * doubles_at(weights + at);
        second.parts[part] += weighted;
        third.parts[part] += weighted * away;
        fourth.parts[part] += weighted * square;
    }
    found.m2 = sum_of(second);
    found.m3 = sum_of(third);
    found.m4 = sum_of(fourth);
    for (int part = 0; part < VECTORS; part++)
        for (int lane = 0; lane < WIDTH; lane++) {
            double bottom = low.parts[part][lane], top = high.parts[part][lane];
            found.least = bottom < found.least ? bottom : found.least;
            found.greatest = top > found.greatest ? top : found.greatest;
        }
    return found;
}

/* Add a row. Values are taken relative to the mean of the first row that has weight: so little
 * precision is lost where means are large compared with deviations. */
static void add_sample(Central *into, double *shift, const double *values, const double *weights,
                       size_t num) {
    if (into->weight == 0) *shift = central_of(values, weights, 0, num).mean;
    combine(into, central_of(values, weights, *shift, num));
}

/* Give values that are not finite a weight of 0. */
static double drop_non_finite(Row *row, size_t num) {
    Lanes dropped = {{{0}}};
    FOR_LANES(num) {
        Doubles value = doubles_at(row->values + at), weight = doubles_at(row->weights + at);
        Longs is_finite = value - value == 0;
        dropped.parts[part] += only(~is_finite, weight);
        store_at(row->values + at, only(is_finite, value));
        store_at(row->weights + at, only(is_finite, weight));
    }
    return sum_of(dropped);
}

static void tally_row(Tally *into, Row *row, double small, size_t num) {
    Lanes zeros = {{{0}}}, smalls = {{{0}}}, magnitudes = {{{0}}};
    into->num_non_finite += drop_non_finite(row, num);
    FOR_LANES(num) {
        Doubles magnitude = magnitude_of(doubles_at(row->values + at));
        Doubles weight = doubles_at(row->weights + at);
        zeros.parts[part] += only(magnitude == 0, weight);
        smalls.parts[part] += only(magnitude < small, weight);
        magnitudes.parts[part] += magnitude * weight;
    }
    into->num_zeros += sum_of(zeros);
    into->num_small += sum_of(smalls);
    into->sum_of_magnitudes += sum_of(magnitudes);
    add_sample(&into->all, &into->shift, row->values, row->weights, num);
}

/* Count into several tables in turn: with one table, a value in the same bin as the value before
 * would wait until that count is stored. */
static void count_bins(const double *values, const double *weights, Limits limits,
                       uint64_t (*tables)[COUNTS], size_t num) {
    const double first = limits.mean - 8 * limits.deviation, per_bin = 32 / limits.deviation;
    int64_t bins[STEP], counts[STEP];
    FOR_LANES(num) {
        Doubles bin = (doubles_at(values + at) - first) * per_bin;
        bin = where(bin >= 0, bin, (Doubles){0} - 1); /* also where the limits make it NaN */
        bin = where(bin <= BINS, bin, (Doubles){0} + BINS);
        Longs whole = __builtin_convertvector(bin + 1, Longs);
        Longs weight = __builtin_convertvector(doubles_at(weights + at), Longs);
        memcpy(bins + at, &whole, sizeof whole);
        memcpy(counts + at, &weight, sizeof weight);
    }
    for (size_t i = 0; i < num; i++) tables[i % TABLES][bins[i]] += (uint64_t)counts[i];
}

static void filter_row(Filtered *into, Row *row, Limits limits, uint64_t (*tables)[COUNTS],
                       size_t num) {
    Lanes outside[3] = {{{{0}}}};
    double weights[STEP];
    drop_non_finite(row, num);
    FOR_LANES(num) {
        Doubles value = doubles_at(row->values + at), weight = doubles_at(row->weights + at);
        Doubles away = magnitude_of(value - limits.mean);
        for (int i = 0; i < 3; i++)
            outside[i].parts[part] += only(away > (i + 2) * limits.deviation, weight);
        Longs is_kept = (value >= limits.low) & (value <= limits.high);
        store_at(weights + at, only(is_kept, weight));
    }
    for (int i = 0; i < 3; i++) into->num_outside[i] += sum_of(outside[i]);
    if (limits.deviation > 0 && limits.deviation < INFINITY) count_bins(row->values, row->weights, limits, tables, num);
    add_sample(&into->kept, &into->kept_shift, row->values, weights, num);
    FOR_LANES(num) {
        Longs is_large = magnitude_of(doubles_at(row->values + at)) >= limits.small;
        store_at(weights + at, only(is_large, doubles_at(weights + at)));
    }
    add_sample(&into->without_small, &into->without_small_shift, row->values, weights, num);
}

#endif
