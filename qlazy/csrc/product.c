/* Products of a few tokens with a low-bit weight: y (M, N) = x (M, K) W' + bias, each packed weight read once, none unpacked to memory.
 *
 * x is turned into 16-bit integers, with a scale for every 32 columns, so that packed codes are multiplied as they lie: a 16-bit word
 * of the weight holds 4 codes of 4 bits or 2 of 8, and code r of all words is one shift away from being a vector of words itself. The
 * columns of x are sorted to match. Sums of products are exact in 32-bit integers; scales come in after.
 *
 *     chunk = one vector of packed bytes; lane i of its sums holds the columns [i * per_lane, (i + 1) * per_lane) of the chunk
 *     batch = LANES neighbouring scales of a row, held in one vector
 *
 * 15 bits and a sign are finer than bfloat16 and float16 by far. float32 needs more: x is then given as two such planes, the second
 * for what the first left over, and the two products are added.
 */
#include "halves.h"
#include "simd.h"
#include <math.h>
#include <stdlib.h>

enum { INT4 = 0, INT8 = 1, CODEBOOK4 = 2 };
enum { BFLOAT16 = 0, FLOAT32 = 1, FLOAT16 = 2 };

#define BLOCK 32          /* columns of x that share a scale */
#define CODE_ONE 8191     /* 1.0 of a codebook: eight products with 16-bit x still fit in 32 bits */
#define PREFETCH 1024     /* bytes ahead to the first-level cache, */
#define FAR_PREFETCH 12288 /* and to the second: hardware does not look beyond a page */
#define TILE 4            /* tokens whose sums are kept in registers together */

typedef struct {
    const uint8_t *packed; /* INT4: (N, K/2), low nibble first; INT8: (N, K); CODEBOOK4: (N * K/2), high nibble first */
    const void *scale;     /* (N, G); CODEBOOK4: absmax, float32 or where nested uint8 */
    const int32_t *zero;   /* INT4: (ceil(N/8), G), a nibble for each row; NULL where the zero is 8 */
    const float *nested_absmax, *nested_offset, *nested_code, *code; /* CODEBOOK4 */
    const void *x, *bias;  /* (M, K) and (N) or NULL */
    void *y;               /* (M, N), in the dtype of x */
    int64_t kind, scale_dtype, x_dtype, bias_dtype;
    int64_t tokens, rows, columns, group; /* M, N, K; columns that share a scale, a divisor of K */
    int64_t threads;
} qlazy_product;

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

static void load_row(const qlazy_product *p, int64_t m, float *to) {
    const int64_t columns = p->columns;
    if (p->x_dtype == FLOAT32) memcpy(to, (const float *)p->x + m * columns, (size_t)columns * sizeof *to);
    else if (p->x_dtype == FLOAT16) for (int64_t k = 0; k < columns; k++) to[k] = load_float16(((const uint16_t *)p->x)[m * columns + k]);
    else for (int64_t k = 0; k < columns; k++) to[k] = load_bfloat16(((const uint16_t *)p->x)[m * columns + k]);
}

/* x as the loop wants it, all arrays of one plane after the other. */
typedef struct {
    int16_t *words; /* (planes, chunks, parts, 2 * LANES) */
    float *scale;   /* (planes, chunks, LANES) */
    float *sum;     /* (planes, groups + LANES): less the sum of the columns that share a scale of the weight */
} activations;

typedef struct {
    int64_t parts, per_lane, chunk; /* codes in a word, columns in a lane and in a chunk */
    int64_t chunks, groups, batch;  /* of a row; chunks that share a batch of scales */
    int64_t planes;                 /* vectors that stand for x: the tokens, twice as many in float32 */
    const int32_t *spread;          /* (batch, LANES): which scale of the batch each lane of a chunk needs */
} shape;

/* One plane: columns -> words, scales, and sums by group. `rest` (K) is x, and where `keep_rest` then what the words left over.
 * Every loop has a constant number of rounds, so that the compiler makes vectors of them. */
