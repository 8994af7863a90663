// Quantise new rows of keys or values and put them behind the old ones, in one pass.
//
// The numbers are those of kv_decode/cache.py: `quantise`, bit by bit (division, rounding to even,
// scales rounded to their stored type first).
#include "coding.h"

// Every field has 8 bytes: the caller packs them without padding.
extern "C" struct Encode {
  const char* x;                                    // [B, K, T, D], rows dense
  const char *old_codes, *old_scales, *old_offsets;  // dense [B, K, S, *], S may be 0
  char *codes, *scales, *offsets;                   // dense [B, K, S + T, *]; offsets may be null
  int64_t x_batch, x_head, x_row;                   // strides in bytes
  int64_t batch, heads, old, tokens, width, group, type, kind, scale_type;
  double smallest, largest;  // of the scales' type
  // With a table of levels, rising: rows are turned first, their scale is |x| / sqrt(D).
  const float *turn, *table;  // [D, D], dense, and 2^bits levels; both or none
};

namespace {

// Bytes of the nearest e4m3 numbers, halves to even, |x| at most 448.
INLINE __m128i e4m3(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(size, 20), _mm512_set1_epi32(1));
  __m512i code = _mm512_add_epi32(_mm512_add_epi32(size, _mm512_set1_epi32(0x7ffff)), odd);
  code = _mm512_sub_epi32(_mm512_srli_epi32(code, 20), _mm512_set1_epi32(120 << 3));
  // Below 2^-6 all numbers are multiples of 2^-9, the last place of a float32 next to 2^14.
  const __m512 next = _mm512_add_ps(_mm512_castsi512_ps(size), _mm512_set1_ps(16384.0f));
  const __m512i small = _mm512_sub_epi32(_mm512_castps_si512(next), _mm512_set1_epi32(0x46800000));
  const __mmask16 below = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(0x3c800000));
  code = _mm512_mask_mov_epi32(_mm512_min_epi32(code, _mm512_set1_epi32(0x7e)), below, small);
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
  return _mm512_cvtepi32_epi8(_mm512_or_si512(code, sign));
}

// Codes of one group, one byte each.
void quantise(const Encode& e, const float* x, uint8_t* codes, char* scale_to, char* offset_to) {
  __m512 low = _mm512_set1_ps(INFINITY), high = _mm512_set1_ps(-INFINITY);
  for (int64_t d = 0; d < e.group; d += 16) {
    __m512 part = _mm512_loadu_ps(x + d);
    if (e.kind <= FP8) part = _mm512_abs_ps(part);
    low = _mm512_min_ps(low, part), high = _mm512_max_ps(high, part);
  }
  const float least = _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high);
  const float top = e.kind == INT8 ? 127 : e.kind == FP8 ? 448 : e.kind == INT4 ? 15
                    : e.kind == INT3 ? 7 : 3;
  float scale = (e.kind <= FP8 ? most : most - least) / top;
  scale = fminf(fmaxf(scale, float(e.smallest)), float(e.largest));
  const __m512 by = _mm512_set1_ps(put(scale_to, scale, e.scale_type));
  __m512 from = _mm512_setzero_ps();
  if (offset_to) {
    const float offset = fminf(fmaxf(least, -float(e.largest)), float(e.largest));
    from = _mm512_set1_ps(put(offset_to, offset, e.scale_type));
  }
  const __m512 first = _mm512_set1_ps(e.kind <= FP8 ? -top : 0), last = _mm512_set1_ps(top);
  for (int64_t d = 0; d < e.group; d += 16) {
    __m512 step = _mm512_loadu_ps(x + d);
    if (offset_to) step = _mm512_sub_ps(step, from);
    step = _mm512_div_ps(step, by);
    if (e.kind == FP8) {
      step = _mm512_min_ps(_mm512_max_ps(step, first), last);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + d), e4m3(step));
      continue;
    }
    step = _mm512_roundscale_ps(step, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    step = _mm512_min_ps(_mm512_max_ps(step, first), last);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + d),
                     _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(step)));
  }
}

// Turn a row: x [D] times `turn` [D, D].
void turned(const Encode& e, float* x) {
  float y[MOST];
  for (int64_t d = 0; d < e.width; d += 16) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < e.width; i++)
      sum = _mm512_fmadd_ps(_mm512_set1_ps(x[i]), _mm512_loadu_ps(e.turn + i * e.width + d), sum);
    _mm512_storeu_ps(y + d, sum);
  }
  memcpy(x, y, e.width * sizeof(float));
}

// Codes of one turned row by the table, one byte each.
void by_levels(const Encode& e, const Bounds& bounds, const float* x, uint8_t* codes,
               char* scale_to) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t d = 0; d < e.width; d += 16) {
    const __m512 part = _mm512_loadu_ps(x + d);
    squares = _mm512_fmadd_ps(part, part, squares);
  }
  const float length = fmaxf(sqrtf(_mm512_reduce_add_ps(squares)), 0x1p-126f);
  const float scale = length / sqrtf(float(e.width));
  put(scale_to, fminf(scale, float(e.largest)), e.scale_type);
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t d = 0; d < e.width; d += 16) {
    const __m512 step = _mm512_div_ps(_mm512_loadu_ps(x + d), by);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + d), bounds.codes(step));
  }
}

}  // namespace

extern "C" void compresskit_encode(const Encode* call) {
  const Encode& e = *call;
  const int64_t bits = e.kind <= FP8 ? 8 : e.kind == INT4 ? 4 : e.kind == INT3 ? 3 : 2;
  const int64_t row = e.width * bits / 8, groups = e.width / e.group;
  const int64_t size = e.scale_type == F32 ? 4 : 2, grid = groups * size, all = e.old + e.tokens;
  const Bounds bounds(e.table, bits);
  for (int64_t pair = 0; pair < e.batch * e.heads; pair++) {
    char* codes = e.codes + pair * all * row;
    char* scales = e.scales + pair * all * grid;
    char* offsets = e.offsets ? e.offsets + pair * all * grid : nullptr;
    if (e.old) {
      memcpy(codes, e.old_codes + pair * e.old * row, e.old * row);
      memcpy(scales, e.old_scales + pair * e.old * grid, e.old * grid);
      if (offsets) memcpy(offsets, e.old_offsets + pair * e.old * grid, e.old * grid);
    }
    for (int64_t t = 0; t < e.tokens; t++) {
      const char* from =
          e.x + pair / e.heads * e.x_batch + pair % e.heads * e.x_head + t * e.x_row;
      const int64_t at = e.old + t;
      float x[MOST];
      uint8_t found[MOST];
      for (int64_t d = 0; d < e.width; d += 16)
        _mm512_storeu_ps(x + d, widened16(from + d * (e.type == F32 ? 4 : 2), e.type));
      if (e.table) {
        turned(e, x);
        by_levels(e, bounds, x, found, scales + at * grid);
        pack(found, e.width, e.kind, codes + at * row);
        continue;
      }
      for (int64_t g = 0; g < groups; g++)
        quantise(e, x + g * e.group, found + g * e.group, scales + at * grid + g * size,
                 offsets ? offsets + at * grid + g * size : nullptr);
      pack(found, e.width, e.kind, codes + at * row);
    }
  }
}
