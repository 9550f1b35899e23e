/* Values of storage dtypes as float32, exactly, and back with one rounding to nearest even.
 *
 * Every function here converts one value; the compiler vectorises the loops around it. */
#ifndef OUTLIERMERGE_CONVERT_H
#define OUTLIERMERGE_CONVERT_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* Codes of dtypes, as Python passes them. */
enum { BFLOAT16 = 'b', FLOAT16 = 'e', FLOAT32 = 'f' };
enum { INFINITE = 0x7F800000, MAGNITUDE = 0x7FFFFFFF };

INLINE size_t item_bytes(char code) { return code == FLOAT32 ? 4 : 2; }

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float load(char code, const void *from, size_t i) {
    float value;
    uint16_t half_bits;
    if (code == FLOAT32) {
        memcpy(&value, (const char *)from + 4 * i, 4);
        return value;
    }
    memcpy(&half_bits, (const char *)from + 2 * i, 2);
    uint32_t bits = half_bits;
    if (code == BFLOAT16) return float_of(bits << 16);
    uint32_t half = bits & 0x7FFF, sign = (bits & 0x8000) << 16;
    uint32_t small = bits_of((float)(int32_t)half * 0x1p-24f); /* subnormal, or zero */
    uint32_t normal = (half << 13) + (112u << 23), special = (half << 13) | INFINITE;
    return float_of((half < 0x0400 ? small : half < 0x7C00 ? normal : special) | sign);
}

/* Store a value and return the magnitude of its bits, which is at least `infinity_of(code)` if the
 * stored value is not finite. */
INLINE uint32_t store(char code, float value, void *to, size_t i) {
    uint32_t bits = bits_of(value), size = bits & MAGNITUDE;
    if (code == FLOAT32) {
        memcpy((char *)to + 4 * i, &value, 4);
        return size;
    }
    uint32_t stored;
    if (code == BFLOAT16) {
        stored = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        stored = size > INFINITE ? 0x7FC0 : stored;
    } else {
        uint32_t normal = (size - (112u << 23) + 0x0FFF + (size >> 13 & 1)) >> 13;
        uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3F000000; /* in steps of 2^-24 */
        uint32_t special = size > INFINITE ? 0x7E00 : 0x7C00;
        stored = size < 0x38800000 ? small : size < 0x47800000 ? normal : special;
        stored |= bits >> 16 & 0x8000;
    }
    uint16_t half_bits = (uint16_t)stored;
    memcpy((char *)to + 2 * i, &half_bits, 2);
    return stored & 0x7FFF;
}

INLINE uint32_t infinity_of(char code) {
    return code == FLOAT32 ? INFINITE : code == BFLOAT16 ? 0x7F80 : 0x7C00;
}

/* Compile a statement for each dtype: in it, CODE is a constant. */
#define FOR_DTYPE(code, ...)                                              \
    do {                                                                  \
        if ((code) == BFLOAT16) {                                         \
            enum { CODE = BFLOAT16 };                                     \
            __VA_ARGS__;                                                    \
        } else if ((code) == FLOAT16) {                                   \
            enum { CODE = FLOAT16 };                                      \
            __VA_ARGS__;                                                    \
        } else {                                                          \
            enum { CODE = FLOAT32 };                                      \
            __VA_ARGS__;                                                    \
        }                                                                 \
    } while (0)

#endif