INLINE void prepare_plane(
    const shape *s, const qlazy_product *p, float *rest, int keep_rest, const int parts, int16_t *words, float *scale, float *sum) {
    const int per_lane = 2 * parts, chunk = LANES * per_lane, in_order[4] = {0, 1, 2, 3}, high_first[4] = {1, 0, 3, 2};
    const int *order = p->kind == CODEBOOK4 ? high_first : in_order;
    memset(words, 0, (size_t)(s->chunks * s->chunk) * sizeof *words);
    memset(scale, 0, (size_t)(s->chunks * LANES) * sizeof *scale);
    memset(sum, 0, (size_t)(s->groups + LANES) * sizeof *sum);
    for (int64_t first = 0; first < p->columns; first += BLOCK) {
        const int64_t count = p->columns - first < BLOCK ? p->columns - first : BLOCK;
        float values[BLOCK] = {0}, widest;
        uint32_t bits[BLOCK], most = 0;
        int16_t codes[BLOCK];
        int32_t total = 0;
        if (count == BLOCK) memcpy(values, rest + first, sizeof values);
        else memcpy(values, rest + first, (size_t)count * sizeof *values);
        memcpy(bits, values, sizeof bits);
        for (int k = 0; k < BLOCK; k++) { /* as integers, magnitudes have the same order, infinity and NaN above all others */
            const uint32_t size = bits[k] & 0x7fffffffu;
            most = size > most ? size : most;
        }
        memcpy(&widest, &most, 4);
        const int64_t lane = first / per_lane, lanes = (count + per_lane - 1) / per_lane;
        if (most >= 0x7f800000u) { /* whatever is not finite shows in y */
            for (int64_t i = 0; i < lanes; i++) scale[lane + i] = NAN;
            sum[first / p->group] = NAN;
            continue;
        }
        if (widest <= 1e-30f) continue; /* too small for its inverse, and for anything in a sum of ordinary numbers */
        const float unit = widest / 32767.0f, inverse = 32767.0f / widest;
        for (int k = 0; k < BLOCK; k++) {
            const float real = values[k] * inverse;
            codes[k] = (int16_t)(int32_t)(real + (real < 0.0f ? -0.5f : 0.5f));
        }
        for (int k = 0; k < BLOCK; k++) total += codes[k];
        sum[first / p->group] -= (float)total * unit;
        if (keep_rest) for (int64_t k = 0; k < count; k++) rest[first + k] -= (float)codes[k] * unit;
        int16_t *to = words + first / chunk * chunk + first % chunk / parts;
        for (int part = 0; part < parts; part++)
            for (int i = 0; i < BLOCK / parts; i++) to[part * 2 * LANES + i] = codes[parts * i + order[part]];
        for (int64_t i = 0; i < lanes; i++) scale[lane + i] = unit;
    }
}

/* LANES scales of row n from group g on; beyond the last they are 0. */
INLINE floats load_scales(const qlazy_product *p, const shape *s, int64_t n, int64_t g) {
    float scales[LANES] = {0};
    const int64_t at = n * s->groups + g, count = s->groups - g < LANES ? s->groups - g : LANES;
#if LANES == 16
    if (count == LANES && p->scale_dtype == BFLOAT16 && p->kind != CODEBOOK4) {
        const __m256i bits = _mm256_loadu_si256((const __m256i *)((const uint16_t *)p->scale + at));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    if (count == LANES && p->kind == CODEBOOK4 && p->nested_code) {
        const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)((const uint8_t *)p->scale + at)));
        const __mmask16 second = (__mmask16)(at % 256 > 256 - LANES ? 0xffffu << (256 - at % 256) : 0);
        const __m512 one = _mm512_set1_ps(p->nested_absmax[at / 256]), other = _mm512_set1_ps(p->nested_absmax[(at + LANES - 1) / 256]);
        return _mm512_fmadd_ps(
            _mm512_i32gather_ps(index, p->nested_code, 4), _mm512_mask_blend_ps(second, one, other), _mm512_set1_ps(*p->nested_offset));
    }
