/* The few vector operations that the products need, for AVX-512, for AVX2 and in plain C.
 *
 * LANES 32-bit lanes a vector, twice as many 16-bit words, four times as many bytes. `dot` multiplies words with words, adds the two
 * products of each lane to it and wraps around as 32-bit integers do. Where BYTES is set, `dot_bytes` does so with the four products
 * of unsigned bytes and signed ones.
 */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512BW__) && defined(__AVX512VL__)

#define LANES 16
typedef __m512i words, integers, word_table;
typedef __m512 floats;
#define INLINE static inline __attribute__((always_inline))
INLINE words load_words(const void *from) { return _mm512_loadu_si512(from); }
INLINE integers zero_integers(void) { return _mm512_setzero_si512(); }
/* Codes of 4 bits less 8, by a table where that is one step; and below, codes of 8 bits less 128. */
INLINE words centred(words w, int shift) {
    const __m512i table = _mm512_set_epi16(
        7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8, 7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(w, shift), table);
}
INLINE words low_byte(words w) { return _mm512_sub_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)), _mm512_set1_epi16(128)); }
INLINE words high_byte(words w) { return _mm512_sub_epi16(_mm512_srli_epi16(w, 8), _mm512_set1_epi16(128)); }
INLINE integers dot(integers sum, words a, words b) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
/* The word of `table` that the low four bits of each word of `w >> shift` name; `table` repeats its 16 words. */
INLINE words look_up(word_table table, words w, int shift) { return _mm512_permutexvar_epi16(_mm512_srli_epi16(w, shift), table); }
INLINE word_table make_table(const int16_t *values) {
    const __m256i once = _mm256_loadu_si256((const __m256i *)values);
    return _mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1);
}
#ifdef __AVX512VNNI__
#define BYTES 1
INLINE integers load_integers(const int32_t *from) { return _mm512_loadu_si512(from); }
INLINE void store_negative(int32_t *to, integers v) { _mm512_storeu_si512(to, _mm512_sub_epi32(_mm512_setzero_si512(), v)); }
INLINE words all_bytes(int value) { return _mm512_set1_epi8((char)value); }
INLINE words low_nibbles(words w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
INLINE words high_nibbles(words w) { return low_nibbles(_mm512_srli_epi16(w, 4)); }
INLINE integers dot_bytes(integers sum, words a, words b) { return _mm512_dpbusd_epi32(sum, a, b); }
INLINE integers join(integers high, integers low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
#endif
INLINE floats to_floats(integers w) { return _mm512_cvtepi32_ps(w); }
INLINE floats load_floats(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store_floats(float *to, floats v) { _mm512_storeu_ps(to, v); }
INLINE floats zero_floats(void) { return _mm512_setzero_ps(); }
INLINE floats multiply(floats a, floats b) { return _mm512_mul_ps(a, b); }
INLINE floats multiply_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats spread_floats(floats v, const int32_t *lanes) { return _mm512_permutexvar_ps(_mm512_loadu_si512(lanes), v); }
INLINE float sum_floats(floats v) { return _mm512_reduce_add_ps(v); }

#elif defined(__AVX2__) && defined(__FMA__)

#define LANES 8
typedef __m256i words, integers, word_table;
typedef __m256 floats;
#define INLINE static inline __attribute__((always_inline))
INLINE words load_words(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE integers zero_integers(void) { return _mm256_setzero_si256(); }
INLINE words nibble(words w, int shift) { return _mm256_and_si256(_mm256_srli_epi16(w, shift), _mm256_set1_epi16(15)); }
INLINE words centred(words w, int shift) { return _mm256_sub_epi16(nibble(w, shift), _mm256_set1_epi16(8)); }
INLINE words low_byte(words w) { return _mm256_sub_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_set1_epi16(128)); }
INLINE words high_byte(words w) { return _mm256_sub_epi16(_mm256_srli_epi16(w, 8), _mm256_set1_epi16(128)); }
INLINE integers dot(integers sum, words a, words b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
/* The table is kept as 16 low bytes and 16 high bytes, in the two halves of one vector. */
INLINE words look_up(word_table table, words w, int shift) {
    const words low = _mm256_permute4x64_epi64(table, 0x44), high = _mm256_permute4x64_epi64(table, 0xee);
    const words index = nibble(w, shift);
    const words from_low = _mm256_shuffle_epi8(low, _mm256_or_si256(index, _mm256_set1_epi16((short)0x8000)));
    const words from_high = _mm256_shuffle_epi8(high, _mm256_or_si256(_mm256_slli_epi16(index, 8), _mm256_set1_epi16(0x0080)));
    return _mm256_or_si256(from_low, from_high);
}
INLINE word_table make_table(const int16_t *values) {
    uint8_t bytes[32];
    for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)values[i], bytes[16 + i] = (uint8_t)((uint16_t)values[i] >> 8);
    return _mm256_loadu_si256((const __m256i *)bytes);
}
#ifdef __AVXVNNI__
#define BYTES 1
INLINE integers load_integers(const int32_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE void store_negative(int32_t *to, integers v) { _mm256_storeu_si256((__m256i *)to, _mm256_sub_epi32(_mm256_setzero_si256(), v)); }
INLINE words all_bytes(int value) { return _mm256_set1_epi8((char)value); }
INLINE words low_nibbles(words w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
INLINE words high_nibbles(words w) { return low_nibbles(_mm256_srli_epi16(w, 4)); }
INLINE integers dot_bytes(integers sum, words a, words b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
INLINE integers join(integers high, integers low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
#endif
INLINE floats to_floats(integers w) { return _mm256_cvtepi32_ps(w); }
INLINE floats load_floats(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store_floats(float *to, floats v) { _mm256_storeu_ps(to, v); }
INLINE floats zero_floats(void) { return _mm256_setzero_ps(); }
INLINE floats multiply(floats a, floats b) { return _mm256_mul_ps(a, b); }
INLINE floats multiply_add(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE floats spread_floats(floats v, const int32_t *lanes) {
    return _mm256_permutevar8x32_ps(v, _mm256_loadu_si256((const __m256i *)lanes));
}
INLINE float sum_floats(floats v) {
    float lanes[8], sum = 0.0f;
    _mm256_storeu_ps(lanes, v);
    for (int i = 0; i < 8; i++) sum += lanes[i];
    return sum;
}

#else

#define LANES 8
#define INLINE static inline
#define EACH_LANE for (int i = 0; i < LANES; i++)
#define EACH_WORD for (int i = 0; i < 2 * LANES; i++)
typedef struct { int16_t at[2 * LANES]; } words;
typedef struct { int32_t at[LANES]; } integers;
typedef struct { float at[LANES]; } floats;
typedef struct { int16_t at[16]; } word_table;
INLINE words load_words(const void *from) { words w; memcpy(&w, from, sizeof w); return w; }
INLINE integers zero_integers(void) { integers s = {{0}}; return s; }
INLINE words centred(words w, int shift) { EACH_WORD w.at[i] = (int16_t)(((uint16_t)w.at[i] >> shift & 15) - 8); return w; }
INLINE words low_byte(words w) { EACH_WORD w.at[i] = (int16_t)(((uint16_t)w.at[i] & 255) - 128); return w; }
INLINE words high_byte(words w) { EACH_WORD w.at[i] = (int16_t)(((uint16_t)w.at[i] >> 8) - 128); return w; }
INLINE integers dot(integers s, words a, words b) {
    EACH_LANE s.at[i] += a.at[2 * i] * b.at[2 * i] + a.at[2 * i + 1] * b.at[2 * i + 1];
    return s;
}
INLINE words look_up(word_table t, words w, int shift) { EACH_WORD w.at[i] = t.at[(uint16_t)w.at[i] >> shift & 15]; return w; }
INLINE word_table make_table(const int16_t *values) { word_table t; memcpy(&t, values, sizeof t); return t; }
INLINE floats to_floats(integers s) { floats v; EACH_LANE v.at[i] = (float)s.at[i]; return v; }
INLINE floats load_floats(const float *from) { floats v; memcpy(&v, from, sizeof v); return v; }
INLINE void store_floats(float *to, floats v) { memcpy(to, &v, sizeof v); }
INLINE floats zero_floats(void) { floats v = {{0}}; return v; }
INLINE floats multiply(floats a, floats b) { EACH_LANE a.at[i] *= b.at[i]; return a; }
INLINE floats multiply_add(floats a, floats b, floats c) { EACH_LANE c.at[i] += a.at[i] * b.at[i]; return c; }
INLINE floats spread_floats(floats v, const int32_t *lanes) { floats s; EACH_LANE s.at[i] = v.at[lanes[i]]; return s; }
INLINE float sum_floats(floats v) { float sum = 0.0f; EACH_LANE sum += v.at[i]; return sum; }

#endif
