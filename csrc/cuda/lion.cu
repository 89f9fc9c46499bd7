// lion_: one pass over a flat shard.
#include <type_traits>

#include "../math/lion.h"
#include "param_outs.cuh"
#include "shard_grads.cuh"

namespace pyzero {
namespace cuda {
namespace {

template <int kCapacity>
struct LionParams {
  float* master;
  float* exp_avg;
  ParamPointers param_outs;
  LionHyper hyper;
  LionCoefficients coefficients;
  LionConstants constants;  // where lr is a number
  const float* lr_device;
  DeviceScalar grad_scale;
  float sign;  // -1 to maximize
  const float* found_inf;
  const int32_t* segment_ids;
  const float* active;
  ShardGradList<kCapacity> grads;
};

// Elements are those of one gradient, numbered from its first.
template <typename Grad, typename Out, typename Params>
struct LionBody {
  static constexpr bool kHasOut = !std::is_same<Out, NoOutput>::value;

  const Params& params;
  const Grad* grad;
  int64_t offset;    // of the first in the shard
  float grad_scale;  // without the sign: nothing waits for it before the loads are under way
  float found_inf;
  LionConstants constants;

  struct Inputs {
    int segment;
    Vector<float> master;
    Vector<float> exp_avg;
    Vector<Grad> grad;
  };

  __device__ __forceinline__ int segment_of(int64_t i) const {
    return params.segment_ids != nullptr ? load_now(params.segment_ids + uint64_t(offset + i) / kSegmentGranule) : 0;
  }

  __device__ __forceinline__ bool is_active(int segment) const {
    return found_inf == 0.0f && (params.active == nullptr || params.active[segment] != 0.0f);
  }

  __device__ __forceinline__ Inputs load(int64_t i) const {
    const int64_t at = offset + i;
    return Inputs{segment_of(i), load_vector(params.master + at), load_vector(params.exp_avg + at),
                  load_vector(grad + i)};
  }

  // A vector never straddles two segments: kSegmentGranule is a multiple of its size, and with segments there is no
  // head.
  __device__ __forceinline__ void finish(int64_t i, Inputs& in) const {
    if (!is_active(in.segment)) return;
    Vector<typename std::conditional<kHasOut, Out, float>::type> out;

#pragma unroll
    for (int k = 0; k < out.kSize; ++k) {
      const LionState now = lion_element(LionState{in.master.x[k], in.exp_avg.x[k]}, to_float(in.grad.x[k]),
                                         grad_scale * params.sign, params.coefficients, constants);
      in.master.x[k] = now.master;
      in.exp_avg.x[k] = now.exp_avg;
      if constexpr (kHasOut) out.x[k] = from_float<Out>(now.master);
    }

    const int64_t at = offset + i;
    store_vector(params.master + at, in.master);
    store_vector(params.exp_avg + at, in.exp_avg);
    if constexpr (kHasOut) {
      for_each_out<Out>(params.param_outs, [&](Out* weights) { store_vector(weights + at, out); });
    }
  }

  __device__ __forceinline__ void element(int64_t i) const {
    if (!is_active(segment_of(i))) return;
    const int64_t at = offset + i;
    const LionState before{params.master[at], params.exp_avg[at]};

    const LionState now =
        lion_element(before, to_float(grad[i]), grad_scale * params.sign, params.coefficients, constants);

    params.master[at] = now.master;
    params.exp_avg[at] = now.exp_avg;
    if constexpr (kHasOut) {
      const Out out = from_float<Out>(now.master);
      for_each_out<Out>(params.param_outs, [&](Out* weights) { weights[at] = out; });
    }
  }
};

constexpr int kLionUnroll = 2;  // four loads of 16 bytes under way, and two of the gradients

// Bytes per element: 8 read + 8 written of state, gradient read, each param_out written: 20 with bf16 in and out. Where
// found_inf is set, what was read is dropped, as in adam.cu.
template <typename Grad, typename Out, int kCapacity>
__global__ void __launch_bounds__(kUpdateThreads, kUpdateMinBlocks)
    lion_kernel(const __grid_constant__ LionParams<kCapacity> params) {
  const float found_inf = params.found_inf != nullptr ? load_now(params.found_inf) : 0.0f;
  const LionConstants constants =
      params.lr_device != nullptr ? lion_constants(params.hyper, double(*params.lr_device)) : params.constants;
  unsigned chunk;
  const ShardGrad& grad = find_grad(params.grads, chunk);
  const LionBody<Grad, Out, LionParams<kCapacity>> body{params,
                                                        static_cast<const Grad*>(grad.data),
                                                        kCapacity == 1 ? 0 : grad.offset,
                                                        read(params.grad_scale),
                                                        found_inf,
                                                        constants};
  visit_chunk<kLionUnroll, kWidth<float>, kUpdateThreads>(grad.span, chunk, body);
}

template <int kCapacity>
using Kernel = void (*)(LionParams<kCapacity>);

template <typename Grad, int kCapacity>
Kernel<kCapacity> pick(const ParamOuts& param_outs) {
  if (param_outs.count == 0) return lion_kernel<Grad, NoOutput, kCapacity>;
  switch (param_outs.dtype()) {
    case DType::kFloat32:
      return lion_kernel<Grad, float, kCapacity>;
    case DType::kBFloat16:
      return lion_kernel<Grad, BFloat16, kCapacity>;
    default:
      return lion_kernel<Grad, Float16, kCapacity>;
  }
}

template <int kCapacity>
Kernel<kCapacity> pick(const LionArgs& args) {
  switch (args.grads.dtype()) {
    case DType::kFloat32:
      return pick<float, kCapacity>(args.param_outs);
    case DType::kBFloat16:
      return pick<BFloat16, kCapacity>(args.param_outs);
    default:
      return pick<Float16, kCapacity>(args.param_outs);
  }
}

std::vector<Operand> operands_of(const LionArgs& args) {
  std::vector<Operand> operands{Operand{args.master, DType::kFloat32}, Operand{args.exp_avg, DType::kFloat32}};
  add_operands(args.param_outs, operands);
  return operands;
}

template <int kCapacity>
void launch_lion(const LionArgs& args, cudaStream_t stream) {
  LionParams<kCapacity> params;
  params.master = args.master;
  params.exp_avg = args.exp_avg;
  params.param_outs = param_pointers(args.param_outs);
  params.hyper = args.hyper;
  params.coefficients = lion_coefficients(args.hyper);
  params.constants = lion_constants(args.hyper, args.lr.value);
  params.lr_device = args.lr.device;
  params.grad_scale = device_scalar(args.grad_scale);
  params.sign = args.hyper.maximize ? -1.0f : 1.0f;
  params.found_inf = args.found_inf;
  params.segment_ids = args.segment_ids;
  params.active = args.active;
  for_each_launch(args.grads, operands_of(args), kUpdateChunk<kLionUnroll>, params.grads,
                  [&](int num_blocks) { launch(pick<kCapacity>(args), params, num_blocks, stream, kUpdateThreads); });
}

}  // namespace

void lion(const LionArgs& args, cudaStream_t stream) {
  if (args.numel == 0 || args.grads.tensors.empty()) return;
  if (args.grads.is_whole()) {
    launch_lion<1>(args, stream);
  } else {
    launch_lion<kManyGrads>(args, stream);
  }
}

}  // namespace cuda
}  // namespace pyzero
