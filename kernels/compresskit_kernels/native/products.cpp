// Products of activations with a packed weight of 2 to 8 bits, for x86 CPUs with AVX-512 VNNI,
// VBMI and BF16. product.py prepares the weights and calls.
//
// Sixteen output rows share a vector: lane n of a register belongs to row n of a tile. A partial
// sum over a group is therefore scaled for sixteen rows at once, and no sum runs across lanes.
//
//   unit    16 rows x 4 inputs, one byte a code                      64 bytes once decoded
//   chunk   8 units: 16 rows x 32 inputs, `bits` vectors in memory   planes of 1, 2 and 4 bits
//   tile    16 rows x K
//
// Rows of activations are handled 8, 4, 2 or 1 at a time (16 were slower). Each goes through the same operations in
// the same order whatever the number, so a row's result does not depend on its neighbours.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace {

enum Kind : int32_t { AFFINE = 0, TABLE = 1, FLOAT8 = 2 };
enum Type : int32_t { F32 = 0, BF16 = 1, F16 = 2 };

extern "C" struct Weight {
  const uint8_t* codes;
  const uint16_t* scales;   // bfloat16 [tiles][groups][16]
  const uint16_t* offsets;  // the same, or null
  const uint8_t* zeros;     // [tiles][groups][16], or null
  const uint16_t* table;    // 32 bfloat16 levels of a code book, or null
  int64_t rows, width, group;
  int32_t bits, kind;
  float gain;
  int32_t group16;  // groups of 16 inputs: two a chunk
};

INLINE __m512 widen(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

struct Shape {
  int64_t padded, groups, tiles, per, segments;  // per: chunks in a group
  explicit Shape(const Weight& w)
      : padded((w.width + 31) / 32 * 32),
        groups((w.width + w.group - 1) / w.group),
        tiles((w.rows + 15) / 16),
        per(w.group >= 32 ? w.group / 32 : 1),
        segments(groups * ((per + 7) / 8)) {}  // of at most 256 inputs
};

// Eight units of a chunk, from planes of 1, 2 and 4 bits, lowest bits first.
template <int BITS>
struct Chunk {
  __m512i unit[8];

  INLINE explicit Chunk(const uint8_t* p) {
    if constexpr (BITS == 8) {
      for (int i = 0; i < 8; i++) unit[i] = _mm512_loadu_si512(p + 64 * i);
      return;
    }
    for (int i = 0; i < 8; i++) unit[i] = _mm512_setzero_si512();
    if constexpr (BITS & 1) plane<1, 0>(p);
    if constexpr (BITS & 2) plane<2, BITS & 1>(p + 64 * (BITS & 1));
    if constexpr (BITS & 4) plane<4, BITS & 3>(p + 64 * (BITS & 3));
  }

  // A vector of a plane holds the fields of 8 / WIDE units.
  template <int WIDE, int SHIFT>
  INLINE void plane(const uint8_t* p) {
    const __m512i mask = _mm512_set1_epi8((1 << WIDE) - 1);
    constexpr int PER = 8 / WIDE;
    for (int v = 0; v < WIDE; v++) {
      const __m512i fields = _mm512_loadu_si512(p + 64 * v);
      for (int i = 0; i < PER; i++) {
        const __m512i code =
            _mm512_and_si512(i ? _mm512_srli_epi16(fields, WIDE * i) : fields, mask);
        __m512i& to = unit[v * PER + i];
        to = SHIFT ? _mm512_or_si512(to, _mm512_slli_epi16(code, SHIFT)) : code;
      }
    }
  }
};

// What is added to scale * sum(code * x) for each unit of sum(x), for sixteen rows.
INLINE __m512 shift_of(const Weight& w, int64_t at, __m512 scale, float middle) {
  if (w.offsets) return _mm512_fnmadd_ps(_mm512_set1_ps(middle), scale, widen(w.offsets + at));
  __m512 zero = _mm512_set1_ps(middle);
  if (w.zeros) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + at));
    zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
  }
  return _mm512_fnmadd_ps(zero, scale, _mm512_setzero_ps());
}

