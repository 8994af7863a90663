// Attention of one new token over a dense cache, for x86 CPUs with AVX-512 BF16.
//
// For each key/value head, the query heads of its group are handled together, so that every key and
// value is read once:
//
//   scores[g][s] = q[g] . k[s]      products of bfloat16 are exact in float32, sums are float32
//   weights      = softmax over s   in float32, like the sum
//   out[g]       = sum_s weights[g][s] * v[s]
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

enum Type : int32_t { F32 = 0, BF16 = 1 };
constexpr int64_t WIDE = 64;   // columns of the output kept in registers
constexpr int HEADS = 4;       // query heads handled together

struct Heads {
  const char *query, *key, *value;  // of this batch row and key/value head
  int64_t step, width;              // bytes from one query head to the next; D
  int64_t key_step, value_step;     // bytes from one token to the next
  int64_t length;
  float scale;
};

template <int TYPE>
INLINE float product(const char* query, const char* key, int64_t width) {
  __m512 sum = _mm512_setzero_ps();
  if constexpr (TYPE == BF16) {
    for (int64_t d = 0; d < width; d += 32)
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(query + 2 * d),
                             (__m512bh)_mm512_loadu_si512(key + 2 * d));
  } else {
    for (int64_t d = 0; d < width; d += 16)
      sum = _mm512_fmadd_ps(_mm512_loadu_ps(query + 4 * d), _mm512_loadu_ps(key + 4 * d), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

void soften(float* scores, int64_t length, float scale) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  const int64_t padded = (length + 15) / 16 * 16;
  for (int64_t s = length; s < padded; s++) scores[s] = -INFINITY;
  for (int64_t s = 0; s < padded; s += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + s));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most)), by = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < padded; s += 16) {
    const __m512 gap = _mm512_sub_ps(_mm512_loadu_ps(scores + s), top);
    const __m512 weight = exponential(_mm512_mul_ps(gap, by));
    const int64_t left = length - s;
    const __m512 kept = _mm512_maskz_mov_ps(left >= 16 ? 0xffff : (1 << left) - 1, weight);
    _mm512_storeu_ps(scores + s, kept);
    sum = _mm512_add_ps(sum, kept);
  }
  const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
  for (int64_t s = 0; s < padded; s += 16)
    _mm512_storeu_ps(scores + s, _mm512_mul_ps(_mm512_loadu_ps(scores + s), share));
}

template <int TYPE, int G>
void group(const Heads& h, char* out, int64_t out_step) {
  const int64_t padded = (h.length + 15) / 16 * 16;
  static thread_local std::vector<float> scores;
  scores.resize(G * padded);
  for (int64_t s = 0; s < h.length; s++)
    for (int g = 0; g < G; g++)
      scores[g * padded + s] =
          product<TYPE>(h.query + g * h.step, h.key + s * h.key_step, h.width);
  for (int g = 0; g < G; g++) soften(scores.data() + g * padded, h.length, h.scale);
  for (int64_t d = 0; d < h.width; d += WIDE) {
    const int64_t blocks = (h.width - d < WIDE ? h.width - d : WIDE) / 16;
    __m512 sum[G][4];
    for (int g = 0; g < G; g++)
      for (int i = 0; i < 4; i++) sum[g][i] = _mm512_setzero_ps();
    for (int64_t s = 0; s < h.length; s++) {
      const char* row = h.value + s * h.value_step;
      for (int i = 0; i < 4; i++) {
        if (i >= blocks) break;
        const int64_t at = d + 16 * i;
        const __m512 value = TYPE == BF16
                                 ? widen(reinterpret_cast<const uint16_t*>(row) + at)
                                 : _mm512_loadu_ps(reinterpret_cast<const float*>(row) + at);
        for (int g = 0; g < G; g++)
          sum[g][i] = _mm512_fmadd_ps(_mm512_set1_ps(scores[g * padded + s]), value, sum[g][i]);
      }
    }
    for (int g = 0; g < G; g++)
      for (int64_t i = 0; i < blocks; i++) {
        char* to = out + g * out_step;
        const int64_t at = d + 16 * i;
        if (TYPE == BF16)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * at),
                              (__m256i)_mm512_cvtneps_pbh(sum[g][i]));
        else
          _mm512_storeu_ps(to + 4 * at, sum[g][i]);
      }
  }
}

template <int TYPE>
void some(const Heads& h, int heads, char* out, int64_t out_step) {
  switch (heads) {
    case 1: return group<TYPE, 1>(h, out, out_step);
    case 2: return group<TYPE, 2>(h, out, out_step);
    case 3: return group<TYPE, 3>(h, out, out_step);
    default: return group<TYPE, 4>(h, out, out_step);
  }
}

}  // namespace

extern "C" struct Attention {
  const char *query, *key, *value;
  char* out;  // [B, H, D], dense
  int64_t batch, heads, key_heads, width, length;
  int64_t query_batch, query_head;                   // strides in bytes
  int64_t key_batch, key_head, key_token;
  int64_t value_batch, value_head, value_token;
  float scale;
  int32_t type;
};

extern "C" void compresskit_attention(const Attention* call) {
  const Attention& a = *call;
  const int64_t size = a.type == BF16 ? 2 : 4;
  const int64_t per = a.heads / a.key_heads, tasks = a.batch * a.key_heads;
  // A barrier costs more than a short cache: below this many numbers one thread does it all.
#pragma omp parallel for schedule(static) if (tasks * a.length * a.width > (1 << 20))
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t b = task / a.key_heads, head = task % a.key_heads;
    for (int64_t first = 0; first < per; first += HEADS) {
      const int64_t q = head * per + first;
      const Heads h{a.query + b * a.query_batch + q * a.query_head,
                    a.key + b * a.key_batch + head * a.key_head,
                    a.value + b * a.value_batch + head * a.value_head,
                    a.query_head, a.width, a.key_token, a.value_token, a.length, a.scale};
      const int heads = per - first < HEADS ? int(per - first) : HEADS;
      char* out = a.out + (b * a.heads + q) * a.width * size;
      if (a.type == BF16)
        some<BF16>(h, heads, out, a.width * size);
      else
        some<F32>(h, heads, out, a.width * size);
    }
  }
}
