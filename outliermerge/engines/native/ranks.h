/* DELLA's choice in one row: an element is kept with a probability that grows with the rank of its
 * magnitude.
 *
 * Sorting is mostly avoided. Magnitudes are counted in bins, which bounds every rank, and so every
 * probability. For nearly all elements the bounds of some neighbouring bins together decide, for
 * most of the others those of their own bin. For the rest the exact rank is counted, so that the
 * choice is that of a stable sort. */
#ifndef OUTLIERMERGE_RANKS_H
#define OUTLIERMERGE_RANKS_H

#include "rank_bins.h"

enum {
    FEW = 16,      /* unsure elements whose ranks are counted in the whole row */
    PATIENCE = 64, /* comparisons for each element of a row, before the row is sorted */
    DIGIT = 11,
};

enum { UNKNOWN, ALIKE, NOT_ALIKE };

#if defined(__AVX2__) && !defined(__AVX512BW__)
/* Look up bytes in a table of 64, by places below 64. */
INLINE __m256i looked_up(const uint8_t *table, __m256i places) {
    __m256i found = _mm256_setzero_si256();
    for (int part = 0; part < GROUPS / 16; part++) {
        __m128i own = _mm_loadu_si128((const void *)(table + 16 * part));
        /* Places in this part are at most 0x7F then; the shuffle gives 0 for all above. */
        __m256i at = _mm256_xor_si256(places, _mm256_set1_epi8((char)(16 * part)));
        at = _mm256_adds_epu8(at, _mm256_set1_epi8(0x70));
        found = _mm256_or_si256(found, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(own), at));
    }
    return found;
}

INLINE __m256i at_least(__m256i a, __m256i b) { return _mm256_cmpeq_epi16(_mm256_max_epu16(a, b), a); }

INLINE __m256i in_order(__m256i packed) { return _mm256_permute4x64_epi64(packed, 0xD8); }
#endif

/* Decide what the random number and the bounds of groups tell, and list the others in row->unsure.
 * Returns how many there are. */
