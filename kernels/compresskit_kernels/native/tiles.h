// Products of queries with a tile of 16 rows, and of weights with its columns; the softmax between.
#pragma once
#include "codes.h"

namespace {

constexpr int BLOCK = 4;  // queries, and chunks of the output, held in registers

// Lane j of the result: the sum of all lanes of v[j].
INLINE __m512 sums(__m512* v) {
  for (int i = 0; i < 8; i++)
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44),
                         _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee));
  for (int i = 0; i < 4; i++)
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 4], 0x88),
                         _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd));
  for (int i = 0; i < 4; i += 2)
    v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 1]), _mm512_unpackhi_ps(v[i], v[i + 1]));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(v[0], v[2], 0x44),
                                   _mm512_shuffle_ps(v[0], v[2], 0xee));
  return _mm512_shuffle_f32x4(all, all, 0xd8);
}

INLINE __m512i sums(__m512i* v) {
#define PAIR(low, high) _mm512_add_epi32(_mm512_castps_si512(low), _mm512_castps_si512(high))
  const auto f = [](__m512i x) { return _mm512_castsi512_ps(x); };
  for (int i = 0; i < 8; i++)
    v[i] = PAIR(_mm512_shuffle_f32x4(f(v[i]), f(v[i + 8]), 0x44),
                _mm512_shuffle_f32x4(f(v[i]), f(v[i + 8]), 0xee));
  for (int i = 0; i < 4; i++)
    v[i] = PAIR(_mm512_shuffle_f32x4(f(v[i]), f(v[i + 4]), 0x88),
                _mm512_shuffle_f32x4(f(v[i]), f(v[i + 4]), 0xdd));
  for (int i = 0; i < 4; i += 2)
    v[i] = PAIR(_mm512_unpacklo_ps(f(v[i]), f(v[i + 1])), _mm512_unpackhi_ps(f(v[i]), f(v[i + 1])));
  const __m512i all = PAIR(_mm512_shuffle_ps(f(v[0]), f(v[2]), 0x44),
                           _mm512_shuffle_ps(f(v[0]), f(v[2]), 0xee));
#undef PAIR
  return _mm512_shuffle_i32x4(all, all, 0xd8);
}

// Products of one query with 16 rows, both in words: codes, whose sums fit 32 bits, or levels, of which
// the sum of D / 16 does.
template <int CHUNKS, bool LEVELS>
INLINE __m512 word_scores(const int16_t* query, const int16_t* tile, int some) {
  const int pairs = (CHUNKS ? CHUNKS : some) / 2, width = 32 * pairs;
  __m512i sum[TILE];
  for (int t = 0; t < TILE; t++) sum[t] = _mm512_setzero_si512();
  for (int c = 0; c < pairs; c++) {
    const __m512i q = _mm512_loadu_si512(query + 32 * c);
    for (int t = 0; t < TILE; t++)
      sum[t] = _mm512_dpwssd_epi32(sum[t], q, _mm512_loadu_si512(tile + t * width + 32 * c));
  }
  if constexpr (LEVELS) {
    __m512 wide[TILE];
    for (int t = 0; t < TILE; t++) wide[t] = _mm512_cvtepi32_ps(sum[t]);
    return sums(wide);
  }
  return _mm512_cvtepi32_ps(sums(sum));
}

// Scores of one query with 16 rows.
template <int CHUNKS>
INLINE __m512 scores_of(const float* query, const float* tile, int some) {
  const int chunks = CHUNKS ? CHUNKS : some;
  const int width = 16 * chunks;
  __m512 sum[TILE];
  for (int t = 0; t < TILE; t++) sum[t] = _mm512_setzero_ps();
  for (int c = 0; c < chunks; c++) {
    const __m512 q = _mm512_loadu_ps(query + 16 * c);
    for (int t = 0; t < TILE; t++)
      sum[t] = _mm512_fmadd_ps(q, _mm512_loadu_ps(tile + t * width + 16 * c), sum[t]);
  }
  return sums(sum);
}

// Turn scores [0, padded) into weights in place; what is not seen is -inf. Zeros if nothing is seen.
void soften(float* scores, int64_t padded) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t s = 0; s < padded; s += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + s));
  const float top = _mm512_reduce_max_ps(most);
  if (top == -INFINITY) {
    memset(scores, 0, sizeof(float) * padded);
    return;
  }
  const __m512 level = _mm512_set1_ps(top);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < padded; s += 16) {
    const __m512 score = _mm512_loadu_ps(scores + s);
    const __mmask16 seen = _mm512_cmp_ps_mask(score, _mm512_set1_ps(-INFINITY), _CMP_GT_OQ);
    const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(score, level)));
    _mm512_storeu_ps(scores + s, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
  for (int64_t s = 0; s < padded; s += 16)
    _mm512_storeu_ps(scores + s, _mm512_mul_ps(_mm512_loadu_ps(scores + s), share));
}

