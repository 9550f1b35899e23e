/* The random numbers of rng.py: a function of a stream's two keys and an element's place alone. */
#ifndef OUTLIERMERGE_RANDOM_H
#define OUTLIERMERGE_RANDOM_H

#include "convert.h"

#define GAMMA 0x9E3779B97F4A7C15u

INLINE uint64_t mix(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    return bits ^ (bits >> 31);
}

/* A number in [0, 1) is the first 53 of these bits. `counter` is (place + 1) * GAMMA + keys[0]. */
INLINE uint64_t random_bits(uint64_t counter, uint64_t second_key) {
    return mix(mix(counter) ^ second_key);
}

INLINE uint64_t counter_of(uint64_t place, const uint64_t *keys) {
    return (place + 1) * GAMMA + keys[0];
}

/* 53 bits are below a probability if they are below this. */
INLINE uint64_t limit_of(double chance) {
    return chance <= 0 ? 0 : (uint64_t)ceil((chance > 1 ? 1.0 : chance) * 0x1p53);
}

/* Multiply what is kept by the factor, and the rest by 0: infinity becomes NaN, so that a run
 * notices it. */
static void keep_at_random(float *restrict row, const uint64_t *keys, uint64_t place,
                           uint64_t limit, float factor, size_t num) {
    const uint64_t second = keys[1];
    uint64_t counter = counter_of(place, keys);
    for (size_t i = 0; i < num; i++) {
        float kept = (random_bits(counter, second) >> 11) < limit ? 1.0f : 0.0f;
        row[i] = row[i] * kept * factor;
        counter += GAMMA;
    }
}

#endif
