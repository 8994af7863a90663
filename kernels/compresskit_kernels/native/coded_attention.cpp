// Attention of a few new tokens over a quantised cache, for x86 CPUs with AVX-512 VBMI.
//
// Per sequence and key/value head, over tiles of 16 tokens, for all its queries at once:
//
//   keys   ──levels──► tile [16, D] float32 ──► scores[r][s] = q[r] . tile[s]
//   softmax over s in float32
//   values ──levels──► tile [16, D] float32 ──► out[r] += sum_s weights[r][s] * tile[s]
//
// so every code is read once and decoded once, whatever the number of queries. A scale of a whole
// row is not multiplied into the tile: it multiplies a score, or joins a weight. Planes of bits are
// spread by byte permutations; see kv_decode/planes.py for their layout.
//
// For bfloat16 queries, whole-number codes stay whole numbers: they are multiplied, as 16-bit words,
// with queries and weights rounded to 16 bits of their largest (relative 2^-16, where the result is
// rounded by 2^-9), and sums are exact. That is a third of the work.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

// Every field has 8 bytes: the caller packs them without padding.
extern "C" struct CodedSide {
  const char *codes, *scales, *offsets, *tail;  // offsets, tail and table may be null
  const float* table;                           // 16 levels, or null: the codes themselves
  int64_t codes_batch, codes_head, codes_row;   // strides in bytes
  int64_t scales_batch, scales_head, scales_row;
  int64_t tail_batch, tail_head, tail_row;
  int64_t coded, span, groups, kind, scale_type, tail_type;
};

extern "C" struct CodedAttention {
  const char* query;    // [B, H, Q, D], rows dense
  char* out;            // [B, Q, H, D], dense, in the type of the query
  const uint8_t* mask;  // [B, S] or null
  const int64_t* lengths;  // [B] or null
  int64_t batch, heads, key_heads, queries, width, slots;
  int64_t query_batch, query_head, query_row;  // strides in bytes
  int64_t type;
  double scale;
  CodedSide keys, values;
};

namespace {

enum Type : int64_t { F32 = 0, BF16 = 1, F16 = 2 };
enum Kind : int64_t { INT8 = 0, FP8 = 1, INT4 = 2, INT3 = 3, INT2 = 4 };
constexpr int TILE = 16;         // tokens decoded at a time
constexpr int MOST_CHUNKS = 16;  // of 16 numbers: D up to 256; loops over them are unrolled for
                                 // D 64 and 128 (template parameter CHUNKS; 0: any)
constexpr int BLOCK = 4;         // queries, and chunks of the output, held in registers

float widened(const char* p, int64_t type) {
  if (type == F32) return *reinterpret_cast<const float*>(p);
  const uint16_t bits = *reinterpret_cast<const uint16_t*>(p);
  if (type == F16) return _cvtsh_ss(bits);
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

INLINE __m512 widened16(const char* p, int64_t type) {
  if (type == F32) return _mm512_loadu_ps(p);
  if (type == BF16) return widen(p);
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Where the codes of 16 numbers lie in a plane of bits: byte numbers (in every fourth byte) and shifts.
struct Spread {
  __m512i bytes[MOST_CHUNKS], shifts[MOST_CHUNKS];
  __mmask64 plane;
  void prepare(int64_t width, int bits) {
    const int64_t size = width * bits / 8;
    plane = size >= 64 ? ~0ull : (1ull << size) - 1;
    for (int64_t c = 0; c < width / 16; c++) {
      alignas(64) int32_t from[16], by[16];
      for (int lane = 0; lane < 16; lane++) {
        from[lane] = int32_t((16 * c + lane) % size);
        by[lane] = int32_t((16 * c + lane) / size) * bits;
      }
      bytes[c] = _mm512_load_si512(from);
      shifts[c] = _mm512_load_si512(by);
    }
  }
  INLINE __m512i codes(__m512i loaded, int c, int most) const {
    const __m512i byte = _mm512_maskz_permutexvar_epi8(0x1111111111111111ull, bytes[c], loaded);
    return _mm512_and_si512(_mm512_srlv_epi32(byte, shifts[c]), _mm512_set1_epi32(most));
  }
};

// The same for 32 words of 16 bits.
struct WordSpread {
  __m512i bytes[MOST_CHUNKS / 2], shifts[MOST_CHUNKS / 2];
  __mmask64 plane;
  void prepare(int64_t width, int bits) {
    const int64_t size = width * bits / 8;
    plane = size >= 64 ? ~0ull : (1ull << size) - 1;
    for (int64_t c = 0; c < width / 32; c++) {
      alignas(64) int16_t from[32], by[32];
      for (int lane = 0; lane < 32; lane++) {
        from[lane] = int16_t((32 * c + lane) % size);
        by[lane] = int16_t((32 * c + lane) / size) * bits;
      }
      bytes[c] = _mm512_load_si512(from);
      shifts[c] = _mm512_load_si512(by);
    }
  }
  INLINE __m512i codes(__m512i loaded, int c, int most) const {
    const __m512i byte = _mm512_maskz_permutexvar_epi8(0x5555555555555555ull, bytes[c], loaded);
    return _mm512_and_si512(_mm512_srlv_epi16(byte, shifts[c]), _mm512_set1_epi16(most));
  }
};

// `count` numbers that lie side by side, at most MOST, in float32.
INLINE void widen_all(const char* from, int64_t type, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = count - i;
    const __mmask16 real = left >= 16 ? 0xffff : __mmask16((1u << left) - 1);
    if (type == F32) {
      _mm512_storeu_ps(to + i, _mm512_maskz_loadu_ps(real, from + 4 * i));
      continue;
    }
    const __m256i half = _mm256_maskz_loadu_epi16(real, from + 2 * i);
    const __m512 wide =
        type == F16 ? _mm512_cvtph_ps(half)
                    : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    _mm512_storeu_ps(to + i, wide);
  }
}

// Round `count` numbers to 16 bits of their largest; return the step.
INLINE float to_words(const __m512* x, int chunks, int16_t* to) {
  __m512 most = _mm512_set1_ps(1e-30f);
  for (int c = 0; c < chunks; c++) most = _mm512_max_ps(most, _mm512_abs_ps(x[c]));
  const float step = _mm512_reduce_max_ps(most) / 32767;
  const __m512 by = _mm512_set1_ps(1 / step);
  for (int c = 0; c < chunks; c++)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * c),
                        _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(x[c], by))));
  return step;
}

