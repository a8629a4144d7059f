/* x as a product wants it: integers of 16 bits with a scale for every 32 to 128 columns, in the order of the weight's codes.
 *
 * 15 bits and a sign are finer than bfloat16 and float16 by far. float32 needs more: x is then given as two such planes, the second
 * for what the first left over, and the two products are added.
 */
#pragma once
#include "weight.h"
#include <math.h>

#ifndef BYTES
#define BYTES 0
#endif
#define BYTEWISE(kind) (BYTES && (kind) != CODEBOOK4) /* whether codes are multiplied as bytes */
#define ONE 32639.0f /* largest code: 127 * 256 + 127, so that both of its bytes have a sign */
#define MOST 128     /* columns that share a scale, at most; fewer where scales of the weight ask for it */

static void load_row(const qlazy_product *p, int64_t m, float *to) {
    const int64_t columns = p->columns;
    if (p->x_dtype == FLOAT32) memcpy(to, (const float *)p->x + m * columns, (size_t)columns * sizeof *to);
    else if (p->x_dtype == FLOAT16) for (int64_t k = 0; k < columns; k++) to[k] = load_float16(((const uint16_t *)p->x)[m * columns + k]);
    else for (int64_t k = 0; k < columns; k++) to[k] = load_bfloat16(((const uint16_t *)p->x)[m * columns + k]);
}

/* x as the loop wants it, all arrays of one plane after the other, each on cache lines of its own. */
typedef struct {
    char *codes;     /* (planes, chunks, 2 * columns of a chunk): see `lay_out` */
    int32_t *centre; /* (planes, chunks, LANES): where codes of the weight are taken for unsigned, what that adds to a lane, negative */
    float *scale;    /* (planes, padded): of the codes of a block */
    float *sum;      /* (planes, padded): less the sum of the columns of a block */
} activations;

typedef struct {
    int64_t per_lane, chunk;       /* columns in a lane and in a chunk */
    int64_t chunks, batch;         /* of a row; chunks that share a batch of scales */
    int64_t block, blocks, padded; /* columns that share a scale of x, and one of the weight; how many; room for them and a vector */
    int64_t planes;                /* vectors that stand for x: the tokens, twice as many in float32 */
    int64_t per_row;               /* whether a row has one scale, which comes in at its end */
    const int32_t *spread;         /* (batch, LANES): which scale of the batch each lane of a chunk needs */
} shape;

/* A block of x to integers of 16 bits, its scale and sum. `rest` (K) is x, and where `keep_rest` then what the integers left over. */
static void round_block(float *rest, int64_t count, int keep_rest, int16_t *codes, float *scale, float *sum) {
    uint32_t most = 0;
    float widest;
    for (int64_t k = 0; k < count; k++) { /* as integers, magnitudes have the same order, infinity and NaN above all others */
        uint32_t bits;
        memcpy(&bits, rest + k, sizeof bits);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    memcpy(&widest, &most, sizeof widest);
    if (most >= 0x7f800000u || widest <= 1e-30f) { /* too small for its inverse, and for a sum of ordinary numbers */
        memset(codes, 0, (size_t)count * sizeof *codes);
        *scale = *sum = most >= 0x7f800000u ? NAN : 0.0f; /* whatever is not finite shows in y */
        return;
    }
    const float unit = widest / ONE, inverse = ONE / widest;
    int32_t total = 0;
    for (int64_t k = 0; k < count; k++) {
        const float real = rest[k] * inverse;
        const int32_t code = (int32_t)(real + (real < 0.0f ? -0.5f : 0.5f));
        codes[k] = (int16_t)code;
        total += code;
    }
    if (keep_rest) for (int64_t k = 0; k < count; k++) rest[k] -= (float)codes[k] * unit;
    *scale = unit;
    *sum = -(float)total * unit;
}

/* The codes of one chunk of x in the order in which those of the weight come out of a vector:
 *
 *     words: `parts` vectors, the columns that are `part` modulo `parts`; a codebook has its high nibble first
 *     bytes: the same for the upper bytes of codes, and then for the lower; code = 256 upper + lower, both with a sign
 *
 * Constants wherever this is inlined, so that the compiler makes vectors of the loops. */
INLINE void lay_out(const int16_t *codes, const int kind, char *to, int32_t *centre) {
    const int vector = 4 * LANES, middle = kind == INT8 ? 128 : 8, parts = BYTEWISE(kind) ? (kind == INT8 ? 1 : 2) : kind == INT8 ? 2 : 4;
    for (int part = 0; part < parts; part++) {
        const int from = kind == CODEBOOK4 ? part ^ 1 : part;
        if (!BYTEWISE(kind)) for (int i = 0; i < 2 * LANES; i++) ((int16_t *)to)[part * 2 * LANES + i] = codes[parts * i + from];
        else for (int i = 0; i < vector; i++) {
            const int16_t code = codes[parts * i + part], upper = (int16_t)((code + 128) >> 8);
            to[part * vector + i] = (char)upper;
            to[(parts + part) * vector + i] = (char)(code - 256 * upper);
        }
    }
#if BYTES
    if (BYTEWISE(kind)) {
        integers upper = zero_integers(), lower = upper;
        for (int part = 0; part < parts; part++) {
            upper = dot_bytes(upper, all_bytes(middle), load_words(to + part * vector));
            lower = dot_bytes(lower, all_bytes(middle), load_words(to + (parts + part) * vector));
        }
        store_negative(centre, join(upper, lower));
    }
#endif
}

/* One plane of one token. */
INLINE void prepare(
    const qlazy_product *p, const shape *s, const activations *x, const int kind, float *rest, int keep_rest, int64_t plane, int16_t *codes) {
    const int chunk = 4 * LANES * (kind == INT8 ? 1 : 2);
    for (int64_t b = 0; b < s->blocks; b++) {
        const int64_t first = b * s->block, left = p->columns - first, at = plane * s->padded + b;
        if (left >= MOST && s->block == MOST) round_block(rest + first, MOST, keep_rest, codes + first, x->scale + at, x->sum + at);
        else if (left >= PIECE && s->block == PIECE) round_block(rest + first, PIECE, keep_rest, codes + first, x->scale + at, x->sum + at);
        else round_block(rest + first, left < s->block ? left : s->block, keep_rest, codes + first, x->scale + at, x->sum + at);
    }
    for (int64_t c = 0; c < s->chunks; c++) {
        const int64_t at = plane * s->chunks + c;
        lay_out(codes + c * chunk, kind, x->codes + at * 2 * chunk, x->centre + at * LANES);
    }
}
