/* DELLA's choice in one row: an element is kept with a probability that grows with the rank of its
 * magnitude.
 *
 * Sorting is mostly avoided. Magnitudes are counted in bins, which bounds every rank, and so every
 * probability. For nearly all elements these bounds decide. For the others the exact rank is
 * counted, so that the choice is that of a stable sort. */
#ifndef OUTLIERMERGE_RANKS_H
#define OUTLIERMERGE_RANKS_H

#include "random.h"

enum {
    ZEROS = 16, /* bins for zeros, so that counting many of them one by one does not stall */
    FEWEST_BINS = 256,
    MOST_BINS = 1 << 14,
    OCTAVES = 16, /* that the bins span below the largest magnitude */
    FEW = 12,     /* unsure elements whose ranks are counted in the whole row */
    PATIENCE = 64, /* comparisons for each element of a row, before the row is sorted */
    DIGIT = 11,
};

/* Memory for a row, and what is known of it. */
typedef struct {
    size_t length;
    double least, range;   /* the probability of rank 0, and how much larger the last one's is */
    uint32_t *sizes;       /* magnitudes' bits */
    uint32_t *other;       /* bounds, then magnitudes by bin, or an order */
    uint32_t *unsure, *at; /* elements whose rank is to be counted, and where they are by bin */
    uint16_t *bins, *tops; /* the first 16 random bits */
    uint8_t *kept, *open;
    uint32_t *counts, *starts, *limits; /* of bins */
    void *memory;
} Ranked;

static int take_row(Ranked *row, size_t length) {
    size_t padded = (length + 63) / 64 * 64, bins = ZEROS + MOST_BINS + 64;
    row->length = length;
    row->memory = PyMem_RawCalloc(padded * 22 + 3 * bins * sizeof(uint32_t) + 64, 1);
    if (row->memory == NULL) return 0;
    uint32_t *next = (uint32_t *)(((uintptr_t)row->memory + 63) & ~(uintptr_t)63);
    row->sizes = next;
    row->other = next += padded;
    row->unsure = next += padded;
    row->at = next += padded;
    row->counts = next += padded;
    row->starts = next += bins;
    row->limits = next += bins;
    row->bins = (uint16_t *)(next += bins);
    row->tops = row->bins + padded;
    row->kept = (uint8_t *)(row->tops + padded);
    row->open = row->kept + padded;
    return 1;
}

