// step_scalars_ computes four numbers, and counts the steps of all parameters.
#include "../math/step_scalars.h"
#include "launch.cuh"

namespace pyzero {
namespace cuda {
namespace {

struct StepScalarsParams {
  float* out;  // (4,)
  const double* stats;
  int64_t num_rows;
  bool clips;
  float max_norm;
  DeviceScalar unscale;
  DeviceScalar factor;
  float* steps;
  const float* used;
  int64_t num_params;
};

// One thread per parameter; thread 0 also computes the scalars. Bytes: 24 per row, cached, and 12 per parameter.
__global__ void __launch_bounds__(kThreads) step_scalars_kernel(const __grid_constant__ StepScalarsParams params) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < params.num_params && !has_overflow(params.stats, params.num_rows)) params.steps[i] += params.used[i];
  if (i != 0) return;
  const StepScalars scalars = pyzero::step_scalars(params.stats, params.num_rows, params.clips, params.max_norm,
                                                   read(params.unscale), read(params.factor));
  params.out[0] = scalars.found_inf;
  params.out[1] = scalars.norm;
  params.out[2] = scalars.clip;
  params.out[3] = scalars.grad_scale;
}

}  // namespace

void step_scalars(const StepScalarsArgs& args, cudaStream_t stream) {
  const StepScalarsParams params{args.out,
                                 args.stats,
                                 args.num_rows,
                                 args.clips,
                                 args.max_norm,
                                 device_scalar(args.unscale),
                                 device_scalar(args.factor),
                                 args.steps,
                                 args.used,
                                 args.num_params};
  const int64_t num_blocks = (args.num_params + kThreads - 1) / kThreads;
  launch(step_scalars_kernel, params, int(num_blocks > 0 ? num_blocks : 1), stream);
}

}  // namespace cuda
}  // namespace pyzero
