// Lion (Chen et al. 2023, arXiv 2302.06675): the step-wide constants and one element's update.
#pragma once

#include "types.h"

namespace pyzero {

struct LionHyper {
  double beta1;
  double beta2;
  double weight_decay;  // decoupled
  bool maximize;
};

// Values that all elements share at one step, computed in double and rounded once.
struct LionConstants {
  float lr;
  float decay;  // 1 - lr * weight_decay
};

// Values that all elements share at all steps.
struct LionCoefficients {
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
};

struct LionState {
  float master;
  float exp_avg;
};

PZ_HD LionConstants lion_constants(const LionHyper& hyper, double lr) {
  return LionConstants{float(lr), float(1.0 - lr * hyper.weight_decay)};
}

PZ_HD LionCoefficients lion_coefficients(const LionHyper& hyper) {
  return LionCoefficients{float(hyper.beta1), float(1.0 - hyper.beta1), float(hyper.beta2), float(1.0 - hyper.beta2)};
}

// Returns +0 for a zero of either sign, and NaN for NaN: a step must not hide a NaN.
PZ_HD float sign(float x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : x - x); }

// grad_scale carries the sign of maximize: a negation is exact.
PZ_HD LionState lion_element(LionState state, float grad, float grad_scale, const LionCoefficients& c,
                             const LionConstants& k) {
  const float g = grad * grad_scale;

  const float update = sign(c.beta1 * state.exp_avg + c.one_minus_beta1 * g);
  const float p = state.master * k.decay - k.lr * update;
  const float m = c.beta2 * state.exp_avg + c.one_minus_beta2 * g;
  return LionState{p, m};
}

}  // namespace pyzero
