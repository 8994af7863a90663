// Bare keys: the tensors of kv_bare/rows.py, and rotary positions as pairs of cosines and sines.
#pragma once
#include "codes.h"

// Numbers of each row that are kept as they are, and where; every field has 8 bytes.
extern "C" struct Apart {
  const char* numbers;      // [B, K, C, apart] in the type of the model
  const uint8_t* places;    // the same shape; rows of both lie one after the other
  int64_t numbers_batch, numbers_head, places_batch, places_head;  // strides in bytes
};

namespace {

// Angles of one position, in double: they are found by adding angles, and errors would add up.
struct Angles {
  double cos[MOST / 2], sin[MOST / 2];
  void at(const float* frequencies, int64_t count, double position) {
    for (int64_t j = 0; j < count; j++) {
      const double angle = position * frequencies[j];
      cos[j] = ::cos(angle), sin[j] = ::sin(angle);
    }
  }
  INLINE void add(const Angles& by, int64_t count) {
    for (int64_t j = 0; j < count; j += 8) {
      const __m512d c = _mm512_loadu_pd(cos + j), s = _mm512_loadu_pd(sin + j);
      const __m512d x = _mm512_loadu_pd(by.cos + j), y = _mm512_loadu_pd(by.sin + j);
      _mm512_storeu_pd(cos + j, _mm512_fmsub_pd(c, x, _mm512_mul_pd(s, y)));
      _mm512_storeu_pd(sin + j, _mm512_fmadd_pd(s, x, _mm512_mul_pd(c, y)));
    }
  }
  INLINE void single(int64_t count, float* to_cos, float* to_sin) const {
    for (int64_t j = 0; j < count; j += 8) {
      _mm256_storeu_ps(to_cos + j, _mm512_cvtpd_ps(_mm512_loadu_pd(cos + j)));
      _mm256_storeu_ps(to_sin + j, _mm512_cvtpd_ps(_mm512_loadu_pd(sin + j)));
    }
  }
};

// Turn the pairs (j, j + count) of a row; `to` may be `from`, and what is no pair stays where it is.
INLINE void turn_pairs(const float* from, const float* cos, const float* sin, int64_t count,
                       bool back, float* to) {
  for (int64_t j = 0; j < count; j += 16) {
    const __m512 a = _mm512_loadu_ps(from + j), b = _mm512_loadu_ps(from + j + count);
    const __m512 c = _mm512_loadu_ps(cos + j), s = _mm512_loadu_ps(sin + j);
    const __m512 bs = _mm512_mul_ps(b, s), as = _mm512_mul_ps(a, s);
    _mm512_storeu_ps(to + j, back ? _mm512_fmadd_ps(a, c, bs) : _mm512_fmsub_ps(a, c, bs));
    _mm512_storeu_ps(to + j + count,
                     back ? _mm512_fmsub_ps(b, c, as) : _mm512_fmadd_ps(b, c, as));
  }
}

}  // namespace
