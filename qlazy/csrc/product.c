/* Products of a few tokens with a low-bit weight: y (M, N) = x (M, K) W' + bias, each packed weight read once, none unpacked to memory.
 *
 * x is given as integers of 16 bits (activations.h), so that packed codes are multiplied as they lie. Where the processor multiplies
 * bytes (VNNI), codes of the weight are unsigned bytes, 8 or 128 too large, and those of x come as upper and lower bytes. Elsewhere,
 * and for a codebook, whose 16 values are integers of 14 bits here, a word of the weight holds 4 codes of 4 bits or 2 of 8, and code
 * r of all words is one shift away from being a vector of words itself. Sums of products are exact in 32-bit integers; scales come
 * in after.
 *
 *     chunk = one vector of packed bytes; lane i of its sums holds the columns [i * per_lane, (i + 1) * per_lane) of the chunk
 *     batch = LANES neighbouring scales of a row, held in one vector
 */
#include "activations.h"
#include <stdlib.h>

#define CODE_ONE 8191      /* 1.0 of a codebook: eight products with 16-bit x still fit in 32 bits */
#define PREFETCH 1024      /* bytes ahead to the first-level cache, */
#define FAR_PREFETCH 12288 /* and to the second: hardware does not look beyond a page */
#define TILE 4             /* tokens whose sums are kept in registers together */
#define LINE 64            /* bytes of a cache line */

/* LANES scales of row n from block b on; beyond the last they are 0. */
INLINE floats load_scales(const qlazy_product *p, const shape *s, int64_t n, int64_t b) {
    float scales[LANES] = {0};
    const int64_t first = n * (p->columns / p->group), at = first + b, count = s->blocks - b < LANES ? s->blocks - b : LANES;
#if LANES == 16
    if (count == LANES && p->group == s->block && p->scale_dtype == BFLOAT16 && p->kind != CODEBOOK4) {
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
    else for (int64_t i = 0; i < count; i++) scales[i] = load_one(p->scale, first + (b + i) * s->block / p->group, p->scale_dtype);
    return load_floats(scales);
}

/* LANES zeros of row n from block b on, less 8. */
INLINE floats load_zeros(const qlazy_product *p, const shape *s, int64_t n, int64_t b) {
    float zeros[LANES] = {0};
    const int64_t count = s->blocks - b < LANES ? s->blocks - b : LANES;
    const int32_t *from = p->zero + n / 8 * (p->columns / p->group);
    const int shift = (int)(n % 8) * 4;
#if LANES == 16
    if (count == LANES && p->group == s->block) {
        const __m512i all = _mm512_loadu_si512(from + b), codes = _mm512_and_si512(_mm512_srl_epi32(all, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(15));
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(8)));
    }
#endif
    for (int64_t i = 0; i < count; i++) zeros[i] = (float)((int32_t)((uint32_t)from[(b + i) * s->block / p->group] >> shift & 15) - 8);
    return load_floats(zeros);
}

/* One chunk of one row, and `ahead` of it a prefetch: its codes times those of `tile` planes, times `factor`, which holds a batch of scales of both. */
INLINE void add_chunk(
    const uint8_t *packed, int ahead, const int kind, const int tile, word_table table, const floats *factor, const int32_t *spread,
    const char *codes, const int32_t *centre, const shape *s, floats *total) {
    const int vector = 4 * LANES, parts = BYTEWISE(kind) ? (kind == INT8 ? 1 : 2) : kind == INT8 ? 2 : 4;
    if (ahead) __builtin_prefetch(packed + PREFETCH, 0, 3), __builtin_prefetch(packed + FAR_PREFETCH, 0, 2);
    const words w = load_words(packed);
    words part[4];
#if BYTES
    if (kind == INT4) part[0] = low_nibbles(w), part[1] = high_nibbles(w);
    else if (kind == INT8) part[0] = w;
    else
#endif
    if (kind == INT8) part[0] = low_byte(w), part[1] = high_byte(w);
    else for (int r = 0; r < 4; r++) part[r] = kind == INT4 ? centred(w, 4 * r) : look_up(table, w, 4 * r);
    for (int m = 0; m < tile; m++) {
        const char *of = codes + m * s->chunks * s->chunk * 2;
        integers sum = zero_integers();
#if BYTES
        if (BYTEWISE(kind)) {
            integers low = load_integers(centre + m * s->chunks * LANES);
            for (int r = 0; r < parts; r++) {
                sum = dot_bytes(sum, part[r], load_words(of + r * vector));
                low = dot_bytes(low, part[r], load_words(of + (parts + r) * vector));
            }
            sum = join(sum, low);
        } else
#endif
        for (int r = 0; r < parts; r++) sum = dot(sum, part[r], load_words(of + r * vector));
        total[m] = multiply_add(to_floats(sum), spread_floats(factor[m], spread), total[m]);
    }
}

