/* The hot loop of qlazy/quantize.py, compiled on the machine that runs it. The Python there is the definition; this gives the same bytes.
 *
 * Same bytes means: every float32 operation rounded by itself (compile with -ffp-contract=off, never -ffast-math), division and
 * round-half-to-even by the hardware, the same pairwise tree for sums, the same order of candidates, a later one only if strictly less.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define MAX_GROUP 128
#define MAX_CANDIDATES 16

typedef struct {
    int32_t symmetric;     /* 1: the zero is 8 and not stored */
    int32_t bfloat16_in;   /* 1: weights are bfloat16, 0: float32 */
    int32_t bfloat16_scale; /* 1: scales are rounded to bfloat16, 0: float32 */
    int32_t candidates;
    float factors[MAX_CANDIDATES];
} qlazy_int4_options;

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

/* `_round_scale`: as it will be stored, never 0, and 1 for a group of zeros. Both dtypes have 2^-126 as their least normal number. */
static inline float round_scale(float scale, float span, int bfloat16) {
    float stored = bfloat16 ? round_bfloat16(scale) : scale;
    if (span == 0.0f) return 1.0f;
    return stored < 0x1p-126f ? 0x1p-126f : stored;
}

/* Groups are worked on sixteen at a time, one a vector lane: element k of all sixteen lies in one row of these arrays, so that
 * every step, sums included, goes down the rows and none goes across a vector. */
#define LANES 16
#define EACH for (int i = 0; i < LANES; i++)
typedef float rows[MAX_GROUP][LANES];