#endif
    if (p->kind == CODEBOOK4 && p->nested_code)
        for (int64_t i = 0; i < count; i++)
            scales[i] = p->nested_code[((const uint8_t *)p->scale)[at + i]] * p->nested_absmax[(at + i) / 256] + *p->nested_offset;
    else for (int64_t i = 0; i < count; i++) scales[i] = load_one(p->scale, at + i, p->scale_dtype);
    return load_floats(scales);
}

/* LANES zeros of row n from group g on, less 8. */
INLINE floats load_zeros(const qlazy_product *p, const shape *s, int64_t n, int64_t g) {
    float zeros[LANES] = {0};
    const int64_t count = s->groups - g < LANES ? s->groups - g : LANES;
    const int32_t *from = p->zero + n / 8 * s->groups + g;
    const int shift = (int)(n % 8) * 4;
#if LANES == 16
    if (count == LANES) {
        const __m512i codes = _mm512_and_si512(_mm512_srlv_epi32(_mm512_loadu_si512(from), _mm512_set1_epi32(shift)), _mm512_set1_epi32(15));
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(8)));
    }
#endif
    for (int64_t i = 0; i < count; i++) zeros[i] = (float)((int32_t)((uint32_t)from[i] >> shift & 15) - 8);
    return load_floats(zeros);
}

/* One chunk: its codes times the words of `tile` planes, times `factor`, which holds a scale of the weight for each lane. */
INLINE void add_chunk(
    const uint8_t *packed, const int kind, const int tile, word_table table, floats factor, const int16_t *x_words, int64_t words_stride,
    const float *x_scale, int64_t scale_stride, floats *total) {
    const int parts = kind == INT8 ? 2 : 4;
    const words w = load_words(packed);
    words codes[4];
    if (kind == INT8) codes[0] = low_byte(w), codes[1] = high_byte(w);
    else for (int r = 0; r < 4; r++) codes[r] = kind == INT4 ? centred(w, 4 * r) : look_up(table, w, 4 * r);
    for (int m = 0; m < tile; m++) {
        integers sum = zero_integers();
        for (int r = 0; r < parts; r++) sum = dot(sum, codes[r], load_words(x_words + m * words_stride + r * 2 * LANES));
        total[m] = multiply_add(to_floats(sum), multiply(factor, load_floats(x_scale + m * scale_stride)), total[m]);
    }
}

/* Row n and `tile` vectors that stand for x. `kind` and `tile` are constants wherever this is inlined. */
INLINE void product_row(
    const qlazy_product *p, const shape *s, const activations *x, word_table table, const int kind, const int tile, int64_t plane,
    int64_t n, float *out) {
    const int vector = 4 * LANES, chunk = vector * (kind == INT8 ? 1 : 2);
    const int64_t bytes = kind == INT8 ? p->columns : p->columns / 2, whole = bytes / vector;
    const int64_t stride = s->chunks * chunk, sums = s->groups + LANES, scale_stride = s->chunks * LANES;
    const uint8_t *row = p->packed + n * bytes;
    const int16_t *x_words = x->words + plane * stride;
    const float *x_scale = x->scale + plane * scale_stride, *x_sum = x->sum + plane * sums;
    const int per_row = s->groups == 1;
    floats total[TILE], scales, factor = zero_floats();
    for (int m = 0; m < tile; m++) total[m] = zero_floats();
    for (int64_t c = 0, g = 0; c < s->chunks; g += LANES) {
        const int64_t end = s->chunks - c < s->batch ? s->chunks : c + s->batch, full = end < whole ? end : whole;
        const int32_t *spread = s->spread;
        scales = load_scales(p, s, n, g);
        if (kind == INT4 && p->zero) { /* where codes do not count from 8 */
            const floats offset = multiply(scales, load_zeros(p, s, n, g));
            for (int m = 0; m < tile; m++) total[m] = multiply_add(offset, load_floats(x_sum + m * sums + g), total[m]);
        }
        if (per_row) factor = spread_floats(scales, spread);
        for (; c < full; c++, spread += LANES) {
            if (plane == 0) __builtin_prefetch(row + c * vector + PREFETCH, 0, 3), __builtin_prefetch(row + c * vector + FAR_PREFETCH, 0, 2);
            if (!per_row) factor = spread_floats(scales, spread);
            add_chunk(row + c * vector, kind, tile, table, factor, x_words + c * chunk, stride, x_scale + c * LANES, scale_stride, total);
        }
        if (c < end) { /* what does not fill a vector */
            uint8_t last[4 * LANES] = {0};
            memcpy(last, row + c * vector, (size_t)(bytes - c * vector));
            if (!per_row) factor = spread_floats(scales, spread);
            add_chunk(last, kind, tile, table, factor, x_words + c * chunk, stride, x_scale + c * LANES, scale_stride, total);
            c++;
        }
    }
    for (int m = 0; m < tile; m++) out[m] = sum_floats(total[m]);
}

