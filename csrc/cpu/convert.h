// Converts spans to and from fp32 in L1, with the fp16 instructions of the ISA if it has them.
// Include only from kernels.cpp, inside its ISA's namespace.
#pragma once

#if defined(__F16C__) || defined(__AVX__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace pyzero {
namespace PYZERO_ISA {
namespace {

inline void widen(const float* in, float* out, int64_t count) { memcpy(out, in, sizeof(float) * count); }

inline void widen(const BFloat16* __restrict in, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}

inline void widen(const Float16* __restrict in, float* __restrict out, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
#endif
  for (; i < count; ++i) out[i] = to_float(in[i]);
}

inline void narrow(const float* in, float* out, int64_t count) { memcpy(out, in, sizeof(float) * count); }

inline void narrow(const float* __restrict in, BFloat16* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<BFloat16>(in[i]);
}

inline void narrow(const float* __restrict in, Float16* __restrict out, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), rounded);
  }
#endif
  for (; i < count; ++i) out[i] = from_float<Float16>(in[i]);
}

// Copies with non-temporal stores. A plain store first reads the line that it overwrites: a third of a copy's traffic.
// Call end_stream() before another thread reads the copy.
inline void stream(const void* __restrict in, void* __restrict out, int64_t num_bytes) {
  const char* from = static_cast<const char*>(in);
  char* to = static_cast<char*>(out);
  int64_t i = 0;
#if defined(__AVX__)
  constexpr int64_t kVector = sizeof(__m256i);
  const int64_t head = (kVector - static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kVector)) % kVector;
  i = head < num_bytes ? head : num_bytes;
  memcpy(to, from, i);
  for (; i + kVector <= num_bytes; i += kVector) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
#endif
  memcpy(to + i, from + i, num_bytes - i);
}

inline void end_stream() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

constexpr int64_t kTile = 512;  // floats staged in L1 between the loops of one kernel, so that each loop vectorises

// Elements of the tile that begins at `at`.
inline int64_t tile_count(int64_t at, int64_t end) { return end - at < kTile ? end - at : kTile; }

template <typename T>
struct Tag {
  using type = T;
};

// Calls fn with the Tag of the C++ type.
template <typename Fn>
inline void with_dtype(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kBFloat16:
      return fn(Tag<BFloat16>{});
    case DType::kFloat16:
      return fn(Tag<Float16>{});
    default:
      return fn(Tag<float>{});
  }
}

inline void widen_span(const Buffer& buffer, int64_t at, float* out, int64_t count) {
  with_dtype(buffer.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    widen(static_cast<const T*>(buffer.data) + at, out, count);
  });
}

// Returns the span itself if it is fp32, else `staged` with its values.
inline const float* fp32_span(const Buffer& buffer, int64_t at, float* staged, int64_t count) {
  if (buffer.dtype == DType::kFloat32) return static_cast<const float*>(buffer.data) + at;
  widen_span(buffer, at, staged, count);
  return staged;
}

inline void narrow_span(const float* in, const Buffer& buffer, int64_t at, int64_t count) {
  with_dtype(buffer.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    narrow(in, static_cast<T*>(buffer.data) + at, count);
  });
}

inline void copy_span(const Buffer& src, const Buffer& dst, int64_t at, int64_t count) {
  with_dtype(src.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    memcpy(static_cast<T*>(dst.data) + at, static_cast<const T*>(src.data) + at, sizeof(T) * count);
  });
}

}  // namespace
}  // namespace PYZERO_ISA
}  // namespace pyzero
