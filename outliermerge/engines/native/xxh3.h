/* XXH3, 128 bits, seed 0, for inputs longer than 240 bytes; shorter inputs use other algorithms.
 *
 * Written from the algorithm's specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md),
 * whose constants these are; tested against the xxhash package. */
#ifndef OUTLIERMERGE_XXH3_H
#define OUTLIERMERGE_XXH3_H

#include "convert.h"

enum { STRIPE = 64, STRIPES = 16, SECRET_BYTES = 192, DIGEST_BYTES = 16, SHORT_BYTES = 240 };

static const uint64_t PRIME32_1 = 0x9E3779B1u, PRIME32_2 = 0x85EBCA77u, PRIME32_3 = 0xC2B2AE3Du;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87u, PRIME64_2 = 0xC2B2AE3D27D4EB4Fu;
static const uint64_t PRIME64_3 = 0x165667B19E3779F9u, PRIME64_4 = 0x85EBCA77C2B2AE63u;
static const uint64_t PRIME64_5 = 0x27D4EB2F165667C5u;

static const uint8_t SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

INLINE uint64_t read64(const uint8_t *from) {
    uint64_t value;
    memcpy(&value, from, 8);
    return value;
}

/* Eight accumulators; the eight words of a stripe are mixed into them. */
#if defined(__AVX512F__)
typedef struct {
    __m512i all;
} Sums;

INLINE void add_stripe(Sums *sums, const uint8_t *data, const uint8_t *secret) {
    __m512i words = _mm512_loadu_si512(data);
    __m512i key = _mm512_xor_si512(words, _mm512_loadu_si512(secret));
    sums->all = _mm512_add_epi64(sums->all, _mm512_shuffle_epi32(words, _MM_PERM_BADC));
    key = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    sums->all = _mm512_add_epi64(sums->all, key);
}
#elif defined(__AVX2__)
typedef struct {
    __m256i halves[2];
} Sums;

INLINE void add_stripe(Sums *sums, const uint8_t *data, const uint8_t *secret) {
    for (int half = 0; half < 2; half++) {
        __m256i words = _mm256_loadu_si256((const __m256i *)(const void *)data + half);
        __m256i key = _mm256_loadu_si256((const __m256i *)(const void *)secret + half);
        key = _mm256_xor_si256(words, key);
        words = _mm256_shuffle_epi32(words, 0x4E);
        sums->halves[half] = _mm256_add_epi64(sums->halves[half], words);
        key = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
        sums->halves[half] = _mm256_add_epi64(sums->halves[half], key);
    }
}
#else
typedef struct {
    uint64_t words[8];
} Sums;

INLINE void add_stripe(Sums *sums, const uint8_t *data, const uint8_t *secret) {
    for (int i = 0; i < 8; i++) {
        uint64_t word = read64(data + 8 * i), key = word ^ read64(secret + 8 * i);
        sums->words[i ^ 1] += word;
        sums->words[i] += (key & 0xFFFFFFFFu) * (key >> 32);
    }
}
#endif

INLINE void scramble(Sums *sums, const uint8_t *secret) {
    uint64_t words[8];
    memcpy(words, sums, sizeof words);
    for (int i = 0; i < 8; i++)
        words[i] = (words[i] ^ (words[i] >> 47) ^ read64(secret + 8 * i)) * PRIME32_1;
    memcpy(sums, words, sizeof words);
}

static uint64_t merged(const uint64_t *words, const uint8_t *secret, uint64_t start) {
    for (int i = 0; i < 4; i++) {
        unsigned __int128 product = (unsigned __int128)(words[2 * i] ^ read64(secret + 16 * i)) *
                                    (words[2 * i + 1] ^ read64(secret + 16 * i + 8));
        start += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    start = (start ^ (start >> 37)) * 0x165667919E3779F9u;
    return start ^ (start >> 32);
}

/* Write the canonical digest of more than SHORT_BYTES bytes. */
static void xxh3_128(const void *from, size_t num_bytes, uint8_t *digest) {
    const uint64_t start[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                               PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    const uint8_t *data = from, *end = data + num_bytes;
    const uint8_t *last_secret = SECRET + SECRET_BYTES - STRIPE;
    Sums sums;
    memcpy(&sums, start, sizeof start);
    for (; data + STRIPES * STRIPE < end; data += STRIPES * STRIPE) {
        for (int i = 0; i < STRIPES; i++) add_stripe(&sums, data + STRIPE * i, SECRET + 8 * i);
        scramble(&sums, last_secret);
    }
    for (int i = 0; data + STRIPE < end; i++, data += STRIPE)
        add_stripe(&sums, data, SECRET + 8 * i);
    add_stripe(&sums, end - STRIPE, last_secret - 7);
    uint64_t words[8];
    memcpy(words, &sums, sizeof words);
    uint64_t high = merged(words, last_secret - 11, ~(num_bytes * PRIME64_2));
    uint64_t low = merged(words, SECRET + 11, num_bytes * PRIME64_1);
    for (int i = 0; i < 8; i++) {
        digest[i] = (uint8_t)(high >> (56 - 8 * i));
        digest[8 + i] = (uint8_t)(low >> (56 - 8 * i));
    }
}

#endif