/* Row n and `tile` planes. `kind`, `tile` and `batch` are constants wherever this is inlined. */
INLINE void product_row(
    const qlazy_product *p, const shape *s, const activations *x, word_table table, const int kind, const int tile, const int64_t batch,
    int64_t plane, int64_t n, float *out) {
    const int vector = 4 * LANES, chunk = vector * (kind == INT8 ? 1 : 2);
    const int64_t bytes = kind == INT8 ? p->columns : p->columns / 2, whole = bytes / vector;
    const uint8_t *row = p->packed + n * bytes;
    const char *codes = x->codes + plane * s->chunks * chunk * 2;
    const int32_t *centre = x->centre + plane * s->chunks * LANES;
    const float *x_scale = x->scale + plane * s->padded, *x_sum = x->sum + plane * s->padded;
    floats total[TILE], factor[TILE];
    for (int m = 0; m < tile; m++) total[m] = zero_floats();
    for (int64_t first = 0, b = 0; first < s->chunks; first += batch, b += LANES) {
        if (s->per_row) for (int m = 0; m < tile; m++) factor[m] = load_floats(x_scale + m * s->padded + b);
        else {
            const floats scales = load_scales(p, s, n, b);
            for (int m = 0; m < tile; m++) factor[m] = multiply(scales, load_floats(x_scale + m * s->padded + b));
            if (kind == INT4 && p->zero) { /* where codes do not count from 8 */
                const floats offset = multiply(scales, load_zeros(p, s, n, b));
                for (int m = 0; m < tile; m++) total[m] = multiply_add(offset, load_floats(x_sum + m * s->padded + b), total[m]);
            }
        }
        const uint8_t *from = row + first * vector;
        const char *x_codes = codes + first * chunk * 2;
        const int32_t *x_centre = centre + first * LANES;
        const int64_t left = whole - first;
#define ADD(at, i) add_chunk(at, plane == 0, kind, tile, table, factor, s->spread + (i) * LANES, x_codes + (i) * chunk * 2, x_centre + (i) * LANES, s, total)
        if (left >= batch) for (int64_t i = 0; i < batch; i++) ADD(from + i * vector, i);
        else {
            for (int64_t i = 0; i < left; i++) ADD(from + i * vector, i);
            if (first + left < s->chunks) { /* what does not fill a vector */
                uint8_t last[4 * LANES] = {0};
                memcpy(last, from + left * vector, (size_t)(bytes - whole * vector));
                ADD(last, left);
            }
        }
#undef ADD
    }
    for (int m = 0; m < tile; m++) out[m] = sum_floats(total[m]);
    if (s->per_row) for (int m = 0; m < tile; m++) out[m] *= load_one(p->scale, n, p->scale_dtype);
}

/* Row n for all tokens. */
INLINE void finish_row(
    const qlazy_product *p, const shape *s, const activations *x, const word_table *tables, const int kind, const int64_t batch, int64_t n) {
    const float bias = p->bias ? load_one(p->bias, n, p->bias_dtype) : 0.0f;
    const int each = (int)(s->planes / p->tokens), two_planes = each == 2;
    for (int64_t plane = 0; plane < s->planes;) {
        float out[TILE], left_over[TILE];
        const int64_t left = s->planes - plane;
        const int tile = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        for (int table = 0; table <= (kind == CODEBOOK4 && two_planes); table++) {
            float *to = table ? left_over : out;
            if (tile == 4) product_row(p, s, x, tables[table], kind, 4, batch, plane, n, to);
            else if (tile == 2) product_row(p, s, x, tables[table], kind, 2, batch, plane, n, to);
            else product_row(p, s, x, tables[table], kind, 1, batch, plane, n, to);
        }
        for (int m = 0; m < tile; m++) {
            if (kind == CODEBOOK4) out[m] = (two_planes ? out[m] + left_over[m] / CODE_ONE : out[m]) / CODE_ONE;
            if (m % each == each - 1)
                store_one(p->y, (plane + m) / each * p->rows + n, p->x_dtype, (two_planes ? out[m - 1] + out[m] : out[m]) + bias);
        }
        plane += tile;
    }
}