// Activations as the kernels want them, for a block of rows.
struct Inputs {
  const int8_t* codes = nullptr;    // A8: [M][padded]
  const float* steps = nullptr;     // A8: [M][groups]
  const int16_t* wide = nullptr;    // A16: [M][padded]
  const float* wide_steps = nullptr;  // A16: [M][segments]
  const uint16_t* halves = nullptr; // code books, fp8: bfloat16 [M][padded]
  const float* sums = nullptr;      // [M][groups]: sum of x over a group
};

template <int M>
struct Sums {
  __m512 row[M];
};

template <int BITS, int M>
INLINE Sums<M> integer_tile(const Weight& w, const Shape& s, int64_t t, const Inputs& x) {
  const uint8_t* codes = w.codes + t * s.padded / 32 * 64 * BITS;
  Sums<M> total;
  for (int m = 0; m < M; m++) total.row[m] = _mm512_setzero_ps();
  const int64_t chunks = s.padded / 32;
  int64_t c = 0;
  for (int64_t g = 0; g < s.groups; g++) {
    // Two chains of additions where registers allow: one alone waits for its own last one.
    constexpr int CHAINS = M <= 4 ? 2 : 1;
    __m512i sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_si512();
    const int64_t end = c + s.per < chunks ? c + s.per : chunks;
    for (; c < end; c++) {
      const Chunk<BITS> chunk(codes + c * 64 * BITS);
      for (int i = 0; i < 8; i++)
        for (int m = 0; m < M; m++) {
          int32_t four;
          std::memcpy(&four, x.codes + m * s.padded + c * 32 + i * 4, 4);
          __m512i& chain = sum[m][i % CHAINS];
          chain = _mm512_dpbusd_epi32(chain, chunk.unit[i], _mm512_set1_epi32(four));
        }
    }
    const int64_t at = (t * s.groups + g) * 16;
    const __m512 scale = widen(w.scales + at);
    const __m512 shift = shift_of(w, at, scale, float(1 << (BITS - 1)));
    for (int m = 0; m < M; m++) {
      const __m512 step = _mm512_set1_ps(x.steps[m * s.groups + g]);
      const __m512i both = _mm512_add_epi32(sum[m][0], sum[m][1]);
      const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(both), step);
      total.row[m] = _mm512_fmadd_ps(part, scale, total.row[m]);
      total.row[m] =
          _mm512_fmadd_ps(shift, _mm512_set1_ps(x.sums[m * s.groups + g]), total.row[m]);
    }
  }
  return total;
}

// 16-bit activations as fixed-point numbers, one step every SEGMENT inputs of a row at most: closer
// than bfloat16 where it counts, and multiplied by integer instructions.
constexpr int64_t SEGMENT = 256;  // 256 * 255 * 32767 fits 32 bits

INLINE __m512i front_bytes() {  // bytes 0, 1 of each lane, widened to 16 bits
  return _mm512_broadcast_i32x4(
      _mm_set_epi8(-1, 13, -1, 12, -1, 9, -1, 8, -1, 5, -1, 4, -1, 1, -1, 0));
}

INLINE __m512i back_bytes() {  // bytes 2, 3
  return _mm512_broadcast_i32x4(
      _mm_set_epi8(-1, 15, -1, 14, -1, 11, -1, 10, -1, 7, -1, 6, -1, 3, -1, 2));
}

