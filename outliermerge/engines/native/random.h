/* The random numbers of rng.py: a function of a stream's two keys and an element's place alone. */
#ifndef OUTLIERMERGE_RANDOM_H
#define OUTLIERMERGE_RANDOM_H

#include "convert.h"

#define GAMMA 0x9E3779B97F4A7C15u

/* `mix` without its last step, which changes none of the first 31 bits. */
INLINE uint64_t mix_first(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    return (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
}

INLINE uint64_t mix(uint64_t bits) {
    bits = mix_first(bits);
    return bits ^ (bits >> 31);
}

/* A number in [0, 1) is the first 53 of these bits. `counter` is (place + 1) * GAMMA + keys[0]. */
INLINE uint64_t random_bits(uint64_t counter, uint64_t second_key) {
    return mix(mix(counter) ^ second_key);
}

/* The same in the first 31 bits, for less. */
INLINE uint64_t first_bits(uint64_t counter, uint64_t second_key) {
    return mix_first(mix(counter) ^ second_key);
}

INLINE uint64_t counter_of(uint64_t place, const uint64_t *keys) {
    return (place + 1) * GAMMA + keys[0];
}

/* 53 bits are below a probability if they are below this. */
INLINE uint64_t limit_of(double chance) {
    return chance <= 0 ? 0 : (uint64_t)ceil((chance > 1 ? 1.0 : chance) * 0x1p53);
}

/* Whether the first 31 bits tell all: those of most limits that are made of a float32 do. */
INLINE int is_told_by_first(uint64_t limit) {
    return limit < (uint64_t)1 << 53 && (limit << 11 & 0x1FFFFFFFFu) == 0;
}

/* Multiply what is kept by the factor, and the rest by 0: infinity becomes NaN, so that a run
 * notices it. */
static void keep_at_random(float *restrict row, const uint64_t *keys, uint64_t place,
                           uint64_t limit, float factor, size_t num) {
    const uint64_t second = keys[1], below = limit << 11;
    uint64_t counter = counter_of(place, keys);
    if (is_told_by_first(limit))
        for (size_t i = 0; i < num; i++) {
            float kept = first_bits(counter, second) < below ? 1.0f : 0.0f;
            row[i] = row[i] * kept * factor;
            counter += GAMMA;
        }
    else
        for (size_t i = 0; i < num; i++) {
            float kept = random_bits(counter, second) >> 11 < limit ? 1.0f : 0.0f;
            row[i] = row[i] * kept * factor;
            counter += GAMMA;
        }
}

/* Make values that a dtype holds exactly: each goes up or down, the likelier the nearer. Those
 * beyond the largest finite one are left as they are. The same as engines/rounding.py. */
static void round_row(char code, float *restrict row, const uint64_t *keys, uint64_t place,
                      size_t num) {
    const uint64_t second = keys[1];
    uint64_t counter = counter_of(place, keys);
    if (code == BFLOAT16)
        for (size_t i = 0; i < num; i++) {
            uint32_t bits = bits_of(row[i]), below = (uint32_t)(first_bits(counter, second) >> 48);
            uint32_t moved = (bits + below) & 0xFFFF0000;
            row[i] = float_of((bits & MAGNITUDE) < 0x7F7F0000 ? moved : bits);
            counter += GAMMA;
        }
    else
        for (size_t i = 0; i < num; i++) {
            uint32_t bits = bits_of(row[i]), size = bits & MAGNITUDE;
            uint64_t drawn = first_bits(counter, second);
            uint32_t moved = (bits + (uint32_t)(drawn >> 51)) & 0xFFFFE000;
            double below = (double)float_of(size < 0x38800000 ? size : 0); /* in steps of 2^-24 */
            double steps = below * 0x1p24 + (double)(int64_t)(drawn >> 33) * 0x1p-31;
            uint32_t small = bits_of((float)(int32_t)steps * 0x1p-24f) | (bits & ~(uint32_t)MAGNITUDE);
            row[i] = float_of(size < 0x38800000 ? small : size < 0x477FE000 ? moved : bits);
            counter += GAMMA;
        }
}

#endif
