// Attention of a few new tokens over a quantised cache, for x86 CPUs with AVX-512 VBMI.
//
// Per sequence and key/value head, over tiles of 16 tokens, for all its queries at once:
//
//   keys   ──levels──► tile [16, D] float32 ──► scores[r][s] = q[r] . tile[s]
//   softmax over s in float32
//   values ──levels──► tile [16, D] float32 ──► out[r] += sum_s weights[r][s] * tile[s]
//
// so every code is read once and decoded once, whatever the number of queries. A scale of a whole
// row is not multiplied into the tile: it multiplies a score, or joins a weight. Rows that were turned
// before they were coded are never turned back: queries are turned first, and outputs last.
//
// For bfloat16 queries, whole-number codes stay whole numbers: they are multiplied, as 16-bit words,
// with queries and weights rounded to 16 bits of their largest (relative 2^-16, where the result is
// rounded by 2^-9), and sums are exact. That is a third of the work. Levels of a table become words
// too, of 14 bits or 16.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tiles.h"

extern "C" struct CodedAttention {
  const char* query;    // [B, H, Q, D], rows dense
  char* out;            // [B, Q, H, D], dense, in the type of the query
  const uint8_t* mask;  // [B, S] or null
  const int64_t* lengths;  // [B] or null
  int64_t batch, heads, key_heads, queries, width, slots;
  int64_t query_batch, query_head, query_row;  // strides in bytes
  int64_t type;
  double scale;
  const float* turn;  // [D, D], dense, or null: what the rows of both sides were multiplied by
  CodedSide keys, values;
};

