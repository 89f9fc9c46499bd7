// One step of the loss-scale state machine, whose five numbers are on the device.
#pragma once

#include "types.h"

namespace pyzero {

struct LossScalePolicy {
  float growth_factor;
  float backoff_factor;
  float growth_interval;
  float min_scale;
  float max_scale;
  float hysteresis;
  float growth_delay;
  bool consecutive_hysteresis;
};

enum LossScaleSlot { kScale, kGrowthTracker, kHysteresisLeft, kSkippedSteps, kConsecutiveSkips, kLossScaleSlots };

PZ_HD void loss_scale_update(float* state, bool found_inf, const LossScalePolicy& policy) {
  if (found_inf) {
    state[kGrowthTracker] = 0.0f - policy.growth_delay;  // without a delay 0, not -0
    state[kHysteresisLeft] -= 1.0f;
    const float lower = state[kScale] * policy.backoff_factor;
    if (state[kHysteresisLeft] <= 0.0f) state[kScale] = lower > policy.min_scale ? lower : policy.min_scale;
    state[kSkippedSteps] += 1.0f;
    state[kConsecutiveSkips] += 1.0f;
    return;
  }

  state[kConsecutiveSkips] = 0.0f;
  if (policy.consecutive_hysteresis) state[kHysteresisLeft] = policy.hysteresis;
  state[kGrowthTracker] += 1.0f;
  if (state[kGrowthTracker] < policy.growth_interval) return;
  state[kGrowthTracker] = 0.0f;
  state[kHysteresisLeft] = policy.hysteresis;
  const float higher = state[kScale] * policy.growth_factor;
  if (!is_nonfinite(higher)) state[kScale] = higher < policy.max_scale ? higher : policy.max_scale;
}

}  // namespace pyzero