static inline float clamp(float value, float low, float high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

/* `_tree_sum`: fold the upper half onto the lower. Destroys `values`; the sums are its first row. */
static inline __attribute__((always_inline)) void tree_sum(rows values, const int group) {
    for (int half = group / 2; half > 0; half /= 2)
        for (int k = 0; k < half; k++) EACH values[k][i] += values[half + k][i];
}

static inline __attribute__((always_inline)) void quantize_lanes(
    rows w, const int group, const qlazy_int4_options *o, rows work, float *scale, float *zero) {
    float high[LANES], low[LANES], poison[LANES], span[LANES], middle[LANES], widest[LANES], least[LANES];
    float s[LANES], inverse[LANES], z[LANES], bottom[LANES], top[LANES], along[LANES];
    EACH high[i] = low[i] = w[0][i], poison[i] = w[0][i] * 0.0f;
    for (int k = 1; k < group; k++) EACH {
        high[i] = w[k][i] > high[i] ? w[k][i] : high[i];
        low[i] = w[k][i] < low[i] ? w[k][i] : low[i];
        poison[i] += w[k][i] * 0.0f; /* NaN once a weight is NaN or infinite */
    }
    EACH {
        if (o->symmetric) {
            span[i] = high[i] > -low[i] ? high[i] : -low[i];
            middle[i] = 0.0f;
            widest[i] = span[i] / 7.0f;
        } else {
            low[i] = low[i] < 0.0f ? low[i] : 0.0f;
            high[i] = high[i] > 0.0f ? high[i] : 0.0f;
            span[i] = high[i] - low[i];
            middle[i] = (high[i] + low[i]) * 0.5f;
            widest[i] = span[i] / 15.0f;
        }
    }
    for (int c = 0; c < o->candidates; c++) {
        EACH {
            s[i] = round_scale(widest[i] * o->factors[c], span[i], o->bfloat16_scale);
            inverse[i] = 1.0f / s[i];
            z[i] = c == 0 ? -(low[i] / s[i]) : -(middle[i] / s[i]) + 7.5f;
            z[i] = o->symmetric ? 8.0f : clamp(rintf(z[i]), 0.0f, 15.0f);
            bottom[i] = -z[i], top[i] = 15.0f - z[i];
        }
        for (int k = 0; k < group; k++) EACH {
            const float real = w[k][i] * inverse[i];
            const float error = clamp(rintf(real), bottom[i], top[i]) - real;
            work[k][i] = error * error;
        }
        tree_sum(work, group);
        EACH {
            const float in_units = work[0][i] * s[i];
            const float loss = in_units * s[i];
            const int better = c == 0 || loss < least[i];
            scale[i] = better ? s[i] : scale[i];
            zero[i] = better ? z[i] : zero[i];
            least[i] = better ? loss : least[i];
        }
    }
    EACH inverse[i] = 1.0f / scale[i], bottom[i] = -zero[i], top[i] = 15.0f - zero[i];
    for (int k = 0; k < group; k++) EACH work[k][i] = w[k][i] * clamp(rintf(w[k][i] * inverse[i]), bottom[i], top[i]);
    tree_sum(work, group);
    EACH along[i] = work[0][i];
    for (int k = 0; k < group; k++) EACH {
        const float code = clamp(rintf(w[k][i] * inverse[i]), bottom[i], top[i]);
        work[k][i] = code * code;
    }
    tree_sum(work, group);
    EACH {
        const float square = work[0][i];
        if (square > 0.0f) scale[i] = round_scale(along[i] / square, square, o->bfloat16_scale);
        inverse[i] = 1.0f / scale[i];
    }
    for (int k = 0; k < group; k++) EACH work[k][i] = clamp(rintf(w[k][i] * inverse[i]) + zero[i], 0.0f, 15.0f);
    EACH {
        scale[i] = poison[i] == poison[i] ? scale[i] : NAN;
        zero[i] = poison[i] == poison[i] ? zero[i] : 0.0f;
    }
}

static inline __attribute__((always_inline)) void quantize_groups(
    const void *weight, int64_t groups, const int group, const qlazy_int4_options *o, uint8_t *codes, float *scale, uint8_t *zero) {
    rows w, work;
    float scales[LANES], zeros[LANES];
    for (int64_t first = 0; first < groups; first += LANES) {
        for (int i = 0; i < LANES; i++) { /* the last lanes may have no group of their own and repeat the last one */
            const int64_t at = (first + i < groups ? first + i : groups - 1) * group;
            if (o->bfloat16_in) for (int k = 0; k < group; k++) w[k][i] = load_bfloat16(((const uint16_t *)weight)[at + k]);
            else for (int k = 0; k < group; k++) w[k][i] = ((const float *)weight)[at + k];
        }
        quantize_lanes(w, group, o, work, scales, zeros);
        const int64_t count = groups - first < LANES ? groups - first : LANES;
        for (int64_t i = 0; i < count; i++) {
            uint8_t *out = codes + (first + i) * group;
            for (int k = 0; k < group; k++) out[k] = (uint8_t)(int32_t)work[k][i];
            scale[first + i] = scales[i];
            zero[first + i] = (uint8_t)(int32_t)zeros[i];
        }
    }
}

/* `quantize_int4` for groups of 32, 64 and 128: codes uint8 (groups, group), scale float32 (groups), zero uint8 (groups). */
void qlazy_quantize_int4(
    const void *weight, int64_t groups, int32_t group, const qlazy_int4_options *o, uint8_t *codes, float *scale, uint8_t *zero) {
    if (group == 32) quantize_groups(weight, groups, 32, o, codes, scale, zero);
    else if (group == 64) quantize_groups(weight, groups, 64, o, codes, scale, zero);
    else quantize_groups(weight, groups, 128, o, codes, scale, zero);
}

/* `pack_int4_cpu` for torch's AVX-512 order: in blocks of 64 rows, one column after the other, byte i = row i | row i + 32 << 4. */
void qlazy_pack_int4_cpu(const uint8_t *codes, int64_t rows, int64_t columns, uint8_t *packed) {
    for (int64_t block = 0; block < rows; block += 64) {
        uint8_t *out = packed + block * columns / 2;
        for (int64_t from = 0; from < columns; from += 64) { /* a tile of 64 x 64 stays in the first-level cache */
            const int64_t to = from + 64 < columns ? from + 64 : columns;
            for (int i = 0; i < 32; i++) {
                const uint8_t *low = codes + (block + i) * columns, *high = low + 32 * columns;
                for (int64_t k = from; k < to; k++) out[k * 32 + i] = (uint8_t)(low[k] | high[k] << 4);
            }
        }
    }
}

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

/* y (tokens, N) = x W' for rows `first` to `last` and one or a few tokens. `x` is float32 and comes sorted: in every 64 columns first
 * the 32 even ones, then the 32 odd ones. A block of 64 is summed in float32 and then multiplied by its absmax. */
void qlazy_codebook4_product(const qlazy_codebook4 *w, const float *x, int64_t tokens, int64_t first, int64_t last, float *y) {
    const int64_t blocks = w->columns / 64;
    for (int64_t n = first; n < last; n++) {
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
