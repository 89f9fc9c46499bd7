// sgd_: one pass over a flat shard.
#include <type_traits>

#include "../math/sgd.h"
#include "param_outs.cuh"
#include "shard_grads.cuh"

namespace pyzero {
namespace cuda {
namespace {

template <int kCapacity>
struct SgdParams {
  float* master;
  float* momentum_buffer;
  ParamPointers param_outs;
  SgdCoefficients coefficients;
  DeviceScalar lr;
  bool is_first;      // where the step is a number
  const float* step;  // (num_segments,), or null
  DeviceScalar grad_scale;
  float sign;  // -1 to maximize
  const float* found_inf;
  const int32_t* segment_ids;
  const float* active;
  ShardGradList<kCapacity> grads;
};

// Elements are those of one gradient, numbered from its first.
template <typename Grad, typename Out, bool kHasBuffer, typename Params>
struct SgdBody {
  static constexpr bool kHasOut = !std::is_same<Out, NoOutput>::value;

  const Params& params;
  const Grad* grad;
  int64_t offset;    // of the first in the shard
  float grad_scale;  // without the sign: nothing waits for it before the loads are under way
  float found_inf;
  float lr;

  struct Inputs {
    int segment;
    Vector<float> master;
    Vector<float> buffer;  // only where there is one
    Vector<Grad> grad;
  };

  __device__ __forceinline__ int segment_of(int64_t i) const {
    return params.segment_ids != nullptr ? load_now(params.segment_ids + uint64_t(offset + i) / kSegmentGranule) : 0;
  }

  __device__ __forceinline__ bool is_active(int segment) const {
    return found_inf == 0.0f && (params.active == nullptr || params.active[segment] != 0.0f);
  }

  __device__ __forceinline__ bool is_first(int segment) const {
    return params.step != nullptr ? params.step[segment] == 1.0f : params.is_first;
  }

  __device__ __forceinline__ Inputs load(int64_t i) const {
    const int64_t at = offset + i;
    Inputs in;
    in.segment = segment_of(i);
    in.master = load_vector(params.master + at);
    if constexpr (kHasBuffer) in.buffer = load_vector(params.momentum_buffer + at);
    in.grad = load_vector(grad + i);
    return in;
  }

  __device__ __forceinline__ SgdState updated(SgdState before, Grad value, bool first) const {
    return sgd_element<kHasBuffer>(before, to_float(value), grad_scale * params.sign, params.coefficients, lr, first);
  }

  // A vector never straddles two segments: kSegmentGranule is a multiple of its size, and with segments there is no
  // head.
  __device__ __forceinline__ void finish(int64_t i, Inputs& in) const {
    if (!is_active(in.segment)) return;
    const bool first = kHasBuffer && is_first(in.segment);
    Vector<typename std::conditional<kHasOut, Out, float>::type> out;

#pragma unroll
    for (int k = 0; k < out.kSize; ++k) {
      const SgdState before{in.master.x[k], kHasBuffer ? in.buffer.x[k] : 0.0f};
      const SgdState now = updated(before, in.grad.x[k], first);
      in.master.x[k] = now.master;
      if constexpr (kHasBuffer) in.buffer.x[k] = now.momentum_buffer;
      if constexpr (kHasOut) out.x[k] = from_float<Out>(now.master);
    }

    const int64_t at = offset + i;
    store_vector(params.master + at, in.master);
    if constexpr (kHasBuffer) store_vector(params.momentum_buffer + at, in.buffer);
    if constexpr (kHasOut) {
      for_each_out<Out>(params.param_outs, [&](Out* weights) { store_vector(weights + at, out); });
    }
  }

