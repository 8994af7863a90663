// Numbers to codes: the nearest level of a table, codes to planes of bits, scales as they are stored.
#pragma once
#include "rows.h"

namespace {

// Store `value` as `type`; return what was stored.
float put(char* to, float value, int64_t type) {
  if (type == F32) {
    memcpy(to, &value, 4);
    return value;
  }
  uint16_t half;
  float stored;
  if (type == F16) {
    half = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    stored = _cvtsh_ss(half);
  } else {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    half = uint16_t(bits >> 16);
    memcpy(&stored, &bits, 4);
  }
  memcpy(to, &half, 2);
  return stored;
}

// Middles between neighbouring levels of a rising table; a code counts those below a number.
struct Bounds {
  float middle[15];
  int count = 0;
  Bounds(const float* table, int64_t bits) {
    if (!table) return;
    count = (1 << bits) - 1;
    for (int i = 0; i < count; i++) middle[i] = (table[i + 1] + table[i]) / 2;
  }
  INLINE __m128i codes(__m512 x) const {
    __m512i code = _mm512_setzero_si512();
    for (int i = 0; i < count; i++) {
      const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_set1_ps(middle[i]), _CMP_GT_OQ);
      code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
    }
    return _mm512_cvtepi32_epi8(code);
  }
};

// Put `bits` bits of each code, from bit `below` on, into a plane of D * bits / 8 bytes.
char* plane(const uint8_t* codes, int64_t width, int bits, int below, char* to) {
  const int64_t size = width * bits / 8;
  for (int64_t j = 0; j < size; j++) {
    int byte = 0;
    for (int place = 0; place < 8 / bits; place++)
      byte |= (codes[j + place * size] >> below & ((1 << bits) - 1)) << bits * place;
    to[j] = char(byte);
  }
  return to + size;
}

void pack(const uint8_t* codes, int64_t width, int64_t kind, char* to) {
  switch (kind) {
    case INT4: plane(codes, width, 4, 0, to); break;
    case INT3: plane(codes, width, 1, 2, plane(codes, width, 2, 0, to)); break;
    case INT2: plane(codes, width, 2, 0, to); break;
    default: memcpy(to, codes, width);
  }
}

}  // namespace
