/* What the quantizers share: the weight that comes in, the storage that it goes to, and how floats are read and scales rounded.
 *
 * The Python in qlazy/quantizing/quantize.py and codebook.py is the definition; these loops give the same bytes. That means: every
 * float32 operation rounded by itself (compile with -ffp-contract=off, never -ffast-math), division by the hardware,
 * round-half-to-even.
 */
#pragma once
#include "halves.h"
#include <math.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#if defined(__AVX512BW__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

enum { BFLOAT16 = 0, FLOAT32 = 1, FLOAT16 = 2 };

typedef struct {
    const void *weight;   /* (rows, columns) of `dtype`, row by row */
    void *packed;         /* where its first row belongs */
    void *scale;          /* (rows, groups) of `scale_dtype`; codebooks: absmax, float32 for every 64 elements */
    uint32_t *zero;       /* int4: (ceil(rows / 8), groups), a nibble for each row; NULL where the zero is 8 everywhere */
    const float *factors; /* int4: the candidates; codebooks: the 15 boundaries, then the change of code at each */
    int64_t dtype, scale_dtype, rows, columns, group;
    int64_t count; /* int4: number of candidates; codebooks: the code of the least value */
} qlazy_quantize;

#define INLINE static inline __attribute__((always_inline))

/* `load_float16` for numbers that are finite, in operations that the compiler finds vectors for. */
INLINE float load_finite_float16(uint16_t half) {
    const uint32_t rest = (uint32_t)(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &rest, 4);
    value *= 0x1p112f; /* the exponent's bias; right for subnormal numbers too */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits |= (uint32_t)(half & 0x8000) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

/* A weight, right if it is finite; what becomes of others does not matter, as their scale tells. */
INLINE float load_float(const void *from, int64_t at, const int dtype) {
    if (dtype == BFLOAT16) return load_bfloat16(((const uint16_t *)from)[at]);
    if (dtype == FLOAT16) return load_finite_float16(((const uint16_t *)from)[at]);
    return ((const float *)from)[at];
}

#ifdef __AVX512BW__
INLINE __m512 load_16(const void *from, int64_t at, const int dtype) {
    if (dtype == FLOAT32) return _mm512_loadu_ps((const float *)from + at);
    const __m256i halves = _mm256_loadu_si256((const __m256i *)((const uint16_t *)from + at));
    return dtype == FLOAT16 ? _mm512_cvtph_ps(halves) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
#endif

/* Largest magnitude, by its bits: they order as the numbers do, and NaN comes out above infinity. */
INLINE float widest(const void *from, int64_t first, int64_t count, const int dtype) {
    if (dtype == FLOAT32) {
        uint32_t most = 0;
        for (int64_t k = first; k < first + count; k++) {
            const uint32_t bits = ((const uint32_t *)from)[k] & 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        float value;
        memcpy(&value, &most, 4);
        return value;
    }
    uint16_t most = 0;
    for (int64_t k = first; k < first + count; k++) {
        const uint16_t bits = ((const uint16_t *)from)[k] & 0x7fff;
        most = bits > most ? bits : most;
    }
    return dtype == BFLOAT16 ? load_bfloat16(most) : load_float16(most);
}

/* `_round_scale` of qlazy/quantizing/quantize.py: as it will be stored, never 0, and 1 for a group of zeros. */
INLINE float round_scale(float scale, float span, const int64_t dtype) {
    const float stored = dtype == BFLOAT16 ? round_bfloat16(scale) : dtype == FLOAT16 ? load_float16(float16_bits(scale)) : scale;
    const float least = dtype == FLOAT16 ? 0x1p-24f : 0x1p-126f;
    return span == 0.0f ? 1.0f : stored < least ? least : stored;
}

INLINE void store_scale(void *to, int64_t at, float scale, const int64_t dtype) {
    if (dtype == BFLOAT16) ((uint16_t *)to)[at] = bfloat16_bits(scale);
    else if (dtype == FLOAT16) ((uint16_t *)to)[at] = float16_bits(scale);
    else ((float *)to)[at] = scale;
}

static inline int is_finite(float value) { return value - value == 0.0f; }
