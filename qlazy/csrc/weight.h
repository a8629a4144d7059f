/* Kinds of weight, dtypes, and single elements of them, as all loops see them. */
#pragma once
#include "halves.h"
#include "simd.h"

enum { INT4 = 0, INT8 = 1, CODEBOOK4 = 2 };
enum { BFLOAT16 = 0, FLOAT32 = 1, FLOAT16 = 2 };

#define PIECE 32 /* divides every group of columns that share a scale */

INLINE float load_one(const void *from, int64_t at, int64_t dtype) {
    if (dtype == BFLOAT16) return load_bfloat16(((const uint16_t *)from)[at]);
    if (dtype == FLOAT16) return load_float16(((const uint16_t *)from)[at]);
    return ((const float *)from)[at];
}

INLINE void store_one(void *to, int64_t at, int64_t dtype, float value) {
    if (dtype == BFLOAT16) ((uint16_t *)to)[at] = bfloat16_bits(value);
    else if (dtype == FLOAT16) ((uint16_t *)to)[at] = float16_bits(value);
    else ((float *)to)[at] = value;
}