static void product(const qlazy_product *p, const shape *s, const activations *x) {
    /* Values of a codebook as integers; for float32 also what rounding them left over. */
    int16_t values[16] = {0}, rest[16] = {0};
    if (p->kind == CODEBOOK4) for (int i = 0; i < 16; i++) {
        const float value = p->code[i] * CODE_ONE;
        values[i] = (int16_t)(int32_t)(value + (value < 0 ? -0.5f : 0.5f));
        const float left = (value - (float)values[i]) * CODE_ONE;
        rest[i] = (int16_t)(int32_t)(left + (left < 0 ? -0.5f : 0.5f));
    }
    const word_table tables[2] = {make_table(values), make_table(rest)};
    const int64_t share = p->rows / (p->threads * 8) + 1; /* fast and slow cores end together */
#pragma omp parallel for num_threads(p->threads) schedule(dynamic, share)
    for (int64_t n = 0; n < p->rows; n++) { /* constants here: what OpenMP takes out of a function sees none of its arguments */
        if (p->kind == INT4 && s->batch == 4) finish_row(p, s, x, tables, INT4, 4, n);
        else if (p->kind == INT4) finish_row(p, s, x, tables, INT4, s->batch, n);
        else if (p->kind == INT8) finish_row(p, s, x, tables, INT8, s->batch, n);
        else finish_row(p, s, x, tables, CODEBOOK4, 8, n);
    }
}

/* Where `bytes` more begin in a piece of memory that is `*used` so far: on a cache line. */
static int64_t room(int64_t *used, int64_t bytes) {
    const int64_t at = *used;
    *used += (bytes + LINE - 1) / LINE * LINE;
    return at;
}

int64_t qlazy_linear(const qlazy_product *p) {
    shape s = {.per_lane = p->kind == INT8 ? 4 : 8, .block = MOST, .per_row = p->kind == INT8 && p->group == p->columns};
    while (s.block > PIECE && p->group % s.block) s.block -= PIECE;
    s.chunk = LANES * s.per_lane, s.batch = s.block / s.per_lane, s.planes = p->x_dtype == FLOAT32 ? 2 * p->tokens : p->tokens;
    s.chunks = (p->columns + s.chunk - 1) / s.chunk, s.blocks = (p->columns + s.block - 1) / s.block, s.padded = s.blocks + LANES;
    const int64_t padded_columns = s.chunks * s.chunk;
    int64_t bytes = 0;
    const int64_t spread = room(&bytes, s.batch * LANES * (int64_t)sizeof(int32_t));
    const int64_t x_codes = room(&bytes, s.planes * padded_columns * 2);
    const int64_t centre = room(&bytes, s.planes * s.chunks * LANES * (int64_t)sizeof(int32_t));
    const int64_t scale = room(&bytes, s.planes * s.padded * (int64_t)sizeof(float));
    const int64_t sum = room(&bytes, s.planes * s.padded * (int64_t)sizeof(float));
    const int64_t rest = room(&bytes, p->tokens * p->columns * (int64_t)sizeof(float));
    const int64_t codes = room(&bytes, p->tokens * padded_columns * (int64_t)sizeof(int16_t));
    char *memory = aligned_alloc(LINE, (size_t)bytes);
    if (!memory) return 1;
    const activations x = {memory + x_codes, (int32_t *)(memory + centre), (float *)(memory + scale), (float *)(memory + sum)};
    memset(x.scale, 0, (size_t)(rest - scale));
    for (int64_t i = 0; i < s.batch * LANES; i++) ((int32_t *)(memory + spread))[i] = (int32_t)(i * s.per_lane / s.block);
    s.spread = (int32_t *)(memory + spread);
    const int64_t each = s.planes / p->tokens;
#pragma omp parallel for num_threads(p->threads < p->tokens ? p->threads : p->tokens) schedule(static) if (p->tokens > 1)
    for (int64_t m = 0; m < p->tokens; m++) {
        float *own = (float *)(memory + rest) + m * p->columns;
        int16_t *own_codes = (int16_t *)(memory + codes) + m * padded_columns;
        load_row(p, m, own);
        memset(own_codes + p->columns, 0, (size_t)(padded_columns - p->columns) * sizeof *own_codes);
        for (int64_t plane = m * each; plane < (m + 1) * each; plane++) {
            if (p->kind == INT4) prepare(p, &s, &x, INT4, own, each == 2, plane, own_codes);
            else if (p->kind == INT8) prepare(p, &s, &x, INT8, own, each == 2, plane, own_codes);
            else prepare(p, &s, &x, CODEBOOK4, own, each == 2, plane, own_codes);
        }
    }
    product(p, &s, &x);
    free(memory);
    return 0;
}