template <int BITS, int M>
INLINE Sums<M> wide_tile(const Weight& w, const Shape& s, int64_t t, const Inputs& x) {
  const uint8_t* codes = w.codes + t * s.padded / 32 * 64 * BITS;
  const __m512i front = front_bytes(), back = back_bytes();
  Sums<M> total;
  for (int m = 0; m < M; m++) total.row[m] = _mm512_setzero_ps();
  const int64_t chunks = s.padded / 32;
  int64_t c = 0, segment = 0;
  for (int64_t g = 0; g < s.groups; g++) {
    __m512 part[M];
    for (int m = 0; m < M; m++) part[m] = _mm512_setzero_ps();
    const int64_t end = c + s.per < chunks ? c + s.per : chunks;
    while (c < end) {
      constexpr int CHAINS = M <= 4 ? 2 : 1;
      __m512i sum[M][2];
      for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_si512();
      const int64_t stop = c + SEGMENT / 32 < end ? c + SEGMENT / 32 : end;
      for (; c < stop; c++) {
        const Chunk<BITS> chunk(codes + c * 64 * BITS);
        for (int i = 0; i < 8; i++) {
          const __m512i low = _mm512_shuffle_epi8(chunk.unit[i], front);
          const __m512i high = _mm512_shuffle_epi8(chunk.unit[i], back);
          for (int m = 0; m < M; m++) {
            int32_t two, more;
            std::memcpy(&two, x.wide + m * s.padded + c * 32 + i * 4, 4);
            std::memcpy(&more, x.wide + m * s.padded + c * 32 + i * 4 + 2, 4);
            sum[m][0] = _mm512_dpwssd_epi32(sum[m][0], low, _mm512_set1_epi32(two));
            __m512i& other = sum[m][CHAINS - 1];
            other = _mm512_dpwssd_epi32(other, high, _mm512_set1_epi32(more));
          }
        }
      }
      for (int m = 0; m < M; m++) {
        const __m512 step = _mm512_set1_ps(x.wide_steps[m * s.segments + segment]);
        const __m512i both = _mm512_add_epi32(sum[m][0], sum[m][1]);
        part[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), step, part[m]);
      }
      segment++;
    }
    const int64_t at = (t * s.groups + g) * 16;
    const __m512 scale = widen(w.scales + at);
    const __m512 shift = shift_of(w, at, scale, float(1 << (BITS - 1)));
    for (int m = 0; m < M; m++) {
      total.row[m] = _mm512_fmadd_ps(part[m], scale, total.row[m]);
      total.row[m] =
          _mm512_fmadd_ps(shift, _mm512_set1_ps(x.sums[m * s.groups + g]), total.row[m]);
    }
  }
  return total;
}

// A code book: codes of at most 5 bits pick a bfloat16 level from a register.
template <int BITS, int M>
INLINE Sums<M> table_tile(const Weight& w, const Shape& s, int64_t t, const Inputs& x) {
  const uint8_t* codes = w.codes + t * s.padded / 32 * 64 * BITS;
  const __m512i table = _mm512_loadu_si512(w.table);
  const __m512i front = front_bytes(), back = back_bytes();
  Sums<M> total;
  for (int m = 0; m < M; m++) total.row[m] = _mm512_setzero_ps();
  const int64_t chunks = s.padded / 32;
  int64_t c = 0, g = 0;
  int from = 0;  // groups of 16 end in the middle of a chunk
  while (g < s.groups) {
    __m512 sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    const int64_t end = c + s.per < chunks ? c + s.per : chunks;
    for (; c < end; c++) {
      const Chunk<BITS> chunk(codes + c * 64 * BITS);
      const int to = w.group16 ? from + 4 : 8;
      for (int i = from; i < to; i++) {
        const __m512i low =
            _mm512_permutexvar_epi16(_mm512_shuffle_epi8(chunk.unit[i], front), table);
        const __m512i high =
            _mm512_permutexvar_epi16(_mm512_shuffle_epi8(chunk.unit[i], back), table);
        for (int m = 0; m < M; m++) {
          int32_t two, more;
          std::memcpy(&two, x.halves + m * s.padded + c * 32 + i * 4, 4);
          std::memcpy(&more, x.halves + m * s.padded + c * 32 + i * 4 + 2, 4);
          sum[m][0] =
              _mm512_dpbf16_ps(sum[m][0], (__m512bh)low, (__m512bh)_mm512_set1_epi32(two));
          sum[m][1] =
              _mm512_dpbf16_ps(sum[m][1], (__m512bh)high, (__m512bh)_mm512_set1_epi32(more));
        }
      }
      if (w.group16) {
        from = to & 7;
        if (from) break;  // the other half of this chunk is the next group
      }
    }
    const int64_t at = (t * s.groups + g) * 16;
    const __m512 scale = widen(w.scales + at);
    for (int m = 0; m < M; m++) {
      const __m512 both = _mm512_add_ps(sum[m][0], sum[m][1]);
      total.row[m] = _mm512_fmadd_ps(both, scale, total.row[m]);
    }
    g++;
  }
  return total;
}