  __device__ __forceinline__ void element(int64_t i) const {
    const int segment = segment_of(i);
    if (!is_active(segment)) return;
    const int64_t at = offset + i;
    const SgdState before{params.master[at], kHasBuffer ? params.momentum_buffer[at] : 0.0f};

    const SgdState now = updated(before, grad[i], kHasBuffer && is_first(segment));

    params.master[at] = now.master;
    if constexpr (kHasBuffer) params.momentum_buffer[at] = now.momentum_buffer;
    if constexpr (kHasOut) {
      const Out out = from_float<Out>(now.master);
      for_each_out<Out>(params.param_outs, [&](Out* weights) { weights[at] = out; });
    }
  }
};

constexpr int kSgdUnroll = 2;  // four loads of 16 bytes under way, or two without a buffer, and two of the gradients

// Bytes per element: 8 read + 8 written of state, half without a buffer, gradient read, each param_out written: 20 with
// bf16 in and out. Where found_inf is set, what was read is dropped, as in adam.cu.
template <typename Grad, typename Out, bool kHasBuffer, int kCapacity>
__global__ void __launch_bounds__(kUpdateThreads, kUpdateMinBlocks)
    sgd_kernel(const __grid_constant__ SgdParams<kCapacity> params) {
  const float found_inf = params.found_inf != nullptr ? load_now(params.found_inf) : 0.0f;
  unsigned chunk;
  const ShardGrad& grad = find_grad(params.grads, chunk);
  const SgdBody<Grad, Out, kHasBuffer, SgdParams<kCapacity>> body{params,
                                                                  static_cast<const Grad*>(grad.data),
                                                                  kCapacity == 1 ? 0 : grad.offset,
                                                                  read(params.grad_scale),
                                                                  found_inf,
                                                                  read(params.lr)};
  visit_chunk<kSgdUnroll, kWidth<float>, kUpdateThreads>(grad.span, chunk, body);
}

template <int kCapacity>
using Kernel = void (*)(SgdParams<kCapacity>);

template <typename Grad, typename Out, int kCapacity>
Kernel<kCapacity> pick(bool has_buffer) {
  return has_buffer ? sgd_kernel<Grad, Out, true, kCapacity> : sgd_kernel<Grad, Out, false, kCapacity>;
}

template <typename Grad, int kCapacity>
Kernel<kCapacity> pick(const ParamOuts& param_outs, bool has_buffer) {
  if (param_outs.count == 0) return pick<Grad, NoOutput, kCapacity>(has_buffer);
  switch (param_outs.dtype()) {
    case DType::kFloat32:
      return pick<Grad, float, kCapacity>(has_buffer);
    case DType::kBFloat16:
      return pick<Grad, BFloat16, kCapacity>(has_buffer);
    default:
      return pick<Grad, Float16, kCapacity>(has_buffer);
  }
}

template <int kCapacity>
Kernel<kCapacity> pick(const SgdArgs& args) {
  const bool has_buffer = args.momentum_buffer != nullptr;
  switch (args.grads.dtype()) {
    case DType::kFloat32:
      return pick<float, kCapacity>(args.param_outs, has_buffer);
    case DType::kBFloat16:
      return pick<BFloat16, kCapacity>(args.param_outs, has_buffer);
    default:
      return pick<Float16, kCapacity>(args.param_outs, has_buffer);
  }
}

std::vector<Operand> operands_of(const SgdArgs& args) {
  std::vector<Operand> operands{Operand{args.master, DType::kFloat32}};
  if (args.momentum_buffer != nullptr) operands.push_back(Operand{args.momentum_buffer, DType::kFloat32});
  add_operands(args.param_outs, operands);
  return operands;
}

template <int kCapacity>
void launch_sgd(const SgdArgs& args, cudaStream_t stream) {
  SgdParams<kCapacity> params;
  params.master = args.master;
  params.momentum_buffer = args.momentum_buffer;
  params.param_outs = param_pointers(args.param_outs);
  params.coefficients = sgd_coefficients(args.hyper);
  params.lr = device_scalar(args.lr);
  params.is_first = args.step.value == 1.0;
  params.step = args.step.device;
  params.grad_scale = device_scalar(args.grad_scale);
  params.sign = args.hyper.maximize ? -1.0f : 1.0f;
  params.found_inf = args.found_inf;
  params.segment_ids = args.segment_ids;
  params.active = args.active;
  for_each_launch(args.grads, operands_of(args), kUpdateChunk<kSgdUnroll>, params.grads,
                  [&](int num_blocks) { launch(pick<kCapacity>(args), params, num_blocks, stream, kUpdateThreads); });
}

}  // namespace

void sgd(const SgdArgs& args, cudaStream_t stream) {
  if (args.numel == 0 || args.grads.tensors.empty()) return;
  if (args.grads.is_whole()) {
    launch_sgd<1>(args, stream);
  } else {
    launch_sgd<kManyGrads>(args, stream);
  }
}

}  // namespace cuda
}  // namespace pyzero
