// The rule of sgd_.
#include "../math/sgd.h"
#include "update.cuh"

namespace pyzero {
namespace cuda {
namespace {

// Bytes per element: 8 read and 8 written of state (half without a buffer), plus the gradient and each param_out. With
// a buffer, and bf16 in and out: 20.
template <bool kHasBuffer>
struct SgdRule {
  static constexpr int kNumStates = kHasBuffer ? 2 : 1;
  using Scalars = float;  // lr
  struct Constants {
    float lr;
    bool is_first;
  };

  SgdCoefficients coefficients;
  DeviceScalar lr;
  bool is_first;      // used if step is a number
  const float* step;  // (num_segments,), or null

  __device__ __forceinline__ float scalars() const { return read(lr); }

  __device__ __forceinline__ Constants constants_of(int segment, float lr) const {
    return Constants{lr, kHasBuffer && (step != nullptr ? step[segment] == 1.0f : is_first)};
  }

  __device__ __forceinline__ void update(float (&state)[kNumStates], float grad, float grad_scale,
                                         const Constants& constants) const {
    const SgdState before{state[0], kHasBuffer ? state[kNumStates - 1] : 0.0f};
    const SgdState now =
        sgd_element<kHasBuffer>(before, grad, grad_scale, coefficients, constants.lr, constants.is_first);
    state[0] = now.master;
    if constexpr (kHasBuffer) state[1] = now.momentum_buffer;
  }
};

}  // namespace

void sgd(const SgdArgs& args, cudaStream_t stream) {
  const SgdCoefficients coefficients = sgd_coefficients(args.hyper);
  const DeviceScalar lr = device_scalar(args.lr);
  const bool is_first = args.step.value == 1.0;
  if (args.momentum_buffer != nullptr) {
    const SgdRule<true> rule{coefficients, lr, is_first, args.step.device};
    update_shard(rule, {args.master, args.momentum_buffer}, args, stream);
  } else {
    const SgdRule<false> rule{coefficients, lr, is_first, args.step.device};
    update_shard(rule, {args.master}, args, stream);
  }
}

}  // namespace cuda
}  // namespace pyzero
