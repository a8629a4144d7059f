/* The hot loop of qlazy/quantize.py, compiled on the machine that runs it. The Python there is the definition; this gives the same bytes.
 *
 * Same bytes means: every float32 operation rounded by itself (compile with -ffp-contract=off, never -ffast-math), division and
 * round-half-to-even by the hardware, the same pairwise tree for sums, the same order of candidates, a later one only if strictly less.
 */
#include "halves.h"
#include <math.h>

#define MAX_GROUP 128
#define MAX_CANDIDATES 16

typedef struct {
    int32_t symmetric;     /* 1: the zero is 8 and not stored */
    int32_t bfloat16_in;   /* 1: weights are bfloat16, 0: float32 */
    int32_t bfloat16_scale; /* 1: scales are rounded to bfloat16, 0: float32 */
    int32_t candidates;
    float factors[MAX_CANDIDATES];
} qlazy_int4_options;

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
    const void *weight, int64_t groups, int64_t group, const qlazy_int4_options *o, uint8_t *codes, float *scale, uint8_t *zero) {
    if (group == 32) quantize_groups(weight, groups, 32, o, codes, scale, zero);
    else if (group == 64) quantize_groups(weight, groups, 64, o, codes, scale, zero);
    else quantize_groups(weight, groups, 128, o, codes, scale, zero);
}