// The k-th byte of each lane, an e4m3 number, as float32 times 2^-120: sign to bit 31, exponent and
// mantissa to bits 20 to 26. The bias of float32 is 120 higher, and subnormal numbers come out right.
INLINE __m512 single(__m512i unit, int k) {
  const __m512i byte = _mm512_slli_epi32(unit, 24 - 8 * k);
  const __m512i sign = _mm512_and_si512(byte, _mm512_set1_epi32(int32_t(0x80000000u)));
  const __m512i rest =
      _mm512_and_si512(_mm512_srli_epi32(byte, 4), _mm512_set1_epi32(0x07f00000));
  return _mm512_castsi512_ps(_mm512_or_si512(sign, rest));
}

// The two bytes of |number| as bfloat16, which holds every e4m3 number, for all 127 of them.
struct Float8Bytes {
  alignas(64) uint8_t high[128], low[128];
  Float8Bytes() {
    for (int code = 0; code < 128; code++) {
      const int power = code >> 3, rest = code & 7;
      const float value =
          power ? std::ldexp(8.0f + rest, power - 10) : std::ldexp(float(rest), -9);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      high[code] = uint8_t(bits >> 24);
      low[code] = uint8_t(bits >> 16);
    }
  }
};
const Float8Bytes float8_bytes;

template <int M>
INLINE Sums<M> float8_tile(const Weight& w, const Shape& s, int64_t t, const Inputs& x) {
  const uint8_t* codes = w.codes + t * s.padded / 32 * 64 * 8;
  const __m512i high0 = _mm512_load_si512(float8_bytes.high);
  const __m512i high1 = _mm512_load_si512(float8_bytes.high + 64);
  const __m512i low0 = _mm512_load_si512(float8_bytes.low);
  const __m512i low1 = _mm512_load_si512(float8_bytes.low + 64);
  const __m512i sign = _mm512_set1_epi8(int8_t(0x80));
  // Inputs 0 and 1 of four rows, then 2 and 3: what the interleaving below turns into pairs a lane.
  const __m512i order = _mm512_broadcast_i32x4(
      _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0));
  __m512 sum[M][2];
  for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
  for (int64_t c = 0; c < s.padded / 32; c++)
    for (int i = 0; i < 8; i++) {
      const __m512i code =
          _mm512_shuffle_epi8(_mm512_loadu_si512(codes + (c * 8 + i) * 64), order);
      const __m512i top = _mm512_or_si512(_mm512_permutex2var_epi8(high0, code, high1),
                                          _mm512_and_si512(code, sign));
      const __m512i bottom = _mm512_permutex2var_epi8(low0, code, low1);
      const __m512i front = _mm512_unpacklo_epi8(bottom, top);
      const __m512i back = _mm512_unpackhi_epi8(bottom, top);
      for (int m = 0; m < M; m++) {
        int32_t two, more;
        std::memcpy(&two, x.halves + m * s.padded + c * 32 + i * 4, 4);
        std::memcpy(&more, x.halves + m * s.padded + c * 32 + i * 4 + 2, 4);
        sum[m][0] =
            _mm512_dpbf16_ps(sum[m][0], (__m512bh)front, (__m512bh)_mm512_set1_epi32(two));
        sum[m][1] =
            _mm512_dpbf16_ps(sum[m][1], (__m512bh)back, (__m512bh)_mm512_set1_epi32(more));
      }
    }
  const __m512 scale = widen(w.scales + t * 16);
  Sums<M> total;
  for (int m = 0; m < M; m++)
    total.row[m] = _mm512_mul_ps(_mm512_add_ps(sum[m][0], sum[m][1]), scale);
  return total;
}

INLINE void put(void* y, int64_t at, int32_t type, __m512 value, __mmask16 keep) {
  if (type == F32)
    _mm512_mask_storeu_ps(static_cast<float*>(y) + at, keep, value);
  else if (type == BF16)
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, keep,
                             (__m256i)_mm512_cvtneps_pbh(value));
  else
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, keep,
                             _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

