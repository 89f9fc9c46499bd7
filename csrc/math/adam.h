// Adam and AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019): the step-wide constants and one element's update.
#pragma once

#include <math.h>

#include "types.h"

namespace pyzero {

struct AdamHyper {
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  bool decoupled_weight_decay;
  bool maximize;
};

// Values that all elements share at one step count, computed in double and rounded once.
struct AdamConstants {
  float step_size;     // lr / (1 - beta1^step)
  float inv_sqrt_bc2;  // 1 / sqrt(1 - beta2^step)
  float decay;         // 1 - lr * weight_decay if decoupled, else exactly 1
};

// Values that all elements share at all steps.
struct AdamCoefficients {
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float weight_decay;
};

struct AdamState {
  float master;
  float exp_avg;
  float exp_avg_sq;
};

// Exponentiation by squaring only multiplies, so that every backend gets the same bits. pow() does not promise that.
PZ_HD double pow_int(double base, long long exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

PZ_HD AdamConstants adam_constants(const AdamHyper& hyper, double lr, long long step) {
  const double bc1 = 1.0 - pow_int(hyper.beta1, step);
  const double bc2 = 1.0 - pow_int(hyper.beta2, step);
  const double decay = hyper.decoupled_weight_decay && hyper.weight_decay != 0.0 ? 1.0 - lr * hyper.weight_decay : 1.0;
  return AdamConstants{float(lr / bc1), float(1.0 / sqrt(bc2)), float(decay)};
}

PZ_HD AdamCoefficients adam_coefficients(const AdamHyper& hyper) {
  return AdamCoefficients{float(1.0 - hyper.beta1), float(hyper.beta2), float(1.0 - hyper.beta2), float(hyper.eps),
                          float(hyper.weight_decay)};
}

PZ_HD bool adam_is_coupled(const AdamHyper& hyper) {
  return hyper.weight_decay != 0.0 && !hyper.decoupled_weight_decay;
}

// grad_scale carries the sign of maximize: a negation is exact.
template <bool kCoupled>
PZ_HD AdamState adam_element(AdamState state, float grad, float grad_scale, const AdamCoefficients& c,
                             const AdamConstants& k) {
  float g = grad * grad_scale;
  float p = state.master;
  if (kCoupled) {
    g = g + c.weight_decay * p;
  } else {
    p = p * k.decay;
  }

  const float m = state.exp_avg + (g - state.exp_avg) * c.one_minus_beta1;
  const float v = state.exp_avg_sq * c.beta2 + (c.one_minus_beta2 * g) * g;
  const float denominator = sqrtf(v) * k.inv_sqrt_bc2 + c.eps;
  return AdamState{p - (k.step_size * m) / denominator, m, v};
}

}  // namespace pyzero
