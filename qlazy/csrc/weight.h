/* Single elements of weights and scales, as all loops see them. */
#pragma once
#include "arguments.h"
#include "halves.h"
#include "simd.h"

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
