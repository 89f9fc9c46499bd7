// One element of unscale_ and pack_: its scaled value, and its square.
#pragma once

#include <math.h>

#include "types.h"

namespace pyzero {

PZ_HD float scale_element(float x, float scale) { return x * scale; }

// The fp64 square of an fp32 value never overflows, so a sum of squares is finite if and only if every value is. One
// number thus gives the norm and detects inf and NaN.
PZ_HD double square(float x) { return double(x) * double(x); }

PZ_HD bool is_nonfinite(double sumsq) { return !(fabs(sumsq) <= 1.7976931348623157e308); }

}  // namespace pyzero
