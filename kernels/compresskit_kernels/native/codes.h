// Codes of keys or values to numbers: in float32, or whole numbers as words of 16 bits.
//
// Planes of bits are spread by byte permutations; see kv_decode/planes.py for their layout.
#pragma once
#include "rows.h"

// Every field has 8 bytes: the caller packs them without padding.
extern "C" struct CodedSide {
  const char *codes, *scales, *offsets, *tail;  // offsets, tail and table may be null
  const float* table;                           // 2^bits levels, or null: the codes themselves
  int64_t codes_batch, codes_head, codes_row;   // strides in bytes
  int64_t scales_batch, scales_head, scales_row;
  int64_t tail_batch, tail_head, tail_row;
  int64_t coded, span, groups, kind, scale_type, tail_type;
};

namespace {

constexpr int TILE = 16;  // tokens decoded at a time; loops over the chunks of a row are unrolled for
                          // D 64 and 128 (template parameter CHUNKS; 0: any)

// Codes of a plane of bits, 64 numbers at a time, one byte each: byte j % P of the plane comes to place
// j, and of its bits those from bits * (j / P) on, moved up by `up`.
struct Spread {
  __m512i bytes[MOST / 64], shifts[MOST / 64], bits;
  __mmask64 plane;
  void prepare(int64_t width, int count, int up) {
    const int64_t size = width * count / 8;
    plane = size >= 64 ? ~0ull : (1ull << size) - 1;
    bits = _mm512_set1_epi8(char(((1 << count) - 1) << up));
    int64_t byte = 0, shift = 64 - up;  // divisions would take longer than a short cache
    for (int64_t g = 0; 64 * g < width; g++) {
      alignas(64) uint8_t from[64], by[64];
      for (int lane = 0; lane < 64; lane++) {
        from[lane] = uint8_t(byte);
        // Bits are counted within groups of 8 bytes, and around.
        by[lane] = uint8_t((lane % 8 * 8 + shift) % 64);
        if (++byte == size) byte = 0, shift += count;
      }
      bytes[g] = _mm512_load_si512(from);
      shifts[g] = _mm512_load_si512(by);
    }
  }
  INLINE __m512i codes(__m512i loaded, int g) const {
    const __m512i placed = _mm512_permutexvar_epi8(bytes[g], loaded);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts[g], placed), bits);
  }
};

// 16 of 64 bytes, and 32, as wider numbers; `part` is a constant once loops are unrolled.
INLINE __m512i sixteen(__m512i bytes, int part) {
  switch (part) {
    case 0: return _mm512_cvtepu8_epi32(_mm512_castsi512_si128(bytes));
    case 1: return _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 1));
    case 2: return _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 2));
    default: return _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 3));
  }
}

INLINE __m512i thirty_two(__m512i bytes, int part) {
  return _mm512_cvtepu8_epi16(part ? _mm512_extracti64x4_epi64(bytes, 1)
                                   : _mm512_castsi512_si256(bytes));
}

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

// Products of words are summed in 32 bits. Codes are small enough for any query and any weights; the
// levels of a table are as large as they can be: of 2^31 / 32767 / count where a query meets `count`
// of them before its sum becomes a float (`KEYS` / count), and of 16 bits where weights, which are the
// smaller for it, meet them (`SUM` leaves room for 16 of them that are all rounded up).
constexpr float KEYS = 65530, SUM = 2147000000.0f;

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

