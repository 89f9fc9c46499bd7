// One element of unscale_ and pack_: scale, round to the stored type, and report what was stored.
#pragma once

#include "types.h"

namespace pyzero {

// What a pass over gradients reports. Squares and their sum are fp64: an fp32 value's square never overflows there.
struct GradStats {
  double sumsq;
  bool nonfinite;
};

PZ_HD GradStats grad_stats(float stored) { return GradStats{double(stored) * double(stored), is_nonfinite(stored)}; }

template <typename Out>
PZ_HD Out scale_element(float x, float scale) {
  return from_float<Out>(x * scale);
}

}  // namespace pyzero