template <int BITS, int M>
INLINE void one_tile(const Weight& w, const Shape& s, int64_t t, const Inputs& x, void* y,
                     int64_t row, int32_t type) {
  Sums<M> got;
  if (x.codes) {
    got = integer_tile<BITS, M>(w, s, t, x);
  } else if (x.wide) {
    got = wide_tile<BITS, M>(w, s, t, x);
  } else if constexpr (BITS <= 5) {
    got = table_tile<BITS, M>(w, s, t, x);
  } else if constexpr (BITS == 8) {
    got = float8_tile<M>(w, s, t, x);
  }
  const int64_t left = w.rows - t * 16;
  const __mmask16 keep = left >= 16 ? 0xffff : (1 << left) - 1;
  for (int m = 0; m < M; m++)
    put(y, (row + m) * w.rows + t * 16, type,
        _mm512_mul_ps(got.row[m], _mm512_set1_ps(w.gain)), keep);
}

// A barrier costs microseconds, and far more where cores are shared: products that one thread does in
// less than about 50 us are left to it. Measured on 2 virtual cores, SmolLM2-135M in 4 bits: 18 ms a
// token with every product shared, 9.6 with none.
constexpr int64_t WORTH_SHARING = 1 << 22;  // weights times rows

template <int BITS>
void all_tiles(const Weight& w, const Shape& s, const Inputs& all, int64_t rows, void* y,
               int32_t type) {
#pragma omp parallel for schedule(static) if (s.tiles * 16 * s.padded * rows >= WORTH_SHARING)
  for (int64_t t = 0; t < s.tiles; t++) {
    int64_t row = 0;
    while (row < rows) {
      Inputs x = all;
      if (x.codes) x.codes += row * s.padded;
      if (x.steps) x.steps += row * s.groups;
      if (x.wide) x.wide += row * s.padded, x.wide_steps += row * s.segments;
      if (x.halves) x.halves += row * s.padded;
      if (x.sums) x.sums += row * s.groups;
      const int64_t left = rows - row;
      if (left >= 8) {
        one_tile<BITS, 8>(w, s, t, x, y, row, type);
        row += 8;
      } else if (left >= 4) {
        one_tile<BITS, 4>(w, s, t, x, y, row, type);
        row += 4;
      } else if (left >= 2) {
        one_tile<BITS, 2>(w, s, t, x, y, row, type);
        row += 2;
      } else {
        one_tile<BITS, 1>(w, s, t, x, y, row, type);
        row += 1;
      }
    }
  }
}

float single_of(const void* x, int64_t at, int32_t type) {
  if (type == F32) return static_cast<const float*>(x)[at];
  const uint16_t half = static_cast<const uint16_t*>(x)[at];
  if (type == F16) return _cvtsh_ss(half);
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

INLINE __m512 load16(const void* x, int64_t at, int32_t type) {
  if (type == F32) return _mm512_loadu_ps(static_cast<const float*>(x) + at);
  const uint16_t* p = static_cast<const uint16_t*>(x) + at;
  if (type == BF16) return widen(p);
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// One row of x as float32, filled with zeros up to `padded`.
void unfold(const void* x, int64_t start, int64_t width, int64_t padded, int32_t type, float* to) {
  int64_t k = 0;
  for (; k + 16 <= width; k += 16) _mm512_storeu_ps(to + k, load16(x, start + k, type));
  for (; k < width; k++) to[k] = single_of(x, start + k, type);
  for (; k < padded; k++) to[k] = 0.0f;
}

float largest(const float* x, int64_t count) {
  __m512 most = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 16 <= count; k += 16)
    most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(x + k)));
  float out = _mm512_reduce_max_ps(most);
  for (; k < count; k++) out = std::fmax(out, std::fabs(x[k]));
  return out;
}

// Round a row to int8, one step a group.
void round_row(const float* x, const Weight& w, const Shape& s, int8_t* codes, float* steps,
               float* sums) {
  for (int64_t g = 0; g < s.groups; g++) {
    const int64_t from = g * w.group;
    const int64_t to = from + w.group < s.padded ? from + w.group : s.padded;
    const float step = largest(x + from, to - from) / 127.0f;
    const __m512 divisor = _mm512_set1_ps(step > 0 ? step : 1.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = from; k < to; k += 16) {
      // A division, as in the formula: a product with the reciprocal rounds ties elsewhere.
      const __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(x + k), divisor));
      sum = _mm512_add_epi32(sum, code);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtsepi32_epi8(code));
    }
    steps[g] = step;
    sums[g] = step * float(_mm512_reduce_add_epi32(sum));
  }
}

