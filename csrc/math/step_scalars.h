// Values that all elements share in a step: overflow flag, norm, clip coefficient, and the factor of the gradients.
#pragma once

#include <math.h>

#include "types.h"

namespace pyzero {

enum StatsColumn { kFlag, kSumsq, kFirstBad, kStatsColumns };  // of a row of statistics; kFirstBad is unused here

struct StepScalars {
  float found_inf;   // 1 or 0
  float norm;        // before clipping
  float clip;        // the coefficient
  float grad_scale;  // clip, factor and unscale
};

// torch.nn.utils.clip_grad_norm_'s min(1, max_norm / (norm + 1e-6)). torch divides a number by a tensor in this way.
PZ_HD float clip_coefficient(float norm, float max_norm) {
  const float clip = 1.0f / (norm + 1e-6f) * max_norm;
  return clip > 1.0f ? 1.0f : clip;  // NaN if the norm is NaN
}

PZ_HD bool has_overflow(const double* stats, int64_t num_rows) {
  bool found = false;
  for (int64_t i = 0; i < num_rows; ++i) found |= stats[i * kStatsColumns + kFlag] != 0.0;
  return found;
}

PZ_HD StepScalars step_scalars(const double* stats, int64_t num_rows, bool clips, float max_norm, float unscale,
                               float factor) {
  double sumsq = 0.0;
  for (int64_t i = 0; i < num_rows; ++i) sumsq += stats[i * kStatsColumns + kSumsq];

  const float norm = float(sqrt(sumsq) * double(unscale)) * fabsf(factor);
  const float clip = clips ? clip_coefficient(norm, max_norm) : 1.0f;
  return StepScalars{has_overflow(stats, num_rows) ? 1.0f : 0.0f, norm, clip, clip * factor * unscale};
}

}  // namespace pyzero
