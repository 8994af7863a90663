// Attention over bare keys and values with outliers apart, for x86 CPUs with AVX-512 VBMI and BF16.
//
// As coded_attention.cpp, by tiles of 16 tokens. A tile of keys that begins at position p is turned by
// the angles of 0 to 15 only, which are the same for every tile; the queries are turned back by p
// instead, once a tile, so that all angles come from one small table and no cosine is computed here:
//
//   keys   ──levels, ranges of channels, outliers──► tile ──R(0) ... R(15)──► . R(-p) q = scores
//   values ──levels, ranges of rows, outliers──────► tile, weighted
//
// For bfloat16 queries the levels of values meet the weights as words, and what outliers have more than
// their codes is added apart. The first tokens of the text are rows of numbers, with their positions:
// tiles behind the coded ones.
#include <algorithm>
#include <vector>

#include "bare.h"
#include "tiles.h"

// Every field has 8 bytes: the caller packs them without padding.
extern "C" struct BareAttention {
  const char* query;  // [B, H, Q, D], rows dense
  char* out;          // [B, Q, H, D], dense, in the type of the query
  int64_t batch, heads, key_heads, queries, width;
  int64_t query_batch, query_head, query_row;  // strides in bytes
  int64_t type;
  double scale;
  const float* frequencies;       // [turning]
  int64_t turning, first, apart;  // pairs of a row; F; numbers of a row that are kept
  int64_t apart_type;
  // The first F tokens are the tail of each side. Keys: scales and offsets of channels, one span.
  CodedSide keys, values;
  Apart key_apart, value_apart;
};