// One side of one key/value head.
template <int CHUNKS>
struct Reader {
  const CodedSide& side;
  const char *codes, *scales, *offsets, *tail;
  const int some;
  INLINE int chunks() const { return CHUNKS ? CHUNKS : some; }
  bool folded;  // scales and offsets are left to the scores and weights
  bool whole;   // the codes are whole numbers, and half a row is made of runs of 32
  Spread low, high;
  WordSpread low_words, high_words;
  __m512 table;

  Reader(const CodedSide& s, int64_t batch, int64_t head, int64_t width)
      : side(s),
        codes(s.codes + batch * s.codes_batch + head * s.codes_head),
        scales(s.scales + batch * s.scales_batch + head * s.scales_head),
        offsets(s.offsets ? s.offsets + batch * s.scales_batch + head * s.scales_head : nullptr),
        tail(s.tail ? s.tail + batch * s.tail_batch + head * s.tail_head : nullptr),
        some(int(width / 16)),
        folded(s.span == 1 && s.groups == 1),
        whole(s.kind != FP8 && !s.table && width % 64 == 0) {
    if (whole && (s.kind == INT2 || s.kind == INT3)) low_words.prepare(width, 2);
    if (whole && s.kind == INT3) high_words.prepare(width, 1);
    if (s.kind == INT2 || s.kind == INT3) low.prepare(width, 2);
    if (s.kind == INT3) high.prepare(width, 1);
    table = s.table ? _mm512_loadu_ps(s.table) : _mm512_setzero_ps();
  }