// The weights of a tile for rows whose largest level is `level`, as above.
INLINE float to_words(__m512 weights, int16_t* to, float level) {
  const __m512 sizes = _mm512_abs_ps(weights);
  const float largest = _mm512_reduce_max_ps(sizes) / 32767;
  const float step = fmaxf(fmaxf(largest, _mm512_reduce_add_ps(sizes) * (level / SUM)), 1e-34f);
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(to),
      _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(weights, _mm512_set1_ps(1 / step)))));
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
  bool whole;   // codes or levels are read as words, where half a row is made of runs of 32
  float step = 1, most = 255;  // what a word counts, and the largest word
  Spread low, high;
  __m512 table;
  __m512i table_words;

  // `weighted`: rows meet weights, not queries.
  Reader(const CodedSide& s, int64_t batch, int64_t head, int64_t width, bool weighted)
      : side(s),
        codes(s.codes + batch * s.codes_batch + head * s.codes_head),
        scales(s.scales + batch * s.scales_batch + head * s.scales_head),
        offsets(s.offsets ? s.offsets + batch * s.scales_batch + head * s.scales_head : nullptr),
        tail(s.tail ? s.tail + batch * s.tail_batch + head * s.tail_head : nullptr),
        some(int(width / 16)),
        folded(s.span == 1 && s.groups == 1),
        whole(s.kind != FP8 && width % 64 == 0) {
    if (s.kind == INT2 || s.kind == INT3) low.prepare(width, 2, 0);
    if (s.kind == INT3) high.prepare(width, 1, 2);
    if (s.table) {
      const int count = s.kind == INT4 ? 16 : s.kind == INT3 ? 8 : 4;
      table = _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), s.table);
      most = weighted ? 32767 : floorf(KEYS / (width / 16));
      step = fmaxf(_mm512_reduce_max_ps(_mm512_abs_ps(table)), 1e-30f) / most;
      const __m512 scaled = _mm512_mul_ps(table, _mm512_set1_ps(1 / step));
      table_words = _mm512_castsi256_si512(_mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(scaled)));
    }
  }

  // 64 codes of one row of two or three bits, one byte each.
  template <int KIND>
  INLINE __m512i bytes(const char* row, int g) const {
    const __m512i below = low.codes(_mm512_maskz_loadu_epi8(low.plane, row), g);
    if constexpr (KIND == INT2) return below;
    const __m512i above = _mm512_maskz_loadu_epi8(high.plane, row + chunks() * 4);
    return _mm512_or_si512(below, high.codes(above, g));
  }

  // The levels of the codes of one row, 16 numbers at a time, each given to `take(chunk, levels)`.
  template <int KIND, bool TABLE, class Take>
  INLINE void levels(int64_t at, Take take) const {
    const char* row = codes + at * side.codes_row;
    const int half = chunks() / 2;
    __m512i spread = _mm512_setzero_si512();
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
        if (c % 4 == 0) spread = bytes<KIND>(row, c / 4);
        code = sixteen(spread, c % 4);
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
  float scale_query(int64_t first, const float* query, int16_t* to,
                    float* query_step) const {
    const int64_t size = side.scale_type == F32 ? 4 : 2, at = first / side.span * side.scales_row;
    __m512 x[MOST_CHUNKS], plus = _mm512_setzero_ps();
    for (int c = 0; c < chunks(); c++) {
      const __m512 q = _mm512_loadu_ps(query + 16 * c);
      x[c] = _mm512_mul_ps(q, widened16(scales + at + 16 * c * size, side.scale_type));
      if (offsets)
        plus = _mm512_fmadd_ps(q, widened16(offsets + at + 16 * c * size, side.scale_type), plus);
    }
    *query_step = to_words(x, chunks(), to) * step;
    return _mm512_reduce_add_ps(plus);
  }

  // The codes of coded rows, or their levels over `step`, as words, [TILE, D], zeros behind `count`.
  template <int KIND, bool TABLE>
  INLINE void words(int64_t first, int count, int16_t* tile) const {
    const int width = 16 * chunks(), pairs = chunks() / 2;
    for (int t = 0; t < count; t++) {
      const char* row = codes + (first + t) * side.codes_row;
      __m512i spread = _mm512_setzero_si512();
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
          if (c % 2 == 0) spread = bytes<KIND>(row, c / 2);
          code = thirty_two(spread, c % 2);
        }
        if constexpr (TABLE) code = _mm512_permutexvar_epi16(code, table_words);
        _mm512_storeu_si512(tile + t * width + 32 * c, code);
      }
    }
    if (count < TILE) memset(tile + count * width, 0, sizeof(int16_t) * (TILE - count) * width);
  }

  template <int KIND>
  void words(int64_t first, int count, int16_t* tile) const {
    side.table ? words<KIND, true>(first, count, tile) : words<KIND, false>(first, count, tile);
  }

  void read_words(int64_t first, int count, int16_t* tile) const {
    switch (side.kind) {
      case INT8: return words<INT8, false>(first, count, tile);
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

}  // namespace
