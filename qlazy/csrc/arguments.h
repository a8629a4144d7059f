/* What C code is given for a product: the one thing that op.cpp, the loops and Python's struct.pack have to agree on. */
#pragma once
#include <stdint.h>

enum { INT4 = 0, INT8 = 1, CODEBOOK4 = 2 };
enum { BFLOAT16 = 0, FLOAT32 = 1, FLOAT16 = 2 };

typedef struct {
    const uint8_t *packed; /* INT4: (N, K/2), low nibble first; INT8: (N, K), codes 128 too large; CODEBOOK4: (N * K/2), high nibble first */
    const void *scale;     /* (N, G); CODEBOOK4: absmax, float32 or where nested uint8 */
    const int32_t *zero;   /* INT4: (ceil(N/8), G), a nibble for each row; NULL where the zero is 8 */
    const float *nested_absmax, *nested_offset, *nested_code, *code; /* CODEBOOK4 */
    const void *x, *bias;  /* (M, K) and (N) or NULL */
    void *y;               /* (M, N), in the dtype of x */
    int64_t kind, scale_dtype, x_dtype, bias_dtype;
    int64_t tokens, rows, columns, group; /* M, N, K; columns that share a scale, a divisor of K */
    int64_t threads;
} qlazy_product;

#ifdef __cplusplus
extern "C"
#endif
/* 0, or 1 where memory for x could not be had. */
int64_t qlazy_linear(const qlazy_product *p);