// Round a row to int16, one step a segment.
void widen_row(const float* x, const Weight& w, const Shape& s, int16_t* codes, float* steps,
               float* sums) {
  int64_t segment = 0;
  for (int64_t g = 0; g < s.groups; g++) {
    const int64_t end = (g + 1) * w.group < s.padded ? (g + 1) * w.group : s.padded;
    float sum = 0.0f;
    for (int64_t from = g * w.group; from < end; from += SEGMENT) {
      const int64_t to = from + SEGMENT < end ? from + SEGMENT : end;
      const float step = largest(x + from, to - from) / 32767.0f;
      const __m512 divisor = _mm512_set1_ps(step > 0 ? step : 1.0f);
      __m512i part = _mm512_setzero_si512();
      for (int64_t k = from; k < to; k += 16) {
        const __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(x + k), divisor));
        part = _mm512_add_epi32(part, code);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + k), _mm512_cvtsepi32_epi16(code));
      }
      steps[segment++] = step;
      sum += step * float(_mm512_reduce_add_epi32(part));
    }
    sums[g] = sum;
  }
}

void narrow_row(const float* x, int64_t padded, uint16_t* to) {
  for (int64_t k = 0; k < padded; k += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k),
                        (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + k)));
}

struct Scratch {
  std::vector<float> row, steps, sums;
  std::vector<int16_t> wide;
  std::vector<uint16_t> halves;
  std::vector<int8_t> codes;
};

}  // namespace

// y [M, N] = x [M, K] (dense rows) times the transposed weight; `integer`: round x to int8 first.
extern "C" void compresskit_product(const Weight* weight, const void* x, void* y, int64_t rows,
                                    int32_t type, int32_t integer) {
  const Weight& w = *weight;
  const Shape s(w);
  static thread_local Scratch scratch;  // grows to the largest input and stays
  const bool halves = w.kind != AFFINE;
  const bool wide = !integer && !halves;
  scratch.row.resize(s.padded);
  scratch.sums.resize(rows * s.groups);
  scratch.steps.resize(rows * s.segments);
  if (integer) scratch.codes.resize(rows * s.padded);
  if (wide) scratch.wide.resize(rows * s.padded);
  if (halves) scratch.halves.resize(rows * s.padded);
  for (int64_t m = 0; m < rows; m++) {
    float* row = scratch.row.data();
    float* sums = scratch.sums.data() + m * s.groups;
    unfold(x, m * w.width, w.width, s.padded, type, row);
    if (integer)
      round_row(row, w, s, scratch.codes.data() + m * s.padded,
                scratch.steps.data() + m * s.groups, sums);
    if (wide)
      widen_row(row, w, s, scratch.wide.data() + m * s.padded,
                scratch.steps.data() + m * s.segments, sums);
    if (halves) narrow_row(row, s.padded, scratch.halves.data() + m * s.padded);
  }
  Inputs in;
  in.sums = scratch.sums.data();
  if (integer) in.codes = scratch.codes.data(), in.steps = scratch.steps.data();
  if (wide) in.wide = scratch.wide.data(), in.wide_steps = scratch.steps.data();
  if (halves) in.halves = scratch.halves.data();
  switch (w.bits) {
    case 2: return all_tiles<2>(w, s, in, rows, y, type);
    case 3: return all_tiles<3>(w, s, in, rows, y, type);
    case 4: return all_tiles<4>(w, s, in, rows, y, type);
    case 5: return all_tiles<5>(w, s, in, rows, y, type);
    case 6: return all_tiles<6>(w, s, in, rows, y, type);
    case 7: return all_tiles<7>(w, s, in, rows, y, type);
    default: return all_tiles<8>(w, s, in, rows, y, type);
  }
}

