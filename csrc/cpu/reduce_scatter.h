// reduce_scatter_: the loop of one ISA. Include only from kernels.cpp.
#pragma once

#include "math/reduce_scatter.h"
#include "square_sum.h"

namespace pyzero {
namespace PYZERO_ISA {
namespace {

// Reads R slices and writes fp32: 2R + 4 B per element with 16-bit slices, and 4 more to accumulate.
template <typename T, bool kAccumulate>
double reduce_loop(const ReduceSpan& span, bool want_sumsq, int64_t begin, int64_t end) {
  SquareSum squares;
  float sum[kTile];
  float slice[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = tile_count(at, end);
    widen(static_cast<const T*>(span.slices[0]) + at, sum, count);
    for (int rank = 1; rank < span.num_slices; ++rank) {
      widen(static_cast<const T*>(span.slices[rank]) + at, slice, count);
      for (int64_t i = 0; i < count; ++i) sum[i] = reduce_add(sum[i], slice[i]);
    }
    float* __restrict out = span.non_temporal ? slice : span.shard + at;
    for (int64_t i = 0; i < count; ++i) {
      out[i] = reduce_finish<kAccumulate>(kAccumulate ? out[i] : 0.0f, sum[i], span.scale);
    }
    if (span.non_temporal) stream(out, span.shard + at, count * sizeof(float));
    if (want_sumsq) squares.add(out, count);
  }
  if (span.non_temporal) end_stream();
  return squares.total();
}

double reduce(const ReduceSpan& span, bool want_sumsq, int64_t begin, int64_t end) {
  double total = 0.0;
  with_dtype(span.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    total = span.accumulate ? reduce_loop<T, true>(span, want_sumsq, begin, end)
                            : reduce_loop<T, false>(span, want_sumsq, begin, end);
  });
  return total;
}

}  // namespace
}  // namespace PYZERO_ISA
}  // namespace pyzero