static size_t decide_by_groups(const Ranked *row) {
    const unsigned shift = row->digits - 3;
    const uint16_t *restrict tops = row->tops, *restrict bins = row->bins;
    uint8_t *restrict kept = row->kept;
    uint32_t *restrict unsure = row->unsure;
    const size_t length = row->length; /* a copy: bytes that are written might be any memory */
    size_t num = 0;
#if defined(__AVX512BW__)
    const __m512i lows[2] = {_mm512_loadu_si512(row->lows), _mm512_loadu_si512(row->lows + 32)};
    const __m512i highs[2] = {_mm512_loadu_si512(row->highs), _mm512_loadu_si512(row->highs + 32)};
    const __m512i columns = _mm512_set1_epi16(COLUMNS - 1), half = _mm512_set1_epi16(GROUPS);
    const __m128i by = _mm_cvtsi32_si128((int)shift);
    for (size_t i = 0; i < length; i += 32) { /* what is behind the row's end is zero, or old */
        __mmask32 valid = length - i >= 32 ? ~0u : (1u << (length - i)) - 1;
        __m512i top = _mm512_loadu_si512(tops + i), bin = _mm512_loadu_si512(bins + i);
        __m512i group = _mm512_slli_epi16(_mm512_and_si512(bin, columns), 3);
        group = _mm512_or_si512(group, _mm512_srl_epi16(bin, by));
        group = _mm512_subs_epu16(group, half);
        __mmask32 below = _mm512_cmplt_epu16_mask(top, _mm512_permutex2var_epi16(lows[0], group, lows[1]));
        __mmask32 above = _mm512_cmpgt_epu16_mask(top, _mm512_permutex2var_epi16(highs[0], group, highs[1]));
        uint32_t open = valid & ~(below | above);
        _mm256_storeu_si256((void *)(kept + i), _mm256_maskz_set1_epi8(below, 1));
        for (; open; open &= open - 1) unsure[num++] = (uint32_t)(i + (size_t)__builtin_ctz(open));
    }
#elif defined(__AVX2__)
    uint8_t bounds[4][GROUPS]; /* the bytes of low ones, and of high ones */
    for (size_t group = 0; group < GROUPS; group++) {
        bounds[0][group] = (uint8_t)row->lows[group];
        bounds[1][group] = (uint8_t)(row->lows[group] >> 8);
        bounds[2][group] = (uint8_t)row->highs[group];
        bounds[3][group] = (uint8_t)(row->highs[group] >> 8);
    }
    const __m256i columns = _mm256_set1_epi16(COLUMNS - 1), half = _mm256_set1_epi16(GROUPS);
    const __m128i by = _mm_cvtsi32_si128((int)shift);
    for (size_t i = 0; i < length; i += 32) { /* what is behind the row's end is zero, or old */
        __m256i top[2], group[2], below[2], inside[2];
        for (int k = 0; k < 2; k++) {
            __m256i bin = _mm256_loadu_si256((const void *)(bins + i + 16 * k));
            top[k] = _mm256_loadu_si256((const void *)(tops + i + 16 * k));
            group[k] = _mm256_slli_epi16(_mm256_and_si256(bin, columns), 3);
            group[k] = _mm256_or_si256(group[k], _mm256_srl_epi16(bin, by));
            group[k] = _mm256_subs_epu16(group[k], half);
        }
        __m256i places = _mm256_packus_epi16(group[0], group[1]), found[4];
        for (int k = 0; k < 4; k++) found[k] = looked_up(bounds[k], places);
        const __m256i lows[2] = {_mm256_unpacklo_epi8(found[0], found[1]),
                                 _mm256_unpackhi_epi8(found[0], found[1])};
        const __m256i highs[2] = {_mm256_unpacklo_epi8(found[2], found[3]),
                                  _mm256_unpackhi_epi8(found[2], found[3])};
        for (int k = 0; k < 2; k++) {
            __m256i from_low = at_least(top[k], lows[k]);
            inside[k] = _mm256_and_si256(from_low, at_least(highs[k], top[k]));
            below[k] = _mm256_add_epi16(from_low, _mm256_set1_epi16(1));
        }
        _mm256_storeu_si256((void *)(kept + i), in_order(_mm256_packus_epi16(below[0], below[1])));
        uint32_t valid = length - i >= 32 ? ~0u : (1u << (length - i)) - 1;
        __m256i both = in_order(_mm256_packs_epi16(inside[0], inside[1]));
        uint32_t open = valid & (uint32_t)_mm256_movemask_epi8(both);
        for (; open; open &= open - 1)
            unsure[num++] = (uint32_t)(i + (size_t)__builtin_ctz(open));
    }
#else
    uint32_t bounds[2 * GROUPS]; /* the low one, and how far the high one is from it */
    for (size_t i = 0; i < 2 * GROUPS; i++) {
        uint32_t group = i < GROUPS ? 0 : (uint32_t)i - GROUPS, low = row->lows[group];
        bounds[i] = low << 16 | (row->highs[group] - low);
    }
    for (size_t i = 0; i < length; i++) {
        uint32_t bin = bins[i], top = tops[i];
        uint32_t both = bounds[((bin % COLUMNS) << 3 | bin >> shift) % (2 * GROUPS)];
        uint32_t away = top - (both >> 16);
        kept[i] = (uint8_t)(away >> 31);
        unsure[num] = (uint32_t)i;
        num += away <= (both & 0xFFFF);
    }
#endif
    return num;
}

