// Code new keys, their positions taken off, and new values; put both behind the old rows, in one pass.
//
// The numbers are those of kv_bare/reference.py.
#include <algorithm>

#include "bare.h"
#include "coding.h"

// The stored tensors, dense [B, K, C, *]: codes, outliers and their places; scales and offsets of values.
struct Stored {
  char *keys, *key_outliers, *key_places, *values, *scales, *offsets, *value_outliers, *value_places;
};

// Every field has 8 bytes: the caller packs them without padding.
extern "C" struct BareEncode {
  const char *keys, *values;  // [B, K, T, D], rows dense
  int64_t key_batch, key_head, key_row, value_batch, value_head, value_row;  // strides in bytes
  int64_t batch, heads, old, tokens, width, kind, type, apart;
  int64_t position, turning;                 // of the first new token; pairs of a row
  const float *frequencies, *middle, *half;  // [turning], [K, D], [K, D]
  const float *key_table, *value_table;      // [2^bits]
  Stored old_rows, fresh;
};

namespace {

int64_t bits_of(int64_t kind) { return kind == INT4 ? 4 : kind == INT3 ? 3 : 2; }
int64_t size_of(int64_t type) { return type == F32 ? 4 : 2; }

// Copy the old rows of every pair of sequence and head to where they stand in the new tensor.
void copy(const BareEncode& e, const char* old, char* fresh, int64_t bytes) {
  for (int64_t pair = 0; e.old && pair < e.batch * e.heads; pair++)
    memcpy(fresh + pair * (e.old + e.tokens) * bytes, old + pair * e.old * bytes, e.old * bytes);
}

// Places of the `apart` largest of `sizes` [D], the largest first; they become -1.
void largest(float* sizes, int64_t width, int64_t apart, uint8_t* places) {
  for (int64_t i = 0; i < apart; i++) {
    __m512 most = _mm512_loadu_ps(sizes);
    for (int64_t d = 16; d < width; d += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(sizes + d));
    const float top = _mm512_reduce_max_ps(most);
    places[i] = uint8_t(std::find(sizes, sizes + width, top) - sizes);
    sizes[places[i]] = -1;
  }
}

INLINE void put_apart(const BareEncode& e, const float* x, const uint8_t* places, char* to) {
  for (int64_t i = 0; i < e.apart; i++)
    put(to + i * size_of(e.type), x[places[i]], e.type);
}

void key_row(const BareEncode& e, const Bounds& bounds, const float* x, int64_t head, int64_t row) {
  const float *middle = e.middle + head * e.width, *half = e.half + head * e.width;
  float sizes[MOST];
  uint8_t found[MOST];
  for (int64_t d = 0; d < e.width; d += 16) {
    const __m512 z = _mm512_div_ps(_mm512_sub_ps(_mm512_loadu_ps(x + d), _mm512_loadu_ps(middle + d)),
                                   _mm512_loadu_ps(half + d));
    _mm512_storeu_ps(sizes + d, _mm512_abs_ps(z));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(found + d), bounds.codes(z));
  }
  uint8_t* places = reinterpret_cast<uint8_t*>(e.fresh.key_places + row * e.apart);
  largest(sizes, e.width, e.apart, places);
  put_apart(e, x, places, e.fresh.key_outliers + row * e.apart * size_of(e.type));
  pack(found, e.width, e.kind, e.fresh.keys + row * e.width * bits_of(e.kind) / 8);
}

void value_row(const BareEncode& e, const Bounds& bounds, const float* x, int64_t row) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < e.width; d += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + d));
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / e.width);
  float sizes[MOST];
  uint8_t found[MOST];
  for (int64_t d = 0; d < e.width; d += 16)
    _mm512_storeu_ps(sizes + d, _mm512_abs_ps(_mm512_sub_ps(_mm512_loadu_ps(x + d), mean)));
  uint8_t* places = reinterpret_cast<uint8_t*>(e.fresh.value_places + row * e.apart);
  largest(sizes, e.width, e.apart, places);
  put_apart(e, x, places, e.fresh.value_outliers + row * e.apart * size_of(e.type));
  __m512 low = _mm512_set1_ps(INFINITY), high = _mm512_set1_ps(-INFINITY);
  for (int64_t d = 0; d < e.width; d += 16) {
    const __m512 part = _mm512_loadu_ps(x + d);
    const __mmask16 kept =
        _mm512_cmp_ps_mask(_mm512_loadu_ps(sizes + d), _mm512_setzero_ps(), _CMP_GE_OQ);
    low = _mm512_mask_min_ps(low, kept, low, part), high = _mm512_mask_max_ps(high, kept, high, part);
  }
  const float least = _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high);
  const float scale = fmaxf((most - least) / 2, 0x1p-126f);
  const __m512 by = _mm512_set1_ps(put(e.fresh.scales + row * 2, scale, BF16));
  const __m512 from = _mm512_set1_ps(put(e.fresh.offsets + row * 2, (most + least) / 2, BF16));
  for (int64_t d = 0; d < e.width; d += 16) {
    const __m512 z = _mm512_div_ps(_mm512_sub_ps(_mm512_loadu_ps(x + d), from), by);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(found + d), bounds.codes(z));
  }
  pack(found, e.width, e.kind, e.fresh.values + row * e.width * bits_of(e.kind) / 8);
}

}  // namespace

extern "C" void compresskit_bare_encode(const BareEncode* call) {
  const BareEncode& e = *call;
  const int64_t bits = bits_of(e.kind), size = size_of(e.type), pairs = e.batch * e.heads;
  const Bounds key_bounds(e.key_table, bits), value_bounds(e.value_table, bits);
  const Stored &o = e.old_rows, &f = e.fresh;
  copy(e, o.keys, f.keys, e.width * bits / 8);
  copy(e, o.key_outliers, f.key_outliers, e.apart * size);
  copy(e, o.key_places, f.key_places, e.apart);
  copy(e, o.values, f.values, e.width * bits / 8);
  copy(e, o.scales, f.scales, 2);
  copy(e, o.offsets, f.offsets, 2);
  copy(e, o.value_outliers, f.value_outliers, e.apart * size);
  copy(e, o.value_places, f.value_places, e.apart);
  Angles angles, one;
  angles.at(e.frequencies, e.turning, double(e.position));
  if (e.tokens > 1) one.at(e.frequencies, e.turning, 1);
  for (int64_t t = 0; t < e.tokens; t++) {
    float cos[MOST / 2], sin[MOST / 2], x[MOST];
    angles.single(e.turning, cos, sin);
    if (t + 1 < e.tokens) angles.add(one, e.turning);
    for (int64_t pair = 0; pair < pairs; pair++) {
      const int64_t batch = pair / e.heads, head = pair % e.heads;
      const int64_t row = pair * (e.old + e.tokens) + e.old + t;
      const char* key = e.keys + batch * e.key_batch + head * e.key_head + t * e.key_row;
      for (int64_t d = 0; d < e.width; d += 16)
        _mm512_storeu_ps(x + d, widened16(key + d * size, e.type));
      turn_pairs(x, cos, sin, e.turning, true, x);
      key_row(e, key_bounds, x, head, row);
      const char* value = e.values + batch * e.value_batch + head * e.value_head + t * e.value_row;
      for (int64_t d = 0; d < e.width; d += 16)
        _mm512_storeu_ps(x + d, widened16(value + d * size, e.type));
      value_row(e, value_bounds, x, row);
    }
  }
}
