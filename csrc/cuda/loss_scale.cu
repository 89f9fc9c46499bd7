// loss_scale_update_: five numbers, one thread.
#include "../math/loss_scale.h"
#include "launch.cuh"

namespace pyzero {
namespace cuda {
namespace {

struct LossScaleParams {
  float* state;
  const float* found_inf;
  LossScalePolicy policy;
};

// Bytes: 4 + 20 read, 20 written.
__global__ void loss_scale_kernel(const __grid_constant__ LossScaleParams params) {
  if (blockIdx.x * blockDim.x + threadIdx.x != 0) return;
  loss_scale_update(params.state, *params.found_inf != 0.0f, params.policy);
}

}  // namespace

void loss_scale_update(float* state, const float* found_inf, const LossScalePolicy& policy, cudaStream_t stream) {
  launch(loss_scale_kernel, LossScaleParams{state, found_inf, policy}, 1, stream, 1);
}

}  // namespace cuda
}  // namespace pyzero