  // The levels of the codes of one row, 16 numbers at a time, each given to `take(chunk, levels)`.
  template <int KIND, bool TABLE, class Take>
  INLINE void levels(int64_t at, Take take) const {
    const char* row = codes + at * side.codes_row;
    const int half = chunks() / 2;
    __m512i below = _mm512_setzero_si512(), above = below;
    if constexpr (KIND == INT2 || KIND == INT3) below = _mm512_maskz_loadu_epi8(low.plane, row);
    if constexpr (KIND == INT3) above = _mm512_maskz_loadu_epi8(high.plane, row + chunks() * 4);
    for (int c = 0; c < chunks(); c++) {
      if constexpr (KIND == FP8) {
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(row + 16 * c)));
        // As float16, whose exponent has a bias that is larger by 8: the scale gets the 256.
        const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
        const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
        take(c, _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256)));
        continue;
      }
      __m512i code;
      if constexpr (KIND == INT8) {
        code = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(row + 16 * c)));
      } else if constexpr (KIND == INT4) {
        const int byte = c < half ? c : c - half;
        code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(row + 16 * byte)));
        code = c < half ? _mm512_and_si512(code, _mm512_set1_epi32(15)) : _mm512_srli_epi32(code, 4);
      } else {
        code = low.codes(below, c, 3);
        if constexpr (KIND == INT3)
          code = _mm512_or_si512(code, _mm512_slli_epi32(high.codes(above, c, 1), 2));
      }
      take(c, TABLE ? _mm512_permutexvar_ps(code, table) : _mm512_cvtepi32_ps(code));
    }
  }

  template <int KIND, bool TABLE>
  void decode(int64_t first, int count, float* tile) const {
    const int width = 16 * chunks();
    if (folded) {
      for (int t = 0; t < count; t++)
        levels<KIND, TABLE>(first + t, [&](int c, __m512 level) __attribute__((always_inline)) {
          _mm512_storeu_ps(tile + t * width + 16 * c, level);
        });
      return;
    }
    if (side.span > 1) {
      __m512 scale[MOST_CHUNKS], offset[MOST_CHUNKS];
      const int size = side.scale_type == F32 ? 4 : 2;
      const int64_t at = first / side.span * side.scales_row;  // a tile lies within one span
      for (int c = 0; c < chunks(); c++) {
        scale[c] = widened16(scales + at + 16 * c * size, side.scale_type);
        offset[c] = offsets ? widened16(offsets + at + 16 * c * size, side.scale_type)
                            : _mm512_setzero_ps();
      }
      for (int t = 0; t < count; t++)
        levels<KIND, TABLE>(first + t, [&](int c, __m512 level) __attribute__((always_inline)) {
          _mm512_storeu_ps(tile + t * width + 16 * c, _mm512_fmadd_ps(level, scale[c], offset[c]));
        });
      return;
    }
    alignas(64) float scale[TILE * MOST_CHUNKS], offset[TILE * MOST_CHUNKS];
    const int groups = int(side.groups), per = chunks() / groups;
    grid(scales, first, count, scale);
    if (offsets)
      grid(offsets, first, count, offset);
    else
      memset(offset, 0, sizeof offset);
    for (int t = 0; t < count; t++)
      levels<KIND, TABLE>(first + t, [&](int c, __m512 level) __attribute__((always_inline)) {
        const int at = t * groups + c / per;
        const __m512 x =
            _mm512_fmadd_ps(level, _mm512_set1_ps(scale[at]), _mm512_set1_ps(offset[at]));
        _mm512_storeu_ps(tile + t * width + 16 * c, x);
      });
  }

  // Scales or offsets of `count` rows, [count, groups] in float32.
  INLINE void grid(const char* from, int64_t first, int count, float* to) const {
    const int64_t size = side.scale_type == F32 ? 4 : 2, groups = side.groups;
    from += first * side.scales_row;
    if (side.scales_row == groups * size)
      return widen_all(from, side.scale_type, count * groups, to);
    for (int t = 0; t < count; t++)
      for (int64_t g = 0; g < groups; g++)
        to[t * groups + g] = widened(from + t * side.scales_row + g * size, side.scale_type);
  }

  template <int KIND>
  void decode(int64_t first, int count, float* tile) const {
    side.table ? decode<KIND, true>(first, count, tile) : decode<KIND, false>(first, count, tile);
  }

  // Scales and offsets of coded rows, [TILE, groups]; without offsets zeros.
  INLINE void read_grid(int64_t first, int count, float* scale, float* offset) const {
    grid(scales, first, count, scale);
    if (offsets)
      grid(offsets, first, count, offset);
    else
      memset(offset, 0, sizeof(float) * TILE * side.groups);
  }

  // A query with the scales of one span on it, in words; returns what the offsets add to its score.
  float scale_query(int64_t first, const float* query, int16_t* to, float* step) const {
    const int64_t size = side.scale_type == F32 ? 4 : 2, at = first / side.span * side.scales_row;
    __m512 x[MOST_CHUNKS], plus = _mm512_setzero_ps();
    for (int c = 0; c < chunks(); c++) {
      const __m512 q = _mm512_loadu_ps(query + 16 * c);
      x[c] = _mm512_mul_ps(q, widened16(scales + at + 16 * c * size, side.scale_type));
      if (offsets)
        plus = _mm512_fmadd_ps(q, widened16(offsets + at + 16 * c * size, side.scale_type), plus);
    }
    *step = to_words(x, chunks(), to);
    return _mm512_reduce_add_ps(plus);
  }

  // The codes of coded rows as words, [TILE, D], zeros behind `count`.
  template <int KIND>
  INLINE void words(int64_t first, int count, int16_t* tile) const {
    const int width = 16 * chunks(), pairs = chunks() / 2;
    for (int t = 0; t < count; t++) {
      const char* row = codes + (first + t) * side.codes_row;
      __m512i below = _mm512_setzero_si512(), above = below;
      if constexpr (KIND == INT2 || KIND == INT3)
        below = _mm512_maskz_loadu_epi8(low_words.plane, row);
      if constexpr (KIND == INT3)
        above = _mm512_maskz_loadu_epi8(high_words.plane, row + chunks() * 4);
      for (int c = 0; c < pairs; c++) {
        __m512i code;
        if constexpr (KIND == INT8) {
          code = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(row + 32 * c)));
        } else if constexpr (KIND == INT4) {
          const int byte = c < pairs / 2 ? c : c - pairs / 2;
          code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(row + 32 * byte)));
          code = c < pairs / 2 ? _mm512_and_si512(code, _mm512_set1_epi16(15))
                               : _mm512_srli_epi16(code, 4);
        } else {
          code = low_words.codes(below, c, 3);
          if constexpr (KIND == INT3)
            code = _mm512_or_si512(code, _mm512_slli_epi16(high_words.codes(above, c, 1), 2));
        }
        _mm512_storeu_si512(tile + t * width + 32 * c, code);
      }
    }
    if (count < TILE) memset(tile + count * width, 0, sizeof(int16_t) * (TILE - count) * width);
  }

  void read_words(int64_t first, int count, int16_t* tile) const {
    switch (side.kind) {
      case INT8: return words<INT8>(first, count, tile);
      case INT4: return words<INT4>(first, count, tile);
      case INT3: return words<INT3>(first, count, tile);
      default: return words<INT2>(first, count, tile);
    }
  }

  // Rows first to first + count of the cache: `tile` [TILE, D], and what multiplies and is added to
  // a whole row of it.
  void read(int64_t first, int count, float* tile, float* scale, float* offset) const {
    const int64_t left = side.coded - first;
    const int coded = left <= 0 ? 0 : left < count ? int(left) : count;
    const int width = 16 * chunks();
    for (int t = 0; t < TILE; t++) scale[t] = 1, offset[t] = 0;
    if (coded) {
      switch (side.kind) {
        case INT8: decode<INT8, false>(first, coded, tile); break;
        case FP8: decode<FP8, false>(first, coded, tile); break;
        case INT4: decode<INT4>(first, coded, tile); break;
        case INT3: decode<INT3>(first, coded, tile); break;
        default: decode<INT2>(first, coded, tile);
      }
      if (folded) {
        grid(scales, first, coded, scale);
        if (offsets) grid(offsets, first, coded, offset);
      }
    }
    for (int t = coded; t < TILE; t++) scale[t] = 1, offset[t] = 0;
    const int size = side.tail_type == F32 ? 4 : 2;
    for (int t = coded; t < count; t++) {
      const char* row = tail + (first + t - side.coded) * side.tail_row;
      for (int c = 0; c < chunks(); c++)
        _mm512_storeu_ps(tile + t * width + 16 * c,
                         widened16(row + 16 * c * size, side.tail_type));
    }
    if (count < TILE) memset(tile + count * width, 0, sizeof(float) * (TILE - count) * width);
  }
};

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

