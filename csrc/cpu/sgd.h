// sgd_: the loop of one ISA. Include only from kernels.cpp.
#pragma once

#include "convert.h"
#include "math/sgd.h"

namespace pyzero {
namespace PYZERO_ISA {
namespace {

// Traffic per element: 16 B to read and write master and momentum_buffer (8 B without a buffer), plus the gradient and
// each param_out. That is 20 B with a buffer, a 16-bit gradient and 16-bit weights.
template <bool kHasBuffer>
void sgd_loop(const SgdArgs& args, const GradSpan& span, float lr, bool is_first, float grad_scale, int64_t begin,
              int64_t end) {
  const SgdCoefficients c = sgd_coefficients(args.hyper);
  float staged[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = tile_count(at, end);
    float* __restrict master = args.master + at;
    float* __restrict buffer = kHasBuffer ? args.momentum_buffer + at : nullptr;
    const float* __restrict grad = fp32_span(span.values, at - span.offset, staged, count);

    for (int64_t i = 0; i < count; ++i) {
      const SgdState before{master[i], kHasBuffer ? buffer[i] : 0.0f};

      const SgdState after = sgd_element<kHasBuffer>(before, grad[i], grad_scale, c, lr, is_first);

      master[i] = after.master;
      if (kHasBuffer) buffer[i] = after.momentum_buffer;
    }

    for (int i = 0; i < args.param_outs.count; ++i) narrow_span(master, args.param_outs.buffers[i], at, count);
  }
}

void sgd(const SgdArgs& args, const GradSpan& span, float lr, bool is_first, float grad_scale, int64_t begin,
         int64_t end) {
  if (args.momentum_buffer != nullptr) {
    sgd_loop<true>(args, span, lr, is_first, grad_scale, begin, end);
  } else {
    sgd_loop<false>(args, span, lr, is_first, grad_scale, begin, end);
  }
}

}  // namespace
}  // namespace PYZERO_ISA
}  // namespace pyzero
