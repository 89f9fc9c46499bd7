// One element of reduce_scatter_: the fp32 sum over ranks in rank order, scaled, and optionally added to the shard.
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