/* Row n for all tokens. */
INLINE void finish_row(
    const qlazy_product *p, const shape *s, const activations *x, const word_table *tables, const int kind, const int two_planes, int64_t n) {
    const float bias = p->bias ? load_one(p->bias, n, p->bias_dtype) : 0.0f;
    const int each = two_planes ? 2 : 1;
    for (int64_t plane = 0; plane < s->planes;) {
        float out[TILE], left_over[TILE];
        const int64_t left = s->planes - plane;
        const int tile = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (tile == 4) product_row(p, s, x, tables[0], kind, 4, plane, n, out);
        else if (tile == 2) product_row(p, s, x, tables[0], kind, 2, plane, n, out);
        else product_row(p, s, x, tables[0], kind, 1, plane, n, out);
        if (kind == CODEBOOK4 && two_planes) {
            if (tile == 4) product_row(p, s, x, tables[1], kind, 4, plane, n, left_over);
            else product_row(p, s, x, tables[1], kind, 2, plane, n, left_over);
        }
        for (int m = 0; m < tile; m++) {
            if (kind == CODEBOOK4) out[m] = (two_planes ? out[m] + left_over[m] / CODE_ONE : out[m]) / CODE_ONE;
            if (m % each == each - 1) {
                const float value = two_planes ? out[m - 1] + out[m] : out[m];
                store_one(p->y, (plane + m) / each * p->rows + n, p->x_dtype, value + bias);
            }
        }
        plane += tile;
    }
}

static void product_rows(const qlazy_product *p, const shape *s, const activations *x) {
    /* Values of a codebook as integers; for float32 also what rounding them left over. */
    int16_t values[16] = {0}, rest[16] = {0};
    if (p->kind == CODEBOOK4) for (int i = 0; i < 16; i++) {
        const float value = p->code[i] * CODE_ONE;
        values[i] = (int16_t)(int32_t)(value + (value < 0 ? -0.5f : 0.5f));
        const float left = (value - (float)values[i]) * CODE_ONE;
        rest[i] = (int16_t)(int32_t)(left + (left < 0 ? -0.5f : 0.5f));
    }
    const word_table tables[2] = {make_table(values), make_table(rest)};
    const int two_planes = s->planes > p->tokens;
    const int64_t share = p->rows / (p->threads * 8) + 1; /* fast and slow cores end together */
#pragma omp parallel for num_threads(p->threads) schedule(dynamic, share)
    for (int64_t n = 0; n < p->rows; n++) { /* constants here: what OpenMP takes out of a function sees none of its arguments */
        if (p->kind == INT4) finish_row(p, s, x, tables, INT4, two_planes, n);
        else if (p->kind == INT8) finish_row(p, s, x, tables, INT8, two_planes, n);
        else finish_row(p, s, x, tables, CODEBOOK4, two_planes, n);
    }
}

