/* `quantize_int4` of qlazy/quantizing/quantize.py, straight into packed words, for groups of 32, 64 and 128.
 *
 * Groups are worked on sixteen (eight, four) at a time, one a vector lane: element k of all lies in one vector, so that every step, sums
 * included, goes from vector to vector and none goes across one. Beside the rules of quantize.h: the same pairwise tree for sums, the
 * same order of candidates, a later one only if strictly less.
 */
#include "quantize.h"
#if defined(__AVX512BW__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#else
#define LANES 4
#endif

#define MAX_GROUP 128
#define MAX_CANDIDATES 16
#define EACH for (int i = 0; i < LANES; i++)

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

/* Adding it rounds to the nearest integer, half to even, which then is in the low bits; subtracting it leaves the float. Good up to
 * 2^22, and weights are a few units of their scale. */
#define ROUND 0x1.8p23f

INLINE lanes choose(integers mask, lanes yes, lanes no) { return (lanes)((mask & (integers)yes) | (~mask & (integers)no)); }
INLINE lanes spread(float value) { return value - (lanes){0}; }
#ifdef __AVX512BW__
INLINE lanes larger(lanes a, lanes b) { return (lanes)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE lanes smaller(lanes a, lanes b) { return (lanes)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE lanes larger(lanes a, lanes b) { return (lanes)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE lanes smaller(lanes a, lanes b) { return (lanes)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE lanes larger(lanes a, lanes b) { return choose(a > b, a, b); }
INLINE lanes smaller(lanes a, lanes b) { return choose(a < b, a, b); }
#endif
INLINE lanes clamp(lanes value, lanes low, lanes high) { return smaller(larger(value, low), high); }

INLINE lanes round_scales(lanes scale, lanes span, const int64_t dtype) {
    union { lanes all; float one[LANES]; } from = {scale}, by = {span}, to;
    if (dtype == BFLOAT16) EACH to.one[i] = round_scale(from.one[i], by.one[i], BFLOAT16);
    else if (dtype == FLOAT16) EACH to.one[i] = round_scale(from.one[i], by.one[i], FLOAT16);
    else EACH to.one[i] = round_scale(from.one[i], by.one[i], FLOAT32);
    return to.all;
}

/* The candidate that groups are rounded with. */
typedef struct {
    lanes scale, inverse, zero;
} grid;

/* The error of one element in units of the scale, squared: clamp(round(w / s), -zero, 15 - zero) - w / s. */
INLINE lanes squared_error(lanes w, const grid *g) {
    const lanes real = w * g->inverse;
    const lanes error = clamp(real + ROUND, ROUND - g->zero, ROUND + (15.0f - g->zero)) - ROUND - real;
    return error * error;
}

INLINE lanes rounded(lanes w, const grid *g) {
    return clamp(w * g->inverse + ROUND, ROUND - g->zero, ROUND + (15.0f - g->zero)) - ROUND;
}

/* `_tree_sum` of `term(k)`: fold the upper half onto the lower, and again. */
#define PAIR(term, k, apart) (term(k) + term((k) + (apart)))
#define TREE_SUM(sum, group, term) \
    do { \
        lanes fold[16]; \
        for (int k = 0; k < 16; k++) { \
            if (group == 32) fold[k] = PAIR(term, k, 16); \
            else if (group == 64) fold[k] = PAIR(term, k, 32) + PAIR(term, k + 16, 32); \
            else fold[k] = (PAIR(term, k, 64) + PAIR(term, k + 32, 64)) + (PAIR(term, k + 16, 64) + PAIR(term, k + 48, 64)); \
        } \
        for (int half = 8; half > 0; half /= 2) \
            for (int k = 0; k < half; k++) fold[k] += fold[k + half]; \
        sum = fold[0]; \
    } while (0)

/* Groups, w[k] holding element k of each, to their best grid; a group with NaN or infinity gets a scale of NaN. */
INLINE grid search(const lanes *w, const int group, const qlazy_quantize *q) {
    const int symmetric = q->zero == NULL;
    lanes high = w[0], low = w[0], span, middle, least = {0};
    for (int k = 1; k < group; k++) high = larger(high, w[k]), low = smaller(low, w[k]);
    if (symmetric) {
        span = larger(high, -low);
        middle = span / 7.0f;
    } else {
        low = smaller(low, spread(0.0f)), high = larger(high, spread(0.0f));
        span = high - low;
        middle = (high + low) * 0.5f;
    }
    const lanes widest = symmetric ? middle : span / 15.0f;
    grid best = {{0}, {0}, {0}}, g;
    for (int64_t c = 0; c < q->count; c++) {
        g.scale = round_scales(widest * q->factors[c], span, q->scale_dtype);
        g.inverse = 1.0f / g.scale;
        g.zero = c == 0 ? -(low / g.scale) : -(middle / g.scale) + 7.5f;
        g.zero = symmetric ? spread(8.0f) : clamp(g.zero + ROUND - ROUND, spread(0.0f), spread(15.0f));
        lanes loss;
#define TERM(k) squared_error(w[k], &g)
        TREE_SUM(loss, group, TERM);
        loss = loss * g.scale * g.scale;
        const integers better = c == 0 ? ~(integers){0} : loss < least;
        best.scale = choose(better, g.scale, best.scale);
        best.zero = choose(better, g.zero, best.zero);
        least = choose(better, loss, least);
    }
    /* `_refit`: the scale that fits the codes best, sum(w * code) / sum(code * code). */
    best.inverse = 1.0f / best.scale;
    lanes along, square;
#define ALONG(k) (w[k] * rounded(w[k], &best))
#define SQUARE(k) (rounded(w[k], &best) * rounded(w[k], &best))
    TREE_SUM(along, group, ALONG);
    TREE_SUM(square, group, SQUARE);
    const lanes fitted = round_scales(along / square, square, q->scale_dtype);
    best.scale = choose(square > spread(0.0f), fitted, best.scale);
    /* What is not finite among the weights shows in their product with the codes. */
    best.scale = choose(along - along == spread(0.0f), best.scale, spread(NAN));
    best.inverse = 1.0f / best.scale;
    return best;
}

#ifdef __AVX512BW__
/* 16 x 16 words of 32 bits, rows to columns. */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88), r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88), r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
#endif

/* Groups from `first` on, one a lane; lanes beyond the last group repeat it. */
INLINE void load_lanes(lanes *w, const void *weight, int64_t first, int64_t groups, const int group, const int64_t dtype) {
#ifdef __AVX512BW__
    const int step = dtype == FLOAT32 ? 16 : 32; /* elements in 64 bytes */
    for (int k = 0; k < group; k += step) {
        __m512i r[16];
        EACH {
            const int64_t at = (first + i < groups ? first + i : groups - 1) * group + k;
            r[i] = _mm512_loadu_si512((const uint8_t *)weight + at * (dtype == FLOAT32 ? 4 : 2));
        }
        transpose(r);
        EACH {
            if (dtype == FLOAT32) w[k + i] = (lanes)r[i];
            else if (dtype == BFLOAT16) {
                w[k + 2 * i] = (lanes)_mm512_slli_epi32(r[i], 16);
                w[k + 2 * i + 1] = (lanes)_mm512_and_si512(r[i], _mm512_set1_epi32((int)0xffff0000));
            } else {
                w[k + 2 * i] = (lanes)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(r[i]));
                w[k + 2 * i + 1] = (lanes)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(r[i], 16)));
            }
        }
    }
