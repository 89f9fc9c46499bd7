// One element of unscale_ and pack_: scaled, and its square.
#pragma once

#include <math.h>

#include "types.h"

namespace pyzero {

PZ_HD float scale_element(float x, float scale) { return x * scale; }

// In fp64 the square of an fp32 value never overflows, so a sum of them is finite exactly where every value is: one
// number answers both "what is the norm" and "was there an inf or a NaN".
PZ_HD double square(float x) { return double(x) * double(x); }

PZ_HD bool is_nonfinite(double sumsq) { return !(fabs(sumsq) <= 1.7976931348623157e308); }

}  // namespace pyzero