/* 0, or 1 where memory for x could not be had. */
int64_t qlazy_linear(const qlazy_product *p) {
    shape s = {.parts = p->kind == INT8 ? 2 : 4};
    s.per_lane = 2 * s.parts, s.chunk = LANES * s.per_lane;
    s.chunks = (p->columns + s.chunk - 1) / s.chunk, s.groups = p->columns / p->group;
    s.batch = s.groups == 1 ? s.chunks : p->group / s.per_lane;
    s.planes = p->x_dtype == FLOAT32 ? 2 * p->tokens : p->tokens;
    const int64_t spreads = s.groups == 1 ? 1 : s.batch;
    int32_t *spread = malloc((size_t)(spreads * LANES) * sizeof *spread);
    activations x = {
        .words = malloc((size_t)(s.planes * s.chunks * s.chunk) * sizeof(int16_t)),
        .scale = malloc((size_t)(s.planes * s.chunks * LANES) * sizeof(float)),
        .sum = malloc((size_t)(s.planes * (s.groups + LANES)) * sizeof(float)),
    };
    float *rest = malloc((size_t)(p->tokens * p->columns) * sizeof *rest);
    const int got = spread && x.words && x.scale && x.sum && rest;
    if (got) {
        for (int64_t i = 0; i < spreads * LANES; i++) spread[i] = s.groups == 1 ? 0 : (int32_t)(i * s.per_lane / p->group);
        s.spread = spread;
        const int64_t each = s.planes / p->tokens;
#pragma omp parallel for num_threads(p->threads < p->tokens ? p->threads : p->tokens) schedule(static) if (p->tokens > 1)
        for (int64_t m = 0; m < p->tokens; m++) {
            float *own = rest + m * p->columns;
            load_row(p, m, own);
            for (int64_t plane = m * each; plane < (m + 1) * each; plane++)
            {
                int16_t *words = x.words + plane * s.chunks * s.chunk;
                float *scale = x.scale + plane * s.chunks * LANES, *sum = x.sum + plane * (s.groups + LANES);
                if (p->kind == INT8) prepare_plane(&s, p, own, each == 2, 2, words, scale, sum);
                else prepare_plane(&s, p, own, each == 2, 4, words, scale, sum);
            }
        }
        product_rows(p, &s, &x);
    }
    free(spread), free(x.words), free(x.scale), free(x.sum), free(rest);
    return !got;
}

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

/* BLOCK weights at a time: code to value to the dtype of the result. */
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
        const __m512i wide = kind == INT8 ? _mm512_cvtepi8_epi32(halves[i]) : _mm512_cvtepu8_epi32(halves[i]);
        const __m512 values = kind == CODEBOOK4 ? _mm512_permutexvar_ps(wide, table)
                                                : _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, _mm512_set1_epi32(zero)));
        store_half((char *)to + i * 16 * (dtype == FLOAT32 ? 4 : 2), dtype, _mm512_mul_ps(values, factor));
    }
}
#endif

static void dequantize_some(
    const uint8_t *codes, int64_t count, int64_t kind, const float *code, int32_t zero, float scale, void *to, int64_t dtype) {
    for (int64_t i = 0; i < count; i++) {
        const uint8_t byte = codes[kind == INT8 ? i : i / 2];
        const int high = kind == INT4 ? i % 2 : !(i % 2);
        const int32_t q = kind == INT8 ? (int8_t)byte : high ? byte >> 4 : byte & 15;
        store_one(to, i, dtype, (kind == CODEBOOK4 ? code[q] : (float)(q - zero)) * scale);
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
        for (int64_t k = g * b->group; k < end; k += BLOCK) {
            const int64_t flat = n * b->columns + k, count = end - k < BLOCK ? end - k : BLOCK;
            const uint8_t *codes = b->packed + (kind == INT8 ? flat : flat / 2);
            char *to = (char *)b->out + (r * b->columns + k) * (dtype == FLOAT32 ? 4 : 2);
#if LANES == 16
            if (count == BLOCK) {
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