namespace {

struct Turns {
  Angles begin, step;                       // of the first coded token; of a whole tile
  float cos[TILE][MOST / 2], sin[TILE][MOST / 2];  // of the tokens within a tile
  void prepare(const float* frequencies, int64_t count, int64_t first) {
    Angles one;
    one.at(frequencies, count, 1);
    std::fill(step.cos, step.cos + count, 1.0);
    std::fill(step.sin, step.sin + count, 0.0);
    for (int t = 0; t < TILE; t++, step.add(one, count)) {
      step.single(count, cos[t], sin[t]);
      if (t == first) begin = step;
    }
    if (first >= TILE) begin.at(frequencies, count, double(first));
  }
};

// What the numbers kept in rows first to first + count have more than their codes, which `tile` [TILE, D]
// holds as words, times the weight of the row: added to `fix` [rows, D].
INLINE void add_apart(const BareAttention& a, int64_t batch, int64_t head, int64_t first, int count,
                      const int16_t* tile, float step, const float* scale, const float* offset,
                      int64_t rows, const float* weights, int64_t padded, float* fix) {
  const int64_t size = a.apart_type == F32 ? 4 : 2, at = first * a.apart;
  const Apart& from = a.value_apart;
  const char* numbers =
      from.numbers + batch * from.numbers_batch + head * from.numbers_head + at * size;
  const uint8_t* places = from.places + batch * from.places_batch + head * from.places_head + at;
  for (int t = 0; t < count; t++)
    for (int64_t i = t * a.apart; i < (t + 1) * a.apart; i++) {
      const float level = tile[t * a.width + places[i]] * step;
      const float more = widened(numbers + i * size, a.apart_type) - (level * scale[t] + offset[t]);
      for (int64_t r = 0; r < rows; r++)
        fix[r * a.width + places[i]] += weights[r * padded + first + t] * more;
    }
}

// Put the numbers that are kept into rows first to first + count, which `tile` [TILE, D] holds.
INLINE void put_apart(const BareAttention& a, const Apart& from, int64_t batch, int64_t head,
                      int64_t first, int count, float* tile) {
  const int64_t size = a.apart_type == F32 ? 4 : 2, at = first * a.apart, all = count * a.apart;
  const char* numbers =
      from.numbers + batch * from.numbers_batch + head * from.numbers_head + at * size;
  const uint8_t* places = from.places + batch * from.places_batch + head * from.places_head + at;
  for (int64_t i = 0, row = 0, left = a.apart; i < all; i++) {
    tile[row * a.width + places[i]] = widened(numbers + i * size, a.apart_type);
    if (--left == 0) left = a.apart, row++;
  }
}

// Scores of ROWS queries [D] with a tile whose pairs are all of a row: keys are turned and multiplied in
// registers, the tokens of a lane are added at the end.
template <int CHUNKS, int ROWS>
INLINE void turned_scores(const Turns& turns, const float* asked, const float* tile, __m512* scores) {
  constexpr int width = 16 * CHUNKS, half = CHUNKS / 2;
  __m512 sum[ROWS][TILE];
  for (int t = 0; t < TILE; t++) {
    const float *x = tile + t * width, *cos = turns.cos[t], *sin = turns.sin[t];
    for (int r = 0; r < ROWS; r++) sum[r][t] = _mm512_setzero_ps();
    for (int c = 0; c < half; c++) {
      const __m512 a = _mm512_loadu_ps(x + 16 * c), b = _mm512_loadu_ps(x + 16 * (c + half));
      const __m512 along = _mm512_loadu_ps(cos + 16 * c), across = _mm512_loadu_ps(sin + 16 * c);
      const __m512 first = _mm512_fmsub_ps(a, along, _mm512_mul_ps(b, across));
      const __m512 second = _mm512_fmadd_ps(b, along, _mm512_mul_ps(a, across));
      for (int r = 0; r < ROWS; r++) {
        const float* q = asked + r * width;
        sum[r][t] = _mm512_fmadd_ps(_mm512_loadu_ps(q + 16 * c), first, sum[r][t]);
        sum[r][t] = _mm512_fmadd_ps(_mm512_loadu_ps(q + 16 * (c + half)), second, sum[r][t]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++) scores[r] = sums(sum[r]);
}

template <int CHUNKS>
INLINE void turned_scores(int rows, const Turns& turns, const float* asked, const float* tile,
                          __m512* scores) {
  switch (rows) {
    case 1: return turned_scores<CHUNKS, 1>(turns, asked, tile, scores);
    case 2: return turned_scores<CHUNKS, 2>(turns, asked, tile, scores);
    case 3: return turned_scores<CHUNKS, 3>(turns, asked, tile, scores);
    default: return turned_scores<CHUNKS, 4>(turns, asked, tile, scores);
  }
}

template <int CHUNKS>
void attend(const BareAttention& a, const Turns& turns, int64_t batch, int64_t head) {
  const int64_t per = a.heads / a.key_heads, rows = per * a.queries, width = a.width;
  const int64_t coded = a.keys.coded, behind = (coded + TILE - 1) / TILE * TILE;
  const int64_t padded = behind + (a.first + TILE - 1) / TILE * TILE;
  const int chunks = int(width / 16);
  const Reader<CHUNKS> keys(a.keys, batch, head, width, false),
      values(a.values, batch, head, width, true);

  static thread_local std::vector<float> room;
  const int64_t block = (rows + BLOCK - 1) / BLOCK * BLOCK;
  room.resize(rows * (3 * width + 1 + padded) + block * width + TILE * width);
  float* query = room.data();           // [rows, D], scaled
  float* asked = query + rows * width;  // [rows, D], turned back to the begin of a tile
  float* out = asked + rows * width;    // [rows, D]
  float* tile = out + block * width;    // [TILE, D]
  float* scores = tile + TILE * width;  // [rows, padded]
  float* fix = scores + rows * padded;  // [rows, D]: what outliers have more than their codes
  float* shift = fix + rows * width;    // [rows]: what the values' offsets add up to
  const bool in_words = a.type == BF16 && values.whole;
  static thread_local std::vector<int16_t> short_room;
  short_room.resize(TILE * width);
  alignas(64) float scale[TILE], offset[TILE], weights[BLOCK * TILE];
  for (int64_t r = 0; r < rows; r++) {
    const char* from = a.query + batch * a.query_batch + (head * per + r / a.queries) * a.query_head +
                       r % a.queries * a.query_row;
    for (int c = 0; c < chunks; c++) {
      const __m512 x = _mm512_mul_ps(widened16(from + 16 * c * (a.type == F32 ? 4 : 2), a.type),
                                     _mm512_set1_ps(float(a.scale)));
      _mm512_storeu_ps(query + r * width + 16 * c, x);
    }
  }
  memcpy(asked, query, sizeof(float) * rows * width);
  memset(out, 0, sizeof(float) * block * width);
  memset(fix, 0, sizeof(float) * rows * (width + 1));

  const bool inside = CHUNKS != 0 && rows <= BLOCK && 2 * a.turning == width;
  Angles at = turns.begin;
  for (int64_t first = 0; first < padded; first += TILE) {
    const bool whole = first >= behind;  // first tokens, not coded
    const int64_t slot = whole ? coded + first - behind : first;
    const int64_t left = whole ? a.first - (first - behind) : coded - first;
    const int count = left < TILE ? int(left) : TILE;
    keys.read(slot, count, tile, scale, offset);
    if (!whole) {
      put_apart(a, a.key_apart, batch, head, first, count, tile);
      for (int t = 1; !inside && t < count; t++)
        turn_pairs(tile + t * width, turns.cos[t], turns.sin[t], a.turning, false, tile + t * width);
      float cos[MOST / 2], sin[MOST / 2];
      at.single(a.turning, cos, sin);
      at.add(turns.step, a.turning);
      for (int64_t r = 0; r < rows; r++)
        turn_pairs(query + r * width, cos, sin, a.turning, true, asked + r * width);
    }
    const __mmask16 real = __mmask16((1u << count) - 1);
    __m512 few[BLOCK];
    if constexpr (CHUNKS != 0)
      if (inside && !whole) turned_scores<CHUNKS>(int(rows), turns, asked, tile, few);
    for (int64_t r = 0; r < rows; r++) {
      const __m512 score =
          inside && !whole ? few[r]
                           : scores_of<CHUNKS>((whole ? query : asked) + r * width, tile, chunks);
      // Causal among the new tokens: the newest token that this query sees, counted as the tile is.
      const int64_t newest = coded - a.queries + r % a.queries + (whole ? a.first : 0);
      const int64_t sees = newest + 1 - (whole ? first - behind : first);
      const __mmask16 past = sees >= TILE ? 0xffff : sees <= 0 ? 0 : __mmask16((1u << sees) - 1);
      _mm512_storeu_ps(scores + r * padded + first,
                       _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), real & past, score));
    }
  }
  for (int64_t r = 0; r < rows; r++) soften(scores + r * padded, padded);
  for (int64_t first = 0; first < padded; first += TILE) {
    const bool whole = first >= behind;
    const int64_t slot = whole ? coded + first - behind : first;
    const int64_t left = whole ? a.first - (first - behind) : coded - first;
    const int count = left < TILE ? int(left) : TILE;
    if (!whole && in_words) {
      values.read_words(first, count, short_room.data());
      values.read_grid(first, count, scale, offset);
      const __mmask16 real = __mmask16((1u << count) - 1);
      const __m512 by = _mm512_maskz_loadu_ps(real, scale), plus = _mm512_maskz_loadu_ps(real, offset);
      for (int64_t r = 0; r < rows; r += BLOCK) {
        const int some = rows - r < BLOCK ? int(rows - r) : BLOCK;
        alignas(64) int16_t words[BLOCK * TILE];
        float step[BLOCK];
        for (int i = 0; i < some; i++) {
          const __m512 weight = _mm512_loadu_ps(scores + (r + i) * padded + first);
          step[i] = to_words(_mm512_mul_ps(weight, by), words + i * TILE, values.most) * values.step;
          shift[r + i] += _mm512_reduce_add_ps(_mm512_mul_ps(weight, plus));
        }
        gather_words(some, reinterpret_cast<const int32_t*>(words), step, short_room.data(),
                     chunks / 2, int(width), out + r * width);
      }
      add_apart(a, batch, head, first, count, short_room.data(), values.step, scale, offset, rows,
                scores, padded, fix);
      continue;
    }
    values.read(slot, count, tile, scale, offset);
    if (!whole) {
      for (int t = 0; t < count; t++)
        for (int c = 0; c < chunks; c++) {
          float* x = tile + t * width + 16 * c;
          _mm512_storeu_ps(x, _mm512_fmadd_ps(_mm512_loadu_ps(x), _mm512_set1_ps(scale[t]),
                                              _mm512_set1_ps(offset[t])));
        }
      put_apart(a, a.value_apart, batch, head, first, count, tile);
    }
    for (int64_t r = 0; r < rows; r += BLOCK) {
      const int some = rows - r < BLOCK ? int(rows - r) : BLOCK;
      for (int i = 0; i < some; i++)
        _mm512_store_ps(weights + i * TILE, _mm512_loadu_ps(scores + (r + i) * padded + first));
      gather(some, weights, tile, chunks, count, out + r * width);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    const int64_t to = ((batch * a.queries + r % a.queries) * a.heads + head * per + r / a.queries);
    for (int c = 0; c < chunks; c++) {
      const __m512 more =
          _mm512_add_ps(_mm512_loadu_ps(fix + r * width + 16 * c), _mm512_set1_ps(shift[r]));
      const __m512 x = _mm512_add_ps(_mm512_loadu_ps(out + r * width + 16 * c), more);
      const int64_t place = to * width + 16 * c;
      if (a.type == BF16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.out + 2 * place),
                            (__m256i)_mm512_cvtneps_pbh(x));
      else
        _mm512_storeu_ps(a.out + 4 * place, x);
    }
  }
}

}  // namespace

extern "C" void compresskit_bare_attention(const BareAttention* call) {
  const BareAttention& a = *call;
  Turns turns;
  turns.prepare(a.frequencies, a.turning, a.first);
  const int64_t tasks = a.batch * a.key_heads;
  // A barrier costs more than a short cache: below this many numbers one thread does it all.
#pragma omp parallel for schedule(static) if (tasks * a.keys.coded * a.width > (1 << 20))
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t batch = task / a.key_heads, head = task % a.key_heads;
    if (a.width == 64)
      attend<4>(a, turns, batch, head);
    else if (a.width == 128)
      attend<8>(a, turns, batch, head);
    else
      attend<0>(a, turns, batch, head);
  }
}