/* All NaN are alike, and larger than infinity. Returns the largest. */
static uint32_t take_sizes(const float *restrict values, size_t stride, uint32_t *restrict sizes,
                           size_t num) {
    uint32_t most = 0;
    if (stride != 1)
        for (size_t i = 0; i < num; i++) sizes[i] = bits_of(values[i * stride]);
    else
        memcpy(sizes, values, num * sizeof *sizes);
    for (size_t i = 0; i < num; i++) {
        uint32_t size = sizes[i] & MAGNITUDE;
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

/* Find the bins, count them, and return how many there are. */
static size_t count_sizes(const Ranked *row, uint32_t most) {
    const uint32_t *restrict sizes = row->sizes;
    uint16_t *restrict bins = row->bins;
    uint32_t *restrict counts = row->counts;
    unsigned digits = 8;
    while (((size_t)2 << digits) <= row->length && 1 << digits < MOST_BINS) digits++;
    const uint32_t num_bins = 1u << digits, shift = 23 - (digits - 4); /* OCTAVES is 2^4 */
    const uint32_t span = num_bins << shift, low = most >= span ? most + 1 - span : 0;
    const size_t length = row->length;
    for (size_t i = 0; i < length; i++) {
        uint32_t above = sizes[i] > low ? (sizes[i] - low) >> shift : 0;
        uint32_t bin = sizes[i] == 0 ? (uint32_t)i % ZEROS : ZEROS + above;
        bins[i] = (uint16_t)bin;
    }
    memset(counts, 0, (ZEROS + num_bins) * sizeof *counts);
#pragma GCC unroll 4
    for (size_t i = 0; i < length; i++) counts[bins[i]]++;
    return ZEROS + num_bins;
}

/* Write each bin's first rank, and bounds of the probabilities of its elements, in steps of 2^-16.
 * The bounds are a quarter of a step apart from those that rounding could give. */
static void bound_bins(const Ranked *row, size_t num_bins) {
    uint32_t *restrict starts = row->starts, *restrict limits = row->limits;
    const uint32_t *restrict counts = row->counts;
    uint32_t rank = 0;
#pragma GCC unroll 8
    for (size_t bin = 0; bin < num_bins; bin++) {
        starts[bin] = rank;
        rank += counts[bin];
    }
    starts[num_bins] = rank;
    const float least = (float)(row->least * 65536);
    const float slope = (float)(row->range * 65536 / (double)(row->length - 1));
    for (size_t bin = 0; bin < num_bins; bin++) {
        float first = (float)starts[bin] * slope + least;
        float last = (float)starts[bin + 1] * slope + least;
        float low = (first < last ? first : last) - 0.25f;
        float high = (first < last ? last : first) + 0.25f;
        low = low < 0 ? 0.0f : low > 65535 ? 65535.0f : low;
        high = high < 0 ? 0.0f : high > 65535 ? 65535.0f : high;
        limits[bin] = (uint32_t)(int32_t)low << 16 | (uint32_t)(int32_t)high;
    }
}

/* Decide what the random number alone tells, and list the others: they are in row->unsure, and what
 * their number is in row->at. Returns how many there are. */
static size_t decide_by_tops(const Ranked *row, size_t num_bins) {
    const uint32_t first = row->limits[0], last = row->limits[num_bins - 1];
    const uint32_t one = first >> 16, other = last >> 16;
    const uint32_t low = one < other ? one : other;
    const uint32_t top_of_first = first & 0xFFFF, top_of_last = last & 0xFFFF;
    const uint32_t high = top_of_first > top_of_last ? top_of_first : top_of_last;
    const uint16_t *restrict tops = row->tops;
    uint8_t *restrict kept = row->kept;
    uint32_t *restrict unsure = row->unsure;
    const size_t length = row->length; /* a copy: bytes that are written might be any memory */
    size_t num = 0;
    for (size_t i = 0; i < length; i++) kept[i] = tops[i] < low;
#if defined(__AVX512F__)
    const __m512i from = _mm512_set1_epi32((int)low), span = _mm512_set1_epi32((int)(high - low));
    __m512i at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (size_t i = 0; i < length; i += 16) { /* tops are zero, or old, behind the row's end */
        __mmask16 valid = length - i >= 16 ? 0xFFFF : (__mmask16)((1u << (length - i)) - 1);
        __m512i top = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(tops + i)));
        __mmask16 open = _mm512_mask_cmple_epu32_mask(valid, _mm512_sub_epi32(top, from), span);
        _mm512_storeu_si512(unsure + num, _mm512_maskz_compress_epi32(open, at));
        num += (size_t)__builtin_popcount(open);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
    }
#else
    for (size_t i = 0; i < length; i++) {
        unsure[num] = (uint32_t)i;
        num += (uint32_t)tops[i] - low <= high - low;
    }
#endif
    return num;
}

/* Decide the listed elements by the bounds of their bins; list again what they leave open, and mark
 * it. */
static size_t decide_by_bins(const Ranked *row, size_t num_listed) {
    const uint16_t *restrict bins = row->bins, *restrict tops = row->tops;
    const uint32_t *restrict limits = row->limits;
    uint8_t *restrict kept = row->kept;
    uint32_t *unsure = row->unsure;
    size_t num = 0;
    for (size_t k = 0; k < num_listed; k++) {
        uint32_t i = unsure[k], both = limits[bins[i]], top = tops[i];
        kept[i] = top < both >> 16;
        unsure[num] = i;
        num += (top >= both >> 16) & (top <= (both & 0xFFFF));
    }
    return num;
}

/* The rank of the element `at` in a stable sort. */
static uint32_t rank_among(const uint32_t *restrict sizes, size_t num, size_t at) {
    const uint32_t own = sizes[at];
    uint32_t rank = 0;
    for (size_t i = 0; i < at; i++) rank += sizes[i] <= own;
    for (size_t i = at; i < num; i++) rank += sizes[i] < own;
    return rank;
}

/* Sort magnitudes by bin, stably, and write where the unsure ones are. starts moves to the ends. */
static void group_by_bin(const Ranked *row) {
    size_t found = 0;
    for (size_t i = 0; i < row->length; i++) {
        uint32_t to = row->starts[row->bins[i]]++;
        row->other[to] = row->sizes[i];
        row->at[found] = to;
        found += row->open[i];
    }
}