// Products of one query with 16 rows, both in words: |sum| < 2^15 * 2^7 * 256 fits 32 bits.
template <int CHUNKS>
INLINE __m512 word_scores(const int16_t* query, const int16_t* tile, int some) {
  const int pairs = (CHUNKS ? CHUNKS : some) / 2, width = 32 * pairs;
  __m512i sum[TILE];
  for (int t = 0; t < TILE; t++) sum[t] = _mm512_setzero_si512();
  for (int c = 0; c < pairs; c++) {
    const __m512i q = _mm512_loadu_si512(query + 32 * c);
    for (int t = 0; t < TILE; t++)
      sum[t] = _mm512_dpwssd_epi32(sum[t], q, _mm512_loadu_si512(tile + t * width + 32 * c));
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

template <int CHUNKS>
void attend(const CodedAttention& a, int64_t batch, int64_t head) {
  const int64_t per = a.heads / a.key_heads, rows = per * a.queries, width = a.width;
  const int chunks = int(width / 16);
  int64_t length = a.lengths ? a.lengths[batch] : a.slots;
  if (length > a.slots) length = a.slots;
  const int64_t padded = (length + TILE - 1) / TILE * TILE;
  const uint8_t* mask = a.mask ? a.mask + batch * a.slots : nullptr;
  const Reader<CHUNKS> keys(a.keys, batch, head, width), values(a.values, batch, head, width);

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
    __m512 sum = _mm512_setzero_ps();
    for (int c = 0; c < chunks; c++) {
      const __m512 x = _mm512_mul_ps(widened16(from + 16 * c * (a.type == F32 ? 4 : 2), a.type),
                                     _mm512_set1_ps(float(a.scale)));
      _mm512_storeu_ps(query + r * width + 16 * c, x);
      sum = _mm512_add_ps(sum, x);
    }
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
      steps[r] = to_words(x, chunks, word_query + r * width);
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
        score = _mm512_mul_ps(word_scores<CHUNKS>(word_query + r * width, word_tile, chunks),
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
            step[i] = to_words(&x, 1, words + i * TILE);
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
    for (int c = 0; c < chunks; c++) {
      const __m512 x =
          _mm512_add_ps(_mm512_loadu_ps(out + r * width + 16 * c),
                        _mm512_set1_ps(shift[r * shifts + c * shifts / chunks]));
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
