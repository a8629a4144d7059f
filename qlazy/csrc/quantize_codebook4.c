/* `quantize_blocks` of qlazy/quantizing/codebook.py, straight into storage: blocks of 64 elements of the flat weight. */
#include "quantize.h"

#define BLOCK 64
#define TINY 1e-38f

INLINE int64_t quantize_blocks(const qlazy_quantize *q, const int dtype) {
    const int64_t count = q->rows * q->columns;
    const void *weight = q->weight;
    uint8_t *restrict packed = q->packed;
    float *restrict absmax = q->scale;
    int64_t bad = -1;
    int32_t steps[15];
    float bounds[15];
    for (int b = 0; b < 15; b++) bounds[b] = q->factors[b], steps[b] = (int32_t)q->factors[15 + b];
    for (int64_t first = 0; first < count; first += BLOCK) {
        const int64_t size = count - first < BLOCK ? count - first : BLOCK;
        const float most = widest(weight, first, size, dtype), divisor = most < TINY ? TINY : most, inverse = 1.0f / divisor;
        float scaled[BLOCK];
        int32_t codes[BLOCK];
        if (size == BLOCK) {
            for (int k = 0; k < BLOCK; k++) scaled[k] = load_float(weight, first + k, dtype) * inverse;
        } else { /* a short block is divided, and keeps the least divisor */
            for (int k = 0; k < BLOCK; k++) scaled[k] = k < size ? load_float(weight, first + k, dtype) / divisor : 0.0f;
        }
        absmax[first / BLOCK] = size == BLOCK ? most : divisor;
        if (!is_finite(most) && bad < 0) bad = first / q->columns;
        for (int k = 0; k < BLOCK; k++) {
            int32_t code = (int32_t)q->count;
            for (int b = 0; b < 15; b++) code += scaled[k] > bounds[b] ? steps[b] : 0;
            codes[k] = code;
        }
        if (size == BLOCK) for (int k = 0; k < BLOCK / 2; k++) packed[first / 2 + k] = (uint8_t)(codes[2 * k] << 4 | codes[2 * k + 1]);
        else for (int k = 0; k < (size + 1) / 2; k++) packed[first / 2 + k] = (uint8_t)(codes[2 * k] << 4 | codes[2 * k + 1]);
    }
    return bad;
}

/* codes uint8 (ceil(count / 2)), the even element in the high nibble. Returns the row of the first block that is not finite, or -1. */
int64_t qlazy_quantize_codebook4(const qlazy_quantize *q) {
    return q->dtype == BFLOAT16 ? quantize_blocks(q, BFLOAT16) : q->dtype == FLOAT16 ? quantize_blocks(q, FLOAT16) : quantize_blocks(q, FLOAT32);
}