// Add the rows of a tile, weighted, to ROWS outputs [D] that lie `width` apart; WIDE chunks of them.
template <int ROWS, int WIDE>
INLINE void gather_block(const float* weights, const float* tile, int width, int count, float* out) {
  __m512 sum[ROWS][WIDE];
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < WIDE; i++) sum[r][i] = _mm512_loadu_ps(out + r * width + 16 * i);
  for (int t = 0; t < count; t++)
    for (int i = 0; i < WIDE; i++) {
      const __m512 value = _mm512_loadu_ps(tile + t * width + 16 * i);
      for (int r = 0; r < ROWS; r++)
        sum[r][i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[r * TILE + t]), value, sum[r][i]);
    }
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < WIDE; i++) _mm512_storeu_ps(out + r * width + 16 * i, sum[r][i]);
}

template <int ROWS>
INLINE void gather(const float* weights, const float* tile, int chunks, int count, float* out) {
  const int width = 16 * chunks;
  int c = 0;
  for (; c + BLOCK <= chunks; c += BLOCK)
    gather_block<ROWS, BLOCK>(weights, tile + 16 * c, width, count, out + 16 * c);
  for (; c < chunks; c += 2)  // D is a multiple of 32
    gather_block<ROWS, 2>(weights, tile + 16 * c, width, count, out + 16 * c);
}

void gather(int rows, const float* weights, const float* tile, int chunks, int count, float* out) {
  switch (rows) {
    case 1: return gather<1>(weights, tile, chunks, count, out);
    case 2: return gather<2>(weights, tile, chunks, count, out);
    case 3: return gather<3>(weights, tile, chunks, count, out);
    default: return gather<4>(weights, tile, chunks, count, out);
  }
}

// As gather_block for 32 * WIDE numbers, with words: two tokens a step.
template <int ROWS, int WIDE>
INLINE void gather_words(const int32_t* weights, const float* steps, const int16_t* tile, int width,
                         float* out) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  __m512i sum[ROWS][2 * WIDE];
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < 2 * WIDE; i++) sum[r][i] = _mm512_setzero_si512();
  for (int p = 0; p < TILE / 2; p++)
    for (int i = 0; i < WIDE; i++) {
      const __m512i even = _mm512_loadu_si512(tile + 2 * p * width + 32 * i);
      const __m512i odd = _mm512_loadu_si512(tile + (2 * p + 1) * width + 32 * i);
      const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
      for (int r = 0; r < ROWS; r++) {
        const __m512i by = _mm512_set1_epi32(weights[r * TILE / 2 + p]);
        sum[r][2 * i] = _mm512_dpwssd_epi32(sum[r][2 * i], low, by);
        sum[r][2 * i + 1] = _mm512_dpwssd_epi32(sum[r][2 * i + 1], high, by);
      }
    }
  for (int r = 0; r < ROWS; r++) {
    const __m512 step = _mm512_set1_ps(steps[r]);
    for (int i = 0; i < WIDE; i++) {
      float* to = out + r * width + 32 * i;
      const __m512i low = sum[r][2 * i], high = sum[r][2 * i + 1];
      const __m512 a = _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(low, first, high));
      const __m512 b = _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(low, second, high));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(a, step, _mm512_loadu_ps(to)));
      _mm512_storeu_ps(to + 16, _mm512_fmadd_ps(b, step, _mm512_loadu_ps(to + 16)));
    }
  }
}

// The same for `pairs` runs of 32 numbers.
void gather_words(int rows, const int32_t* weights, const float* steps, const int16_t* tile,
                  int pairs, int width, float* out) {
  for (int i = 0; i < pairs; i++, tile += 32, out += 32) {
    const bool two = i + 1 < pairs;
    switch (rows) {
      case 1: two ? gather_words<1, 2>(weights, steps, tile, width, out)
                  : gather_words<1, 1>(weights, steps, tile, width, out); break;
      case 2: two ? gather_words<2, 2>(weights, steps, tile, width, out)
                  : gather_words<2, 1>(weights, steps, tile, width, out); break;
      case 3: two ? gather_words<3, 2>(weights, steps, tile, width, out)
                  : gather_words<3, 1>(weights, steps, tile, width, out); break;
      default: two ? gather_words<4, 2>(weights, steps, tile, width, out)
                   : gather_words<4, 1>(weights, steps, tile, width, out);
    }
    if (two) i++, tile += 32, out += 32;
  }
}

}  // namespace
