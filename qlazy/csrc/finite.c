/* Whether all of a tensor is finite, in one pass. */
#include "quantize.h"

/* 1 where `count` values hold neither NaN nor infinity. */
int64_t qlazy_is_finite(const void *values, int64_t count, int64_t dtype) {
    const int64_t step = 1 << 14;
    for (int64_t first = 0; first < count; first += step) {
        const int64_t size = count - first < step ? count - first : step;
        const float most = dtype == BFLOAT16  ? widest(values, first, size, BFLOAT16)
                           : dtype == FLOAT16 ? widest(values, first, size, FLOAT16)
                                              : widest(values, first, size, FLOAT32);
        if (!is_finite(most)) return 0;
    }
    return 1;
}