namespace {

// Multiply `rows` rows [D] by `turn` [D, D]; `room` holds as many, in whole blocks.
void turn_rows(int64_t rows, int chunks, const float* turn, float* x, float* room) {
  const int64_t width = 16 * chunks;
  memset(room, 0, sizeof(float) * ((rows + BLOCK - 1) / BLOCK * BLOCK) * width);
  for (int64_t r = 0; r < rows; r += BLOCK) {
    const int some = rows - r < BLOCK ? int(rows - r) : BLOCK;
    for (int64_t d = 0; d < width; d += TILE) {  // the matrix as tiles of rows, the numbers as weights
      float weights[BLOCK * TILE];
      for (int i = 0; i < some; i++)
        memcpy(weights + i * TILE, x + (r + i) * width + d, sizeof(float) * TILE);
      gather(some, weights, turn + d * width, chunks, TILE, room + r * width);
    }
  }
  memcpy(x, room, sizeof(float) * rows * width);
}

template <int CHUNKS>
void attend(const CodedAttention& a, int64_t batch, int64_t head) {
  const int64_t per = a.heads / a.key_heads, rows = per * a.queries, width = a.width;
  const int chunks = int(width / 16);
  int64_t length = a.lengths ? a.lengths[batch] : a.slots;
  if (length > a.slots) length = a.slots;
  const int64_t padded = (length + TILE - 1) / TILE * TILE;
  const uint8_t* mask = a.mask ? a.mask + batch * a.slots : nullptr;
  const Reader<CHUNKS> keys(a.keys, batch, head, width, false),
      values(a.values, batch, head, width, true);

  static thread_local std::vector<float> room;
  const int64_t block = (rows + BLOCK - 1) / BLOCK * BLOCK;
  const int64_t shifts = a.values.span == 1 ? a.values.groups : 1;
  room.resize(rows * (width + 1 + shifts + padded) + block * width + TILE * width);
  float* query = room.data();            // [rows, D], scaled
  float* total = query + rows * width;   // sum of each query's numbers: what an offset adds
  float* shift = total + rows;           // [rows, groups]: what the values' offsets add to a group
  float* out = shift + rows * shifts;    // [rows, D]
  float* tile = out + block * width;     // [TILE, D]
  float* scores = tile + TILE * width;   // [rows, padded]
  for (int64_t r = 0; r < rows; r++) {
    const char* from = a.query + batch * a.query_batch + (head * per + r / a.queries) * a.query_head +
                       r % a.queries * a.query_row;
    for (int c = 0; c < chunks; c++) {
      const __m512 x = _mm512_mul_ps(widened16(from + 16 * c * (a.type == F32 ? 4 : 2), a.type),
                                     _mm512_set1_ps(float(a.scale)));
      _mm512_storeu_ps(query + r * width + 16 * c, x);
    }
  }
  if (a.turn) turn_rows(rows, chunks, a.turn, query, out);
  for (int64_t r = 0; r < rows; r++) {
    __m512 sum = _mm512_setzero_ps();
    for (int c = 0; c < chunks; c++)
      sum = _mm512_add_ps(sum, _mm512_loadu_ps(query + r * width + 16 * c));
    total[r] = _mm512_reduce_add_ps(sum);
  }
  memset(shift, 0, sizeof(float) * rows * shifts);
  memset(out, 0, sizeof(float) * block * width);

  alignas(64) float scale[TILE * MOST_CHUNKS], offset[TILE * MOST_CHUNKS], weights[BLOCK * TILE];
  const bool key_words = a.type == BF16 && keys.whole && (keys.folded || a.keys.span > 1);
  const bool value_words =
      a.type == BF16 && values.whole && a.values.span == 1 && width / a.values.groups % 32 == 0;
  static thread_local std::vector<int16_t> short_room;
  short_room.resize(TILE * width + rows * width);
  int16_t *word_tile = short_room.data(), *word_query = word_tile + TILE * width;
  static thread_local std::vector<float> step_room;
  step_room.resize(2 * rows);
  float *steps = step_room.data(), *plus_of = steps + rows;  // of each query, for this span
  if (key_words && keys.folded)
    for (int64_t r = 0; r < rows; r++) {
      __m512 x[MOST_CHUNKS];
      for (int c = 0; c < chunks; c++) x[c] = _mm512_loadu_ps(query + r * width + 16 * c);
      steps[r] = to_words(x, chunks, word_query + r * width) * keys.step;
    }
  for (int64_t first = 0; first < length; first += TILE) {
    const int count = length - first < TILE ? int(length - first) : TILE;
    const bool in_words = key_words && first + count <= a.keys.coded;
    if (!in_words) {
      keys.read(first, count, tile, scale, offset);
    } else {
      keys.read_words(first, count, word_tile);
      if (keys.folded)
        keys.read_grid(first, count, scale, offset);
      else if (first % a.keys.span == 0)
        for (int64_t r = 0; r < rows; r++)
          plus_of[r] = keys.scale_query(first, query + r * width, word_query + r * width, steps + r);
    }
    const __m512 by = _mm512_load_ps(scale), plus = _mm512_load_ps(offset);
    __mmask16 real = __mmask16((1u << count) - 1);
    if (mask) {
      const __m128i seen = _mm_maskz_loadu_epi8(real, mask + first);
      real = _mm_test_epi8_mask(seen, seen);
    }
    for (int64_t r = 0; r < rows; r++) {
      __m512 score;
      if (in_words)
        score = _mm512_mul_ps(
            a.keys.table ? word_scores<CHUNKS, true>(word_query + r * width, word_tile, chunks)
                         : word_scores<CHUNKS, false>(word_query + r * width, word_tile, chunks),
            _mm512_set1_ps(steps[r]));
      else
        score = scores_of<CHUNKS>(query + r * width, tile, chunks);
      if (in_words && !keys.folded)
        score = _mm512_add_ps(score, _mm512_set1_ps(plus_of[r]));
      else
        score = _mm512_fmadd_ps(score, by, _mm512_mul_ps(plus, _mm512_set1_ps(total[r])));
      // Causal among the new tokens, the last of the sequence.
      const int64_t sees = length - a.queries + r % a.queries + 1 - first;
      const __mmask16 past = sees >= TILE ? 0xffff : sees <= 0 ? 0 : __mmask16((1u << sees) - 1);
      score = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), real & past, score);
      _mm512_storeu_ps(scores + r * padded + first, score);
    }
  }
  for (int64_t r = 0; r < rows; r++) soften(scores + r * padded, padded);
  for (int64_t first = 0; first < length; first += TILE) {
    const int count = length - first < TILE ? int(length - first) : TILE;
    if (value_words && first + count <= a.values.coded) {
      values.read_words(first, count, word_tile);
      __mmask16 seen = __mmask16((1u << count) - 1);
      if (mask) {
        const __m128i bytes = _mm_maskz_loadu_epi8(seen, mask + first);
        seen = _mm_test_epi8_mask(bytes, bytes);
      }
      values.read_grid(first, count, scale, offset);
      const int groups = int(a.values.groups), group = int(width / groups);
      const __m512i lane = _mm512_mullo_epi32(_mm512_set1_epi32(groups), _mm512_setr_epi32(
          0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      for (int g = 0; g < groups; g++) {
        const __m512 none = _mm512_setzero_ps();
        const __m512 by = _mm512_mask_i32gather_ps(none, seen, lane, scale + g, 4);
        const __m512 plus = _mm512_mask_i32gather_ps(none, seen, lane, offset + g, 4);
        for (int64_t r = 0; r < rows; r += BLOCK) {
          const int some = rows - r < BLOCK ? int(rows - r) : BLOCK;
          alignas(64) int16_t words[BLOCK * TILE];
          float step[BLOCK];
          for (int i = 0; i < some; i++) {
            const __m512 weight = _mm512_loadu_ps(scores + (r + i) * padded + first);
            const __m512 x = _mm512_mul_ps(weight, by);
            step[i] = to_words(x, words + i * TILE, values.most) * values.step;
            if (values.offsets)
              shift[(r + i) * groups + g] += _mm512_reduce_add_ps(_mm512_mul_ps(weight, plus));
          }
          gather_words(some, reinterpret_cast<const int32_t*>(words), step, word_tile + g * group,
                       group / 32, int(width), out + r * width + g * group);
        }
      }
      continue;
    }
    values.read(first, count, tile, scale, offset);
    __m512 by = _mm512_load_ps(scale), plus = _mm512_load_ps(offset);
    if (mask) {  // a slot that nobody sees may hold anything, and 0 * NaN is NaN
      __mmask16 seen = 0;
      for (int t = 0; t < count; t++) {
        if (mask[first + t])
          seen |= __mmask16(1u << t);
        else
          memset(tile + t * width, 0, sizeof(float) * width);
      }
      by = _mm512_maskz_mov_ps(seen, by), plus = _mm512_maskz_mov_ps(seen, plus);
    }
    for (int64_t r = 0; r < rows; r += BLOCK) {
      const int some = rows - r < BLOCK ? int(rows - r) : BLOCK;
      for (int i = 0; i < some; i++) {
        const __m512 weight = _mm512_loadu_ps(scores + (r + i) * padded + first);
        _mm512_store_ps(weights + i * TILE, _mm512_mul_ps(weight, by));
        if (values.folded && values.offsets)
          shift[r + i] += _mm512_reduce_add_ps(_mm512_mul_ps(weight, plus));
      }
      gather(some, weights, tile, chunks, count, out + r * width);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    const int64_t to = ((batch * a.queries + r % a.queries) * a.heads + head * per + r / a.queries);
    float* row = out + r * width;
    for (int c = 0; c < chunks; c++)
      _mm512_storeu_ps(row + 16 * c,
                       _mm512_add_ps(_mm512_loadu_ps(row + 16 * c),
                                     _mm512_set1_ps(shift[r * shifts + c * shifts / chunks])));
    for (int c = 0; c < chunks; c++) {
      const __m512 x = a.turn ? scores_of<CHUNKS>(row, a.turn + 16 * c * width, chunks)
                              : _mm512_loadu_ps(row + 16 * c);
      const int64_t at = to * width + 16 * c;
      if (a.type == BF16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.out + 2 * at), (__m256i)_mm512_cvtneps_pbh(x));
      else
        _mm512_storeu_ps(a.out + 4 * at, x);
    }
  }
}

}  // namespace

extern "C" void compresskit_coded_attention(const CodedAttention* call) {
  const CodedAttention& a = *call;
  const int64_t tasks = a.batch * a.key_heads;
  // A barrier costs more than a short cache: below this many numbers one thread does it all.
#pragma omp parallel for schedule(static) if (tasks * a.slots * a.width > (1 << 20))
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t batch = task / a.key_heads, head = task % a.key_heads;
    if (a.width == 64)
      attend<4>(a, batch, head);
    else if (a.width == 128)
      attend<8>(a, batch, head);
    else
      attend<0>(a, batch, head);
  }
}
