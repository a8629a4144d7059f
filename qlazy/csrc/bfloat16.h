/* bfloat16 to float32 and back, rounded to nearest even as torch does. */
#pragma once
#include <stdint.h>
#include <string.h>

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
