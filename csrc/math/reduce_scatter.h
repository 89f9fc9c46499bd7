// One element of reduce_scatter_: the sum over ranks, in rank order and fp32, scaled, added to what was there.
#pragma once

#include "types.h"

namespace pyzero {

PZ_HD float reduce_add(float sum, float slice) { return sum + slice; }

template <bool kAccumulate>
PZ_HD float reduce_finish(float shard, float sum, float scale) {
  const float scaled = scale * sum;
  return kAccumulate ? shard + scaled : scaled;
}

}  // namespace pyzero
