/* `quantize_int8` of qlazy/quantizing/quantize.py, straight into storage. */
#include "quantize.h"

/* One weight after the other, whatever the processor. */
INLINE uint8_t round_one(float value, float inverse) {
    const float code = rintf(value * inverse);
    return (uint8_t)((int32_t)(code < -127.0f ? -127.0f : code > 127.0f ? 127.0f : code) + 128);
}

INLINE int64_t quantize_groups(const qlazy_quantize *q, const int dtype, const int scale_dtype) {
    const int64_t group = q->group, groups = q->rows * q->columns / group;
    const void *weight = q->weight;
    uint8_t *restrict codes = q->packed; /* bytes may alias all else, and then nothing is vectorised */
    int64_t bad = -1;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * group;
        const float span = widest(weight, first, group, dtype);
        const float scale = round_scale(span / 127.0f, span, scale_dtype), inverse = 1.0f / scale;
        store_scale(q->scale, g, scale, scale_dtype);
        if (!is_finite(scale) && bad < 0) bad = first / q->columns;
        int64_t k = first;
#ifdef __AVX512BW__
        for (; k + 16 <= first + group; k += 16) { /* rounds to even and clamps in two instructions, which compilers do not find */
            const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load_16(weight, k, dtype), _mm512_set1_ps(inverse)));
            const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_max_epi32(rounded, _mm512_set1_epi32(-127)));
            _mm_storeu_si128((__m128i *)(codes + k), _mm_xor_si128(bytes, _mm_set1_epi8(-128))); /* 128 more */
        }
#endif
        for (; k < first + group; k++) codes[k] = round_one(load_float(weight, k, dtype), inverse);
    }
    return bad;
}

#define BY_SCALE(dtype) \
    (q->scale_dtype == BFLOAT16  ? quantize_groups(q, dtype, BFLOAT16) \
     : q->scale_dtype == FLOAT16 ? quantize_groups(q, dtype, FLOAT16) \
                                 : quantize_groups(q, dtype, FLOAT32))

/* codes uint8 (rows, columns). Returns the first row whose scale is not finite, -1 where there is none. */
int64_t qlazy_quantize_int8(const qlazy_quantize *q) {
    return q->dtype == BFLOAT16 ? BY_SCALE(BFLOAT16) : q->dtype == FLOAT16 ? BY_SCALE(FLOAT16) : BY_SCALE(FLOAT32);
}
