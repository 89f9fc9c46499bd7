// The rule of adam_. If lr or step is on the device, a kernel computes the step-wide constants before the pass.
#include "../math/adam.h"
#include "update.cuh"

namespace pyzero {
namespace cuda {
namespace {

struct ConstantsParams {
  AdamHyper hyper;
  double lr;
  double step;
  const float* lr_device;
  const float* step_device;  // (num_segments,)
  AdamConstants* table;      // (num_segments,)
  int64_t num_segments;
};

// One thread per segment. Bytes per segment: 4 read and 12 written.
__global__ void __launch_bounds__(kThreads) adam_constants_kernel(const __grid_constant__ ConstantsParams params) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.num_segments) return;
  const double lr = params.lr_device != nullptr ? double(*params.lr_device) : params.lr;
  const double step = params.step_device != nullptr ? double(params.step_device[i]) : params.step;
  params.table[i] = adam_constants(params.hyper, lr, static_cast<long long>(step));
}

void fill_constants(const AdamArgs& args, AdamConstants* table, cudaStream_t stream) {
  const ConstantsParams params{args.hyper,       args.lr.value, args.step.value,  args.lr.device,
                               args.step.device, table,         args.num_segments};
  launch(adam_constants_kernel, params, int((args.num_segments + kThreads - 1) / kThreads), stream);
}

// Bytes per element: 12 read and 12 written of state, plus the gradient and each param_out. With bf16 in and out: 28.
template <bool kCoupled>
struct AdamRule {
  static constexpr int kNumStates = 3;
  struct Scalars {};  // none: adam_constants_kernel reads lr and step

  AdamCoefficients coefficients;
  AdamConstants default_constants;  // used if there is no table
  const AdamConstants* table;       // (num_segments,), or null

  __device__ __forceinline__ Scalars scalars() const { return {}; }

  __device__ __forceinline__ AdamConstants constants_of(int segment, Scalars) const {
    return table != nullptr ? table[segment] : default_constants;
  }

  __device__ __forceinline__ void update(float (&state)[kNumStates], float grad, float grad_scale,
                                         const AdamConstants& constants) const {
    const AdamState now =
        adam_element<kCoupled>(AdamState{state[0], state[1], state[2]}, grad, grad_scale, coefficients, constants);
    state[0] = now.master;
    state[1] = now.exp_avg;
    state[2] = now.exp_avg_sq;
  }
};

template <bool kCoupled>
void update_adam(const AdamArgs& args, const AdamConstants* table, cudaStream_t stream) {
  AdamConstants default_constants{};
  if (!table) default_constants = adam_constants(args.hyper, args.lr.value, static_cast<long long>(args.step.value));
  update_shard(AdamRule<kCoupled>{adam_coefficients(args.hyper), default_constants, table},
               {args.master, args.exp_avg, args.exp_avg_sq}, args, stream);
}

}  // namespace

void adam(const AdamArgs& args, AdamConstants* constants, cudaStream_t stream) {
  if (args.numel == 0 || args.grads.tensors.empty()) return;
  const bool on_device = args.lr.device != nullptr || args.step.device != nullptr;
  if (on_device) fill_constants(args, constants, stream);
  const AdamConstants* table = on_device ? constants : nullptr;
  if (adam_is_coupled(args.hyper)) {
    update_adam<true>(args, table, stream);
  } else {
    update_adam<false>(args, table, stream);
  }
}

}  // namespace cuda
}  // namespace pyzero