/* Decide the listed elements by the bounds of their bins; list again what they leave open. */
static size_t decide_by_bins(const Ranked *row, size_t num_listed) {
    const float least = (float)(row->least * 65536);
    const float slope = (float)(row->range * 65536 / (double)(row->length - 1));
    uint8_t *restrict kept = row->kept;
    uint32_t *restrict unsure = row->unsure;
    size_t num = 0;
    for (size_t k = 0; k < num_listed; k++) {
        uint32_t i = unsure[k], bin = row->bins[i], start = row->starts[bin];
        float one = (float)start * slope + least;
        float other = (float)(start + row->counts[bin]) * slope + least;
        float low = (one < other ? one : other) - 1.25f, high = (one < other ? other : one) + 0.25f;
        float top = row->tops[i];
        kept[i] = top < low;
        unsure[num] = i;
        num += (row->sizes[i] != 0) & (top >= low) & (top <= high);
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

/* The rank of an element in its row. */
static uint32_t rank_in_row(const Ranked *row, size_t at) {
#if defined(__AVX512F__)
    const __m512i *sizes = (const __m512i *)row->sizes, own = _mm512_set1_epi32((int)row->sizes[at]);
    const size_t near = at / 16, num = (row->length + 15) / 16;
    uint32_t rank = 0, before = (1u << at % 16) - 1;
#pragma GCC unroll 4
    for (size_t i = 0; i < near; i++)
        rank += (uint32_t)__builtin_popcount(_mm512_cmple_epu32_mask(sizes[i], own));
    rank += (uint32_t)__builtin_popcount(_mm512_cmpeq_epu32_mask(sizes[near], own) & before);
#pragma GCC unroll 4
    for (size_t i = near; i < num; i++)
        rank += (uint32_t)__builtin_popcount(_mm512_cmplt_epu32_mask(sizes[i], own));
    return rank;
#else
    return rank_among(row->sizes, row->length, at);
#endif
}

/* Sort magnitudes by bin, stably, and write where the unsure ones are. starts moves to the ends. */
static void group_by_bin(const Ranked *row, size_t num_unsure) {
    const uint16_t *restrict bins = row->bins;
    const uint32_t *restrict sizes = row->sizes;
    uint32_t *restrict starts = row->starts, *restrict other = row->other;
    size_t i = 0;
    for (size_t k = 0; k <= num_unsure; k++) {
        size_t stop = k < num_unsure ? row->unsure[k] : row->length;
#pragma GCC unroll 4
        for (; i < stop; i++) other[starts[bins[i]]++] = sizes[i];
        if (k < num_unsure) row->at[k] = starts[bins[i]];
    }
}

/* The rank of an unsure element of a bin, when magnitudes are sorted by bin. Of a bin whose
 * magnitudes are all equal it is where the element is; row->alike tells which bins are. */
static uint32_t rank_in_bin(const Ranked *row, uint32_t bin, uint32_t at) {
    const uint32_t count = row->counts[bin], start = row->starts[bin] - count;
    const uint32_t *restrict members = row->other + start;
    if (row->alike[bin] == UNKNOWN) {
        uint32_t differing = 0;
        for (size_t i = 0; i < count; i++) differing |= members[i] ^ members[0];
        row->alike[bin] = differing ? NOT_ALIKE : ALIKE;
    }
    return row->alike[bin] == ALIKE ? at : start + rank_among(members, count, at - start);
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
            uint32_t i = row->unsure[k], rank = rank_in_row(row, i);
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
    group_by_bin(row, num);
    memset(row->alike, UNKNOWN, (1u << row->digits) + ZEROS);
    for (size_t k = 0; k < num; k++) {
        uint32_t i = row->unsure[k], rank = rank_in_bin(row, row->bins[i], row->at[k]);
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

/* Choose by rank which of values[0], values[stride], ... are kept, and write it to row->kept. place
 * is that of the first one in the tensor. */
static void choose_by_rank(Ranked *row, const float *values, size_t stride, const uint64_t *keys,
                           uint64_t place) {
    const uint64_t counter = counter_of(place, keys), step = stride * GAMMA;
    const uint32_t most = stride == 1 ? take_sizes(values, 1, row->sizes, row->length)
                                      : take_sizes(values, stride, row->sizes, row->length);
    take_tops(counter, step, keys[1], row->tops, row->length);
    count_sizes(row, most);
    bound_groups(row);
    settle(row, decide_by_bins(row, decide_by_groups(row)), counter, step, keys[1]);
}

/* Keep them, divided by the probability of that. */
static void divide_by_chance(Ranked *row, float *values, size_t stride, const uint64_t *keys,
                             uint64_t place) {
    const uint64_t counter = counter_of(place, keys), step = stride * GAMMA;
    take_sizes(values, stride, row->sizes, row->length);
    find_ranks(row);
    for (size_t i = 0; i < row->length; i++) {
        double kept = is_kept(row, row->at[i], counter + i * step, keys[1]);
        double value = (double)(values[i * stride] * (float)kept);
        values[i * stride] = (float)(value * (1 / chance_of(row, row->at[i])));
    }
}

#endif