namespace {

template <int BITS>
void spread_tile(const Weight& w, const Shape& s, int64_t t, uint16_t* to) {
  const uint8_t* codes = w.codes + t * s.padded / 32 * 64 * BITS;
  const int64_t left = w.rows - t * 16 < 16 ? w.rows - t * 16 : 16;
  alignas(64) uint8_t unit[8][16][4];
  float table[32];
  for (int i = 0; i < 32; i++) table[i] = w.table ? single_of(w.table, i, BF16) : 0.0f;
  const float middle = float(1 << (BITS - 1));
  const float gain = w.kind == FLOAT8 ? w.gain * 0x1p120f : w.gain;
  for (int64_t c = 0; c < s.padded / 32; c++) {
    const Chunk<BITS> chunk(codes + c * 64 * BITS);
    for (int i = 0; i < 8; i++) _mm512_store_si512(unit[i], chunk.unit[i]);
    for (int64_t n = 0; n < left; n++) {
      alignas(32) uint8_t line[32];
      for (int i = 0; i < 8; i++) std::memcpy(line + 4 * i, unit[i][n], 4);
      for (int half = 0; half < 2; half++) {
        const int64_t k = c * 32 + half * 16, g = k / w.group;
        if (k >= w.width) break;
        const int64_t at = (t * s.groups + g) * 16 + n;
        const __m128i sixteen = _mm_load_si128(reinterpret_cast<__m128i*>(line + half * 16));
        const __m512i wide = _mm512_cvtepu8_epi32(sixteen);
        __m512 level;
        if (w.kind == FLOAT8) {
          level = single(wide, 0);
        } else if (w.table) {  // at most 5 bits
          level = _mm512_permutex2var_ps(_mm512_loadu_ps(table), wide, _mm512_loadu_ps(table + 16));
        } else {
          level = _mm512_sub_ps(_mm512_cvtepi32_ps(wide), _mm512_set1_ps(middle));
        }
        const float scale = single_of(w.scales, at, BF16);
        float base = 0.0f;
        if (w.offsets) base = single_of(w.offsets, at, BF16);
        if (w.zeros) base = (middle - float(w.zeros[at])) * scale;
        const __m512 value =
            _mm512_fmadd_ps(_mm512_mul_ps(level, _mm512_set1_ps(gain)), _mm512_set1_ps(scale),
                            _mm512_set1_ps(base));
        const int64_t room = w.width - k;
        const __mmask16 keep = room >= 16 ? 0xffff : (1 << room) - 1;
        _mm256_mask_storeu_epi16(to + n * w.width + k, keep, (__m256i)_mm512_cvtneps_pbh(value));
      }
    }
  }
}

}  // namespace

// Tiles `first` to `last` as bfloat16 rows `[.., K]`.
extern "C" void compresskit_spread(const Weight* weight, int64_t first, int64_t last,
                                   uint16_t* out) {
  const Weight& w = *weight;
  const Shape s(w);
#pragma omp parallel for schedule(static)
  for (int64_t t = first; t < last; t++) {
    uint16_t* to = out + (t - first) * 16 * w.width;
    switch (w.bits) {
      case 2: spread_tile<2>(w, s, t, to); break;
      case 3: spread_tile<3>(w, s, t, to); break;
      case 4: spread_tile<4>(w, s, t, to); break;
      case 5: spread_tile<5>(w, s, t, to); break;
      case 6: spread_tile<6>(w, s, t, to); break;
      case 7: spread_tile<7>(w, s, t, to); break;
      default: spread_tile<8>(w, s, t, to);
    }
  }
}

// Plain codes uint8 [rows, width] -> tiles; `out` holds zeros.
extern "C" void compresskit_lay_out(const uint8_t* codes, int64_t rows, int64_t width,
                                    int32_t bits, uint8_t* out) {
  const int64_t padded = (width + 31) / 32 * 32;
  for (int64_t n = 0; n < rows; n++) {
    uint8_t* tile = out + n / 16 * (padded / 32 * 64 * bits);
    for (int64_t k = 0; k < width; k++) {
      const uint8_t code = codes[n * width + k];
      uint8_t* chunk = tile + k / 32 * 64 * bits;
      const int64_t unit = k % 32 / 4, byte = n % 16 * 4 + k % 4;
      if (bits == 8) {
        chunk[unit * 64 + byte] = code;
        continue;
      }
      int taken = 0;
      for (int wide = 1; wide <= 4; wide *= 2) {
        if (!(bits & wide)) continue;
        const int64_t per = 8 / wide;
        const uint8_t field = (code >> taken) & ((1 << wide) - 1);
        chunk[(unit / per) * 64 + byte] |= field << (unit % per * wide);
        chunk += wide * 64;
        taken += wide;
      }
    }
  }
}
