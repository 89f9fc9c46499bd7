// SGD with momentum (torch.optim.SGD): the step-wide constants and one element's update.
#pragma once

#include "types.h"

namespace pyzero {

struct SgdHyper {
  double momentum;
  double dampening;
  double weight_decay;  // added to the gradient
  bool nesterov;
  bool maximize;
};

// Values that all elements share at all steps, computed in double and rounded once.
struct SgdCoefficients {
  float momentum;
  float one_minus_dampening;
  float weight_decay;
  bool decays;  // if false, decay is skipped: 0 times an infinite weight is NaN
  bool nesterov;
};

struct SgdState {
  float master;
  float momentum_buffer;
};

PZ_HD SgdCoefficients sgd_coefficients(const SgdHyper& hyper) {
  return SgdCoefficients{float(hyper.momentum), float(1.0 - hyper.dampening), float(hyper.weight_decay),
                         hyper.weight_decay != 0.0, hyper.nesterov};
}

// grad_scale carries the sign of maximize: a negation is exact. is_first: the gradient is not dampened.
template <bool kHasBuffer>
PZ_HD SgdState sgd_element(SgdState state, float grad, float grad_scale, const SgdCoefficients& c, float lr,
                           bool is_first) {
  const float scaled = grad * grad_scale;
  const float g = c.decays ? scaled + c.weight_decay * state.master : scaled;
  if (!kHasBuffer) return SgdState{state.master - lr * g, 0.0f};

  const float weight = is_first ? 1.0f : c.one_minus_dampening;
  const float m = c.momentum * state.momentum_buffer + weight * g;
  const float update = c.nesterov ? g + c.momentum * m : m;
  return SgdState{state.master - lr * update, m};
}

}  // namespace pyzero
