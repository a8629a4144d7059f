/* Products with low-bit weights, and their dequantization, for few and for many tokens. */
#include "bfloat16.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

/* `dequantize_int4_cpu_rows`: blocks of 64 rows in torch's AVX-512 order to bfloat16, transposed. `packed` and `scale` begin at the
 * first row; `scale` holds (groups, all_rows, 2) bfloat16, scale and offset side by side. (code - 8) * scale is exact in float32. */
void qlazy_unpack_int4_cpu(
    const uint8_t *packed, const uint16_t *scale, int64_t rows, int64_t columns, int64_t groups, int64_t all_rows, uint16_t *out) {
    const int64_t group = columns / groups;
    for (int64_t block = 0; block < rows; block += 64) {
        const uint8_t *in = packed + block * columns / 2;
        for (int64_t g = 0; g < groups; g++) {
            const uint16_t *both = scale + (g * all_rows + block) * 2;
            float factor[64], offset[64];
            for (int i = 0; i < 64; i++) factor[i] = load_bfloat16(both[2 * i]), offset[i] = load_bfloat16(both[2 * i + 1]);
            for (int64_t k = g * group; k < (g + 1) * group; k++) {
                uint16_t *row = out + k * rows + block;
                float value[64];
                for (int i = 0; i < 32; i++) {
                    const int32_t byte = in[k * 32 + i];
                    value[i] = offset[i] + (float)((byte & 15) - 8) * factor[i];
                    value[i + 32] = offset[i + 32] + (float)((byte >> 4) - 8) * factor[i + 32];
                }
                for (int i = 0; i < 64; i++) { /* finite by construction: no NaN to keep apart */
                    uint32_t bits;
                    memcpy(&bits, &value[i], 4);
                    row[i] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
                }
            }
        }
    }
}

typedef struct {
    const uint8_t *packed;        /* (N * K / 2): even element in the high nibble */
    const float *absmax;          /* (N * K / 64), or NULL where nested */
    const uint8_t *absmax_packed; /* the same in 8 bits */
    const float *nested_absmax;   /* one for every 256 of them */
    const float *nested_code;     /* the 256 values that they stand for */
    float nested_offset;
    float code[16];
    int64_t columns; /* K, a multiple of 64 */
    int64_t all_rows; /* N */
} qlazy_codebook4;

/* y (tokens, N) = x W' for one or a few tokens. `x` is float32 and comes sorted: in every 64 columns first
 * the 32 even ones, then the 32 odd ones. A block of 64 is summed in float32 and then multiplied by its absmax. */
void qlazy_codebook4_product(const qlazy_codebook4 *w, const float *x, int64_t tokens, int64_t threads, float *y) {
    const int64_t blocks = w->columns / 64;
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < w->all_rows; n++) {
        for (int64_t m = 0; m < tokens; m++) {
            const float *values = x + m * w->columns;
            float lanes[16] = {0};
#ifdef __AVX512F__
            const __m512 code = _mm512_loadu_ps(w->code);
            __m512 total = _mm512_setzero_ps();
#endif
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t at = n * blocks + b;
                const uint8_t *bytes = w->packed + at * 32;
                const float *even = values + b * 64, *odd = even + 32;
                const float absmax = w->absmax ? w->absmax[at]
                                               : w->nested_code[w->absmax_packed[at]] * w->nested_absmax[at / 256] + w->nested_offset;
#ifdef __AVX512F__
                __m512 sum = _mm512_setzero_ps();
                for (int i = 0; i < 32; i += 16) {
                    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(bytes + i)));
                    const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), code);
                    const __m512 low = _mm512_permutexvar_ps(wide, code); /* looks at four bits alone */
                    sum = _mm512_fmadd_ps(high, _mm512_loadu_ps(even + i), sum);
                    sum = _mm512_fmadd_ps(low, _mm512_loadu_ps(odd + i), sum);
                }
                total = _mm512_fmadd_ps(sum, _mm512_set1_ps(absmax), total);
#else
                for (int i = 0; i < 32; i++)
                    lanes[i % 16] += (w->code[bytes[i] >> 4] * even[i] + w->code[bytes[i] & 15] * odd[i]) * absmax;
#endif
            }
#ifdef __AVX512F__
            _mm512_storeu_ps(lanes, total);
#endif
            float sum = 0.0f;
            for (int i = 0; i < 16; i++) sum += lanes[i];
            y[m * w->all_rows + n] = sum;
        }
    }
}
