// adam_: the loop of one ISA. Include only from kernels.cpp.
#pragma once

#include "convert.h"
#include "math/adam.h"

namespace pyzero {
namespace PYZERO_ISA {
namespace {

// Traffic per element: 24 B to read and write master, exp_avg and exp_avg_sq, plus the gradient and each param_out: 28
// B with an fp32 gradient alone, and 28 B with a 16-bit gradient and 16-bit weights.
template <bool kCoupled>
void adam_loop(const AdamArgs& args, const GradSpan& span, const AdamConstants& constants, float grad_scale,
               int64_t begin, int64_t end) {
  const AdamCoefficients c = adam_coefficients(args.hyper);
  const AdamConstants k = constants;
  float staged[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = tile_count(at, end);
    float* __restrict master = args.master + at;
    float* __restrict exp_avg = args.exp_avg + at;
    float* __restrict exp_avg_sq = args.exp_avg_sq + at;
    const float* __restrict grad = fp32_span(span.values, at - span.offset, staged, count);

    for (int64_t i = 0; i < count; ++i) {
      const AdamState before{master[i], exp_avg[i], exp_avg_sq[i]};

      const AdamState after = adam_element<kCoupled>(before, grad[i], grad_scale, c, k);

      master[i] = after.master;
      exp_avg[i] = after.exp_avg;
      exp_avg_sq[i] = after.exp_avg_sq;
    }

    for (int i = 0; i < args.param_outs.count; ++i) narrow_span(master, args.param_outs.buffers[i], at, count);
  }
}

void adam(const AdamArgs& args, const GradSpan& span, const AdamConstants& k, float grad_scale, int64_t begin,
          int64_t end) {
  if (adam_is_coupled(args.hyper)) {
    adam_loop<true>(args, span, k, grad_scale, begin, end);
  } else {
    adam_loop<false>(args, span, k, grad_scale, begin, end);
  }
}

}  // namespace
}  // namespace PYZERO_ISA
}  // namespace pyzero
