/* Rows of a low-bit weight to values. */
#include "weight.h"

typedef struct {
    const uint8_t *packed; /* all as in qlazy_product */
    const void *scale;
    const int32_t *zero;
    const float *nested_absmax, *nested_offset, *nested_code, *code;
    void *out; /* (rows, K) */
    int64_t kind, scale_dtype, out_dtype;
    int64_t first, rows, columns, group; /* first row, and how many */
    int64_t threads;
} qlazy_block;

/* (code - 128) * scale in as few operations as without the 128, and rounded once all the same, as 128 * scale is exact. */
INLINE float dequantize_byte(uint8_t code, float scale) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf((float)code, scale, -128.0f * scale);
#else
    return (float)(code - 128) * scale;
#endif
}

/* PIECE weights at a time: code to value to the dtype of the result. */
#if LANES == 16
INLINE void store_half(void *to, int64_t dtype, __m512 values) {
    if (dtype == FLOAT32) _mm512_storeu_ps(to, values);
    else if (dtype == FLOAT16) _mm256_storeu_si256(to, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
    else { /* round to nearest even; finite scales times codes, so there is no NaN to keep apart */
        const __m512i bits = _mm512_castps_si512(values), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        _mm256_storeu_si256(to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
}

INLINE void dequantize_block(const uint8_t *codes, int kind, __m512 table, int32_t zero, float scale, void *to, int64_t dtype) {
    const __m512 factor = _mm512_set1_ps(scale);
    __m128i halves[2];
    if (kind == INT8) halves[0] = _mm_loadu_si128((const __m128i *)codes), halves[1] = _mm_loadu_si128((const __m128i *)codes + 1);
    else {
        const __m128i pairs = _mm_loadu_si128((const __m128i *)codes), mask = _mm_set1_epi8(15);
        const __m128i low = _mm_and_si128(pairs, mask), high = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
        const __m128i first = kind == INT4 ? low : high, second = kind == INT4 ? high : low;
        halves[0] = _mm_unpacklo_epi8(first, second), halves[1] = _mm_unpackhi_epi8(first, second);
    }
    for (int i = 0; i < 2; i++) {
        const __m512i wide = _mm512_cvtepu8_epi32(halves[i]);
        __m512 values;
        if (kind == CODEBOOK4) values = _mm512_mul_ps(_mm512_permutexvar_ps(wide, table), factor);
        else if (kind == INT4) values = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(wide, _mm512_set1_epi32(zero))), factor);
        else values = _mm512_fmadd_ps(_mm512_cvtepi32_ps(wide), factor, _mm512_set1_ps(-128.0f * scale)); /* as `dequantize_byte` */
        store_half((char *)to + i * 16 * (dtype == FLOAT32 ? 4 : 2), dtype, values);
    }
}
#endif

static void dequantize_some(
    const uint8_t *codes, int64_t count, int64_t kind, const float *table, int32_t zero, float scale, void *to, int64_t dtype) {
    for (int64_t i = 0; i < count; i++) {
        const uint8_t byte = codes[kind == INT8 ? i : i / 2];
        const int high = kind == INT4 ? i % 2 : !(i % 2), code = high ? byte >> 4 : byte & 15;
        const float value = kind == INT8 ? dequantize_byte(byte, scale) : (kind == CODEBOOK4 ? table[code] : (float)(code - zero)) * scale;
        store_one(to, i, dtype, value);
    }
}

INLINE void dequantize_row(const qlazy_block *b, int64_t r, const int kind, const int64_t dtype) {
    const int64_t n = b->first + r, groups = b->columns / b->group;
#if LANES == 16
    const __m512 table = kind == CODEBOOK4 ? _mm512_loadu_ps(b->code) : _mm512_setzero_ps();
#endif
    for (int64_t g = 0; g < groups; g++) {
        const int64_t at = n * groups + g, end = (g + 1) * b->group;
        const float scale = b->nested_code ? b->nested_code[((const uint8_t *)b->scale)[at]] * b->nested_absmax[at / 256] + *b->nested_offset
                                           : load_one(b->scale, at, b->scale_dtype);
        const int32_t zero = kind != INT4 ? 0 : b->zero ? (int32_t)((uint32_t)b->zero[n / 8 * groups + g] >> n % 8 * 4 & 15) : 8;
        for (int64_t k = g * b->group; k < end; k += PIECE) {
            const int64_t flat = n * b->columns + k, count = end - k < PIECE ? end - k : PIECE;
            const uint8_t *codes = b->packed + (kind == INT8 ? flat : flat / 2);
            char *to = (char *)b->out + (r * b->columns + k) * (dtype == FLOAT32 ? 4 : 2);
#if LANES == 16
            if (count == PIECE) {
                dequantize_block(codes, kind, table, zero, scale, to, dtype);
                continue;
            }
#endif
            dequantize_some(codes, count, kind, b->code, zero, scale, to, dtype);
        }
    }
}

/* Rows of a weight as the model computes with them: code times scale in float32, rounded once. */
void qlazy_dequantize(const qlazy_block *b) {
    const int64_t share = b->rows / (b->threads * 8) + 1;
#pragma omp parallel for num_threads(b->threads) schedule(dynamic, share)
    for (int64_t r = 0; r < b->rows; r++) {
        if (b->kind == INT4 && b->out_dtype == BFLOAT16) dequantize_row(b, r, INT4, BFLOAT16);
        else if (b->kind == INT4) dequantize_row(b, r, INT4, b->out_dtype);
        else if (b->kind == INT8) dequantize_row(b, r, INT8, b->out_dtype);
        else dequantize_row(b, r, CODEBOOK4, b->out_dtype);
    }
}