#else
    EACH {
        const int64_t at = (first + i < groups ? first + i : groups - 1) * group;
        for (int k = 0; k < group; k++) ((float *)&w[k])[i] = load_float(weight, at + k, dtype);
    }
#endif
}

INLINE int64_t quantize_groups(const qlazy_quantize *q, const int group) {
    const int64_t in_row = q->columns / group, groups = q->rows * in_row;
    const int words = group / 8;
    uint32_t *restrict packed = q->packed;
    int64_t bad = -1, row = 0, column = 0; /* of the group that is stored next */
    if (q->zero) memset(q->zero, 0, (size_t)((q->rows + 7) / 8 * in_row) * 4);
    for (int64_t first = 0; first < groups; first += LANES) {
        lanes w[MAX_GROUP];
        integers word[MAX_GROUP / 8] = {{0}};
        if (q->dtype == BFLOAT16) load_lanes(w, q->weight, first, groups, group, BFLOAT16);
        else if (q->dtype == FLOAT16) load_lanes(w, q->weight, first, groups, group, FLOAT16);
        else load_lanes(w, q->weight, first, groups, group, FLOAT32);
        const grid g = search(w, group, q);
        for (int p = 0; p < words; p++) {
            for (int j = 0; j < 8; j++) {
                /* codes = clamp(round(w / s) + zero, 0, 15), in the low bits of the float that rounds */
                const lanes code = clamp(w[8 * p + j] * g.inverse + ROUND + g.zero, spread(ROUND), spread(ROUND + 15.0f));
                word[p] |= ((integers)code & 15) << (4 * j);
            }
        }
        const int count = groups - first < LANES ? (int)(groups - first) : LANES;
        uint32_t *out = packed + first * words;
        if (count == LANES) EACH for (int p = 0; p < words; p++) out[i * words + p] = (uint32_t)word[p][i];
        else for (int i = 0; i < count; i++) for (int p = 0; p < words; p++) out[i * words + p] = (uint32_t)word[p][i];
        for (int i = 0; i < count; i++) {
            store_scale(q->scale, first + i, g.scale[i], q->scale_dtype);
            if (!is_finite(g.scale[i])) bad = bad < 0 ? row : bad;
            else if (q->zero) q->zero[(row / 8) * in_row + column] |= (uint32_t)g.zero[i] << (4 * (row % 8));
            if (++column == in_row) column = 0, row++;
        }
    }
    return bad;
}

/* packed uint32 (rows, columns / 8). Returns the first row with a scale that is not finite, -1 where there is none. */
int64_t qlazy_quantize_int4(const qlazy_quantize *q) {
    return q->group == 32 ? quantize_groups(q, 32) : q->group == 64 ? quantize_groups(q, 64) : quantize_groups(q, 128);
}
