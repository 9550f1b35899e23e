/* exp and log in double, which the compiler vectorises, so that all processors give the same bits.
 * Their errors are a few units of the last place. */
#ifndef OUTLIERMERGE_FUNCTIONS_H
#define OUTLIERMERGE_FUNCTIONS_H

#include "convert.h"

#define LN2_HIGH 0x1.62e42fefa0000p-1 /* so that its products with exponents are exact */
#define LN2_LOW 0x1.cf79abc9e3b3ap-40
#define TO_INTEGER 0x1.8p52 /* a sum with it is rounded to an integer, in its last bits */

INLINE uint64_t bits_of_double(double value) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return bits;
}

INLINE double double_of(uint64_t bits) {
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

/* exp of a number of at most 708; below -708 that of -708, which is 3e-308. */
INLINE double exp_of(double x) {
    static const double terms[] = {
        1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
        1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
        1.0 / 6,          0.5,             1.0,            1.0};
    x = x < -708 ? -708 : x;
    const double shifted = x * 0x1.71547652b82fep0 + TO_INTEGER, power = shifted - TO_INTEGER;
    const double rest = (x - power * LN2_HIGH) - power * LN2_LOW;
    double sum = terms[0];
#pragma GCC unroll 16
    for (int i = 1; i < 14; i++) sum = sum * rest + terms[i];
    return sum * double_of((bits_of_double(shifted) + 1023) << 52);
}

/* log of a positive number that is not subnormal; NaN of NaN. */
INLINE double log_of(double x) {
    const uint64_t root = 0x3FE6A09E667F3BCDu; /* of 1/2 */
    const uint64_t bits = bits_of_double(x), moved = bits - root + ((uint64_t)1023 << 52);
    const double power = double_of(moved >> 52 | 0x4330000000000000u) - (0x1p52 + 1023);
    const double part = double_of(bits - ((moved >> 52) << 52) + ((uint64_t)1023 << 52));
    const double share = (part - 1) / (part + 1), square = share * share;
    double sum = 1.0 / 23;
#pragma GCC unroll 16
    for (int i = 21; i > 0; i -= 2) sum = sum * square + 1.0 / i;
    return power * LN2_HIGH + (2 * share * sum + power * LN2_LOW) + (x - x);
}

#endif
