// The rule of lion_.
#include "../math/lion.h"
#include "update.cuh"

namespace pyzero {
namespace cuda {
namespace {

// Bytes per element: 8 read and 8 written of state, plus the gradient and each param_out. With bf16 in and out: 20.
struct LionRule {
  static constexpr int kNumStates = 2;
  using Scalars = LionConstants;

  LionHyper hyper;
  LionCoefficients coefficients;
  LionConstants host_constants;  // used if lr is a number
  const float* lr_device;

  __device__ __forceinline__ LionConstants scalars() const {
    return lr_device != nullptr ? lion_constants(hyper, double(*lr_device)) : host_constants;
  }

  __device__ __forceinline__ LionConstants constants_of(int, const LionConstants& scalars) const { return scalars; }

  __device__ __forceinline__ void update(float (&state)[kNumStates], float grad, float grad_scale,
                                         const LionConstants& constants) const {
    const LionState now = lion_element(LionState{state[0], state[1]}, grad, grad_scale, coefficients, constants);
    state[0] = now.master;
    state[1] = now.exp_avg;
  }
};

}  // namespace

void lion(const LionArgs& args, cudaStream_t stream) {
  const LionRule rule{args.hyper, lion_coefficients(args.hyper), lion_constants(args.hyper, args.lr.value),
                      args.lr.device};
  update_shard(rule, {args.master, args.exp_avg}, args, stream);
}

}  // namespace cuda
}  // namespace pyzero
