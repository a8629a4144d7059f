/* bfloat16 and float16 to float32 and back, rounded to nearest even as torch does. */
#pragma once
#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

static inline float load_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline float round_bfloat16(float value) {
    uint32_t bits;
    if (value != value) return value;
    memcpy(&bits, &value, 4);
    bits += 0x7fff + ((bits >> 16) & 1);
    bits &= 0xffff0000u;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t bfloat16_bits(float value) {
    uint32_t bits;
    const float rounded = round_bfloat16(value);
    memcpy(&bits, &rounded, 4);
    return (uint16_t)(bits >> 16);
}

static inline float load_float16(uint16_t bits) {
#ifdef __F16C__
    return _cvtsh_ss(bits);
#else
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = (uint32_t)(bits & 0x7fff) << 13;
    float value;
    uint32_t wide;
    if ((bits & 0x7c00) == 0x7c00) { /* infinity and NaN */
        wide = sign | rest | 0x7f800000u;
        memcpy(&value, &wide, 4);
        return value;
    }
    memcpy(&value, &rest, 4);
    value *= 0x1p112f; /* the exponent's bias; right for subnormal numbers too */
    return sign ? -value : value;
#endif
}

static inline uint16_t float16_bits(float value) {
#ifdef __F16C__
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits, magnitude;
    memcpy(&bits, &value, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00;
    if (magnitude < 0x38800000u) { /* subnormal: adding 0.5 leaves the number of 2^-24 in the low bits, rounded */
        float small;
        memcpy(&small, &magnitude, 4);
        small += 0.5f;
        memcpy(&bits, &small, 4);
        return sign | (uint16_t)(bits - 0x3f000000u);
    }
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return sign | (uint16_t)((magnitude - 0x38000000u) >> 13);
#endif
}