/* Write all ranks to `at`: a radix sort, which leaves out digits that are all alike. */
static void find_ranks(const Ranked *row) {
    const size_t num = row->length;
    uint32_t *from = row->other, *to = row->unsure;
    for (size_t i = 0; i < num; i++) from[i] = (uint32_t)i;
    for (unsigned shift = 0; shift < 31; shift += DIGIT) {
        uint32_t *counts = row->starts, next = 0;
        memset(counts, 0, (1 << DIGIT) * sizeof *counts);
        for (size_t i = 0; i < num; i++) counts[row->sizes[i] >> shift & ((1 << DIGIT) - 1)]++;
        if (counts[row->sizes[0] >> shift & ((1 << DIGIT) - 1)] == num) continue;
        for (size_t digit = 0; digit < 1 << DIGIT; digit++) {
            uint32_t count = counts[digit];
            counts[digit] = next;
            next += count;
        }
        for (size_t i = 0; i < num; i++)
            to[counts[row->sizes[from[i]] >> shift & ((1 << DIGIT) - 1)]++] = from[i];
        uint32_t *swapped = from;
        from = to;
        to = swapped;
    }
    for (size_t i = 0; i < num; i++) row->at[from[i]] = (uint32_t)i;
}

INLINE double chance_of(const Ranked *row, uint32_t rank) {
    return (double)rank / (double)(row->length - 1) * row->range + row->least;
}

INLINE uint8_t is_kept(const Ranked *row, uint32_t rank, uint64_t counter, uint64_t second_key) {
    return (double)(random_bits(counter, second_key) >> 11) * 0x1p-53 < chance_of(row, rank);
}

/* Count the ranks that bounds leave open, each in the whole row, or in its bin, or all by sorting. */
static void settle(const Ranked *row, size_t num, uint64_t counter, uint64_t step,
                   uint64_t second_key) {
    size_t work = 0;
    if (num <= FEW) {
        for (size_t k = 0; k < num; k++) {
            uint32_t i = row->unsure[k], rank = rank_among(row->sizes, row->length, i);
            row->kept[i] = is_kept(row, rank, counter + i * step, second_key);
        }
        return;
    }
    for (size_t k = 0; k < num; k++) work += row->counts[row->bins[row->unsure[k]]];
    if (work > PATIENCE * row->length) {
        memset(row->open, 0, row->length);
        for (size_t k = 0; k < num; k++) row->open[row->unsure[k]] = 1; /* sorting needs the list */
        find_ranks(row);
        for (size_t i = 0; i < row->length; i++)
            if (row->open[i])
                row->kept[i] = is_kept(row, row->at[i], counter + i * step, second_key);
        return;
    }
    memset(row->open, 0, row->length);
    for (size_t k = 0; k < num; k++) row->open[row->unsure[k]] = 1;
    group_by_bin(row);
    for (size_t k = 0; k < num; k++) {
        uint32_t i = row->unsure[k], bin = row->bins[i], count = row->counts[bin];
        uint32_t start = row->starts[bin] - count;
        uint32_t rank = start + rank_among(row->other + start, count, row->at[k] - start);
        row->kept[i] = is_kept(row, rank, counter + i * step, second_key);
    }
}

static void apply_kept(const uint8_t *restrict kept, float *restrict values, size_t stride,
                       size_t num) {
    if (stride != 1)
        for (size_t i = 0; i < num; i++) values[i * stride] *= kept[i] ? 1.0f : 0.0f;
    else
        for (size_t i = 0; i < num; i++) values[i] *= kept[i] ? 1.0f : 0.0f;
}

/* Keep values[0], values[stride], ... at random, by rank. place is that of the first one in the
 * tensor. With `divide` what is kept is divided by its probability. */
static void keep_by_rank(const Ranked *row, float *values, size_t stride, const uint64_t *keys,
                         uint64_t place, int divide) {
    const uint64_t counter = counter_of(place, keys), step = stride * GAMMA;
    uint32_t most = take_sizes(values, stride, row->sizes, row->length);
    if (divide) {
        find_ranks(row);
        for (size_t i = 0; i < row->length; i++) {
            double kept = is_kept(row, row->at[i], counter + i * step, keys[1]);
            double value = (double)(values[i * stride] * (float)kept);
            values[i * stride] = (float)(value * (1 / chance_of(row, row->at[i])));
        }
        return;
    }
    take_tops(counter, step, keys[1], row->tops, row->length);
    const size_t num_bins = count_sizes(row, most);
    bound_bins(row, num_bins);
    settle(row, decide_by_bins(row, decide_by_tops(row, num_bins)), counter, step, keys[1]);
    apply_kept(row->kept, values, stride, row->length);
}

#endif
