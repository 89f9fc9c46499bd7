// unscale_ and pack_: the loop of one ISA. Include only from kernels.cpp.
#pragma once

#include "square_sum.h"

namespace pyzero {
namespace PYZERO_ISA {
namespace {

template <typename T>
inline void scale_directly(const Buffer& src, const Buffer& dst, float factor, int64_t at, int64_t count) {
  const T* in = static_cast<const T*>(src.data) + at;
  T* out = static_cast<T*>(dst.data) + at;
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(scale_element(to_float(in[i]), factor));
}

// One pass if the compiler vectorises the conversion both ways; otherwise three passes over a tile in L1.
inline void scale_span(const Buffer& src, const Buffer& dst, float factor, float* tile, int64_t at, int64_t count) {
  if (src.dtype == dst.dtype && src.dtype == DType::kFloat32) return scale_directly<float>(src, dst, factor, at, count);
  if (src.dtype == dst.dtype && src.dtype == DType::kBFloat16) {
    return scale_directly<BFloat16>(src, dst, factor, at, count);
  }
  widen_span(src, at, tile, count);
  if (factor != 1.0f) {
    for (int64_t i = 0; i < count; ++i) tile[i] = scale_element(tile[i], factor);
  }
  narrow_span(tile, dst, at, count);
}

inline bool any_nonfinite(const Buffer& buffer, int64_t at, int64_t count) {
  bool any = false;
  with_dtype(buffer.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* values = static_cast<const T*>(buffer.data) + at;
    unsigned found = 0;
    for (int64_t i = 0; i < count; ++i) found |= is_nonfinite(values[i]);
    any = found != 0;
  });
  return any;
}

constexpr int64_t kLineBytes = 64;
constexpr int64_t kAheadBytes = 8192;

// Prefetches the tile kAheadBytes ahead: hardware prefetchers stop at the end of a page of 4 KiB. A prefetch past the
// end of a tensor is useless but cannot fault.
inline void prefetch_ahead(const Buffer& buffer, int64_t at) {
  const int64_t item_bytes = element_size(buffer.dtype);
  const char* from = static_cast<const char*>(buffer.data) + at * item_bytes + kAheadBytes;
  for (int64_t i = 0; i < kTile * item_bytes; i += kLineBytes) __builtin_prefetch(from + i, 0, 0);
}

// Reads and writes 2 or 4 B per element. In the same dtype, a factor of 1 only copies; in place it only reads.
double scale(const Buffer& dst, const Buffer& src, float factor, Wanted wanted, int64_t begin, int64_t end) {
  const bool verbatim = factor == 1.0f && dst.dtype == src.dtype;
  const bool writes = dst.data != nullptr && !(verbatim && dst.data == src.data);
  if (verbatim && writes) copy_span(src, dst, begin, end - begin);
  if (verbatim && wanted == Wanted::kNothing) return 0.0;

  const Buffer& stored = writes ? dst : src;
  SquareSum sum;
  bool found = false;
  float tile[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = tile_count(at, end);
    prefetch_ahead(src, at);
    if (writes && !verbatim) scale_span(src, dst, factor, tile, at, count);
    if (wanted == Wanted::kFlag) found |= any_nonfinite(stored, at, count);
    if (wanted == Wanted::kSumsq) {
      sum.add(fp32_span(stored, at, tile, count), count);  // the stored values, after rounding
    }
  }
  if (wanted == Wanted::kFlag) return found ? bits_float(0x7fc00000u) : 0.0;
  return sum.total();
}

void stream_copy(const void* src, void* dst, int64_t num_bytes) {
  stream(src, dst, num_bytes);
  end_stream();
}

}  // namespace
}  // namespace PYZERO_ISA
}  // namespace pyzero
