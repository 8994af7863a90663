// How rows of numbers and of codes are stored; see kv_decode/cache.py.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

enum Type : int64_t { F32 = 0, BF16 = 1, F16 = 2 };
enum Kind : int64_t { INT8 = 0, FP8 = 1, INT4 = 2, INT3 = 3, INT2 = 4 };
constexpr int MOST = 256;               // D
constexpr int MOST_CHUNKS = MOST / 16;  // of 16 numbers

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

}  // namespace
