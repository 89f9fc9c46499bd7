// lion_: the loop of one ISA. Include only from kernels.cpp.
#pragma once

#include "convert.h"
#include "math/lion.h"

namespace pyzero {
namespace PYZERO_ISA {
namespace {

// Traffic per element: 16 B to read and write master and exp_avg, plus the gradient and each param_out. That is 20 B
// with a 16-bit gradient and 16-bit weights.
void lion(const LionArgs& args, const GradSpan& span, const LionConstants& constants, float grad_scale, int64_t begin,
          int64_t end) {
  const LionCoefficients c = lion_coefficients(args.hyper);
  const LionConstants k = constants;
  float staged[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = tile_count(at, end);
    float* __restrict master = args.master + at;
    float* __restrict exp_avg = args.exp_avg + at;
    const float* __restrict grad = fp32_span(span.values, at - span.offset, staged, count);

    for (int64_t i = 0; i < count; ++i) {
      const LionState after = lion_element(LionState{master[i], exp_avg[i]}, grad[i], grad_scale, c, k);

      master[i] = after.master;
      exp_avg[i] = after.exp_avg;
    }

    for (int i = 0; i < args.param_outs.count; ++i) narrow_span(master, args.param_outs.buffers[i], at, count);
  }
}

}  // namespace
}  // namespace PYZERO_ISA
}  // namespace pyzero
