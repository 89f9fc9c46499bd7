// Vectorised loops around csrc/math, compiled once per ISA: PYZERO_ISA names the namespace.
#include "kernels.h"

#ifndef PYZERO_ISA
#define PYZERO_ISA baseline
#endif
#define PZ_STRING_(x) #x
#define PZ_STRING(x) PZ_STRING_(x)

#include "convert.h"
#include "math/reduce_scatter.h"

namespace pyzero {
namespace PYZERO_ISA {
namespace {

constexpr int64_t kTile = 512;  // floats staged in L1 between the loops of one kernel, so that each loop vectorises
constexpr int kLanes = 8;       // independent fp64 sums; fixed, so that every ISA adds in the same order

template <typename P>
struct Pointee;
template <typename T>
struct Pointee<T*> {
  using type = T;
};

// fn is called with a null pointer of the type.
template <typename Fn>
inline void with_dtype(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kBFloat16:
      return fn(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return fn(static_cast<Float16*>(nullptr));
    default:
      return fn(static_cast<float*>(nullptr));
  }
}

inline void widen_span(const Buffer& buffer, int64_t at, float* out, int64_t count) {
  with_dtype(buffer.dtype, [&](auto* type) { widen(static_cast<decltype(type)>(buffer.data) + at, out, count); });
}

inline void narrow_span(const float* in, const Buffer& buffer, int64_t at, int64_t count) {
  with_dtype(buffer.dtype, [&](auto* type) { narrow(in, static_cast<decltype(type)>(buffer.data) + at, count); });
}

inline void copy_span(const Buffer& src, const Buffer& dst, int64_t at, int64_t count) {
  with_dtype(src.dtype, [&](auto* type) {
    memcpy(static_cast<decltype(type)>(dst.data) + at, static_cast<decltype(type)>(src.data) + at,
           sizeof(*type) * count);
  });
}

// Traffic per element: master, exp_avg, exp_avg_sq read and written (24 B), grad read, param_out written: 28 B in fp32,
// 28 B in 16 bits with 16-bit weights out.
template <bool kCoupled>
void adam_loop(const AdamArgs& args, const AdamConstants& constants, float grad_scale, int64_t begin, int64_t end) {
  const AdamCoefficients c = adam_coefficients(args.hyper);
  const AdamConstants k = constants;
  float staged[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = end - at < kTile ? end - at : kTile;
    float* __restrict master = args.master + at;
    float* __restrict exp_avg = args.exp_avg + at;
    float* __restrict exp_avg_sq = args.exp_avg_sq + at;
    const float* __restrict grad = staged;
    if (args.grad.dtype == DType::kFloat32) {
      grad = static_cast<const float*>(args.grad.data) + at;
    } else {
      widen_span(args.grad, at, staged, count);
    }

    for (int64_t i = 0; i < count; ++i) {
      const AdamState before{master[i], exp_avg[i], exp_avg_sq[i]};

      const AdamState after = adam_element<kCoupled>(before, grad[i], grad_scale, c, k);

      master[i] = after.master;
      exp_avg[i] = after.exp_avg;
      exp_avg_sq[i] = after.exp_avg_sq;
    }

    if (args.param_out.data != nullptr) narrow_span(master, args.param_out, at, count);
  }
}

void adam(const AdamArgs& args, const AdamConstants& k, float grad_scale, int64_t begin, int64_t end) {
  if (adam_is_coupled(args.hyper)) {
    adam_loop<true>(args, k, grad_scale, begin, end);
  } else {
    adam_loop<false>(args, k, grad_scale, begin, end);
  }
}

// Squares in fp64 cannot overflow, so the sum of a span is finite exactly where all its values are.
struct SquareSum {
  double lanes[kLanes] = {};

  void add(const float* values, int64_t count) {
    double sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane];
    const int64_t whole = count - count % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += square(values[i + lane]);
    }
    for (int64_t i = whole; i < count; ++i) sums[i - whole] += square(values[i]);
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = sums[lane];
  }

  double total() const {
    double sum = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
  }
};

template <typename T>
inline void scale_directly(const Buffer& src, const Buffer& dst, float factor, int64_t at, int64_t count) {
  const T* in = static_cast<const T*>(src.data) + at;
  T* out = static_cast<T*>(dst.data) + at;
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(scale_element(to_float(in[i]), factor));
}

// One pass where the compiler vectorises the conversion both ways; otherwise three, over a tile in L1.
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
  with_dtype(buffer.dtype, [&](auto* type) {
    const auto* values = static_cast<decltype(type)>(buffer.data) + at;
    unsigned found = 0;
    for (int64_t i = 0; i < count; ++i) found |= is_nonfinite(values[i]);
    any = found != 0;
  });
  return any;
}

// Reads 2 or 4 B per element and writes as many; times 1 in the same dtype only copies, and in place only reads.
double scale(const Buffer& dst, const Buffer& src, float factor, Ask ask, int64_t begin, int64_t end) {
  const bool verbatim = factor == 1.0f && dst.dtype == src.dtype;
  const bool writes = dst.data != nullptr && !(verbatim && dst.data == src.data);
  if (verbatim && writes) copy_span(src, dst, begin, end - begin);
  if (verbatim && ask == Ask::kNothing) return 0.0;

  const Buffer& stored = writes ? dst : src;
  SquareSum sum;
  bool found = false;
  float tile[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = end - at < kTile ? end - at : kTile;
    if (writes && !verbatim) scale_span(src, dst, factor, tile, at, count);
    if (ask == Ask::kFlag) found |= any_nonfinite(stored, at, count);
    if (ask == Ask::kSumsq) {
      widen_span(stored, at, tile, count);  // what was stored, which is what counts
      sum.add(tile, count);
    }
  }
  if (ask == Ask::kFlag) return found ? bits_float(0x7fc00000u) : 0.0;
  return sum.total();
}

// Reads R slices and writes fp32: 2R + 4 B per element in 16 bits, and 4 more to accumulate.
template <typename T, bool kAccumulate>
double reduce_loop(const ReduceSpan& span, bool want_sumsq, int64_t begin, int64_t end) {
  SquareSum squares;
  float sum[kTile];
  float slice[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = end - at < kTile ? end - at : kTile;
    widen(static_cast<const T*>(span.slices[0]) + at, sum, count);
    for (int rank = 1; rank < span.num_slices; ++rank) {
      widen(static_cast<const T*>(span.slices[rank]) + at, slice, count);
      for (int64_t i = 0; i < count; ++i) sum[i] = reduce_add(sum[i], slice[i]);
    }
    float* __restrict out = span.past_caches ? slice : span.shard + at;
    for (int64_t i = 0; i < count; ++i) {
      out[i] = reduce_finish<kAccumulate>(kAccumulate ? out[i] : 0.0f, sum[i], span.scale);
    }
    if (span.past_caches) stream(out, span.shard + at, count);
    if (want_sumsq) squares.add(out, count);
  }
  if (span.past_caches) end_stream();
  return squares.total();
}

double reduce(const ReduceSpan& span, bool want_sumsq, int64_t begin, int64_t end) {
  double total = 0.0;
  with_dtype(span.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    total = span.accumulate ? reduce_loop<T, true>(span, want_sumsq, begin, end)
                            : reduce_loop<T, false>(span, want_sumsq, begin, end);
  });
  return total;
}

}  // namespace

extern const KernelTable kKernels;
const KernelTable kKernels{PZ_STRING(PYZERO_ISA), adam, scale, reduce};

}  // namespace PYZERO_ISA
}  // namespace pyzero
