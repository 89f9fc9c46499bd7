// adam_: one pass over a flat shard, and the step-wide constants before it where only the device knows lr or step.
#include <type_traits>

#include "../math/adam.h"
#include "param_outs.cuh"
#include "shard_grads.cuh"

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

// One thread per segment. Bytes: 4 + 12 per segment.
__global__ void __launch_bounds__(kThreads) adam_constants_kernel(const __grid_constant__ ConstantsParams params) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.num_segments) return;
  const double lr = params.lr_device != nullptr ? double(*params.lr_device) : params.lr;
  const double step = params.step_device != nullptr ? double(params.step_device[i]) : params.step;
  params.table[i] = adam_constants(params.hyper, lr, static_cast<long long>(step));
}

template <int kCapacity>
struct AdamParams {
  float* master;
  float* exp_avg;
  float* exp_avg_sq;
  ParamPointers param_outs;
  AdamCoefficients coefficients;
  AdamConstants constants;
  const AdamConstants* table;  // (num_segments,), or null: `constants` are everyone's
  DeviceScalar grad_scale;
  float sign;  // -1 to maximize
  const float* found_inf;
  const int32_t* segment_ids;
  const float* active;
  ShardGradList<kCapacity> grads;
};

// Elements are those of one gradient, numbered from its first.
template <typename Grad, typename Out, bool kCoupled, typename Params>
struct AdamBody {
  static constexpr bool kHasOut = !std::is_same<Out, NoOutput>::value;

  const Params& params;
  const Grad* grad;
  int64_t offset;    // of the first in the shard
  float grad_scale;  // without the sign: nothing waits for it before the loads are under way
  float found_inf;

  struct Inputs {
    int segment;
    Vector<float> master;
    Vector<float> exp_avg;
    Vector<float> exp_avg_sq;
    Vector<Grad> grad;
  };

  __device__ __forceinline__ int segment_of(int64_t i) const {
    return params.segment_ids != nullptr ? load_now(params.segment_ids + uint64_t(offset + i) / kSegmentGranule) : 0;
  }

  __device__ __forceinline__ bool is_active(int segment) const {
    return found_inf == 0.0f && (params.active == nullptr || params.active[segment] != 0.0f);
  }

  __device__ __forceinline__ AdamConstants constants_of(int segment) const {
    return params.table != nullptr ? params.table[segment] : params.constants;
  }

  __device__ __forceinline__ Inputs load(int64_t i) const {
    const int64_t at = offset + i;
    return Inputs{segment_of(i), load_vector(params.master + at), load_vector(params.exp_avg + at),
                  load_vector(params.exp_avg_sq + at), load_vector(grad + i)};
  }

  // A vector never straddles two segments: kSegmentGranule is a multiple of its size, and with segments there is no
  // head.
  __device__ __forceinline__ void finish(int64_t i, Inputs& in) const {
    if (!is_active(in.segment)) return;
    const AdamConstants constants = constants_of(in.segment);
    Vector<typename std::conditional<kHasOut, Out, float>::type> out;

#pragma unroll
    for (int k = 0; k < out.kSize; ++k) {
      const AdamState now =
          adam_element<kCoupled>(AdamState{in.master.x[k], in.exp_avg.x[k], in.exp_avg_sq.x[k]}, to_float(in.grad.x[k]),
                                 grad_scale * params.sign, params.coefficients, constants);
      in.master.x[k] = now.master;
      in.exp_avg.x[k] = now.exp_avg;
      in.exp_avg_sq.x[k] = now.exp_avg_sq;
      if constexpr (kHasOut) out.x[k] = from_float<Out>(now.master);
    }

    const int64_t at = offset + i;
    store_vector(params.master + at, in.master);
    store_vector(params.exp_avg + at, in.exp_avg);
    store_vector(params.exp_avg_sq + at, in.exp_avg_sq);
    if constexpr (kHasOut) {
      for_each_out<Out>(params.param_outs, [&](Out* weights) { store_vector(weights + at, out); });
    }
  }

  __device__ __forceinline__ void element(int64_t i) const {
    const int segment = segment_of(i);
    if (!is_active(segment)) return;
    const int64_t at = offset + i;
    const AdamState before{params.master[at], params.exp_avg[at], params.exp_avg_sq[at]};

    const AdamState now = adam_element<kCoupled>(before, to_float(grad[i]), grad_scale * params.sign,
                                                 params.coefficients, constants_of(segment));

    params.master[at] = now.master;
    params.exp_avg[at] = now.exp_avg;
    params.exp_avg_sq[at] = now.exp_avg_sq;
    if constexpr (kHasOut) {
      const Out out = from_float<Out>(now.master);
      for_each_out<Out>(params.param_outs, [&](Out* weights) { weights[at] = out; });
    }
  }
};

constexpr int kAdamUnroll = 2;  // six loads of 16 bytes under way, and two of the gradients

// Bytes per element: 12 read + 12 written of state, gradient read, each param_out written: 28 with bf16 in and out.
// Where found_inf is set, what was read is dropped: to wait for it first would cost every other step.
template <typename Grad, typename Out, bool kCoupled, int kCapacity>
__global__ void __launch_bounds__(kUpdateThreads, kUpdateMinBlocks)
    adam_kernel(const __grid_constant__ AdamParams<kCapacity> params) {
  const float found_inf = params.found_inf != nullptr ? load_now(params.found_inf) : 0.0f;
  unsigned chunk;
  const ShardGrad& grad = find_grad(params.grads, chunk);
  const AdamBody<Grad, Out, kCoupled, AdamParams<kCapacity>> body{params, static_cast<const Grad*>(grad.data),
                                                                  kCapacity == 1 ? 0 : grad.offset,
                                                                  read(params.grad_scale), found_inf};
  visit_chunk<kAdamUnroll, kWidth<float>, kUpdateThreads>(grad.span, chunk, body);
}

template <int kCapacity>
using Kernel = void (*)(AdamParams<kCapacity>);

template <typename Grad, typename Out, int kCapacity>
Kernel<kCapacity> pick(bool coupled) {
  return coupled ? adam_kernel<Grad, Out, true, kCapacity> : adam_kernel<Grad, Out, false, kCapacity>;
}

template <typename Grad, int kCapacity>
Kernel<kCapacity> pick(const ParamOuts& param_outs, bool coupled) {
  if (param_outs.count == 0) return pick<Grad, NoOutput, kCapacity>(coupled);
  switch (param_outs.dtype()) {
    case DType::kFloat32:
      return pick<Grad, float, kCapacity>(coupled);
    case DType::kBFloat16:
      return pick<Grad, BFloat16, kCapacity>(coupled);
    default:
      return pick<Grad, Float16, kCapacity>(coupled);
  }
}

template <int kCapacity>
Kernel<kCapacity> pick(const AdamArgs& args) {
  const bool coupled = adam_is_coupled(args.hyper);
  switch (args.grads.dtype()) {
    case DType::kFloat32:
      return pick<float, kCapacity>(args.param_outs, coupled);
    case DType::kBFloat16:
      return pick<BFloat16, kCapacity>(args.param_outs, coupled);
    default:
      return pick<Float16, kCapacity>(args.param_outs, coupled);
  }
}

std::vector<Operand> operands_of(const AdamArgs& args) {
  std::vector<Operand> operands{Operand{args.master, DType::kFloat32}, Operand{args.exp_avg, DType::kFloat32},
                                Operand{args.exp_avg_sq, DType::kFloat32}};
  add_operands(args.param_outs, operands);
  return operands;
}

void fill_constants(const AdamArgs& args, AdamConstants* table, cudaStream_t stream) {
  const ConstantsParams params{args.hyper,       args.lr.value, args.step.value,  args.lr.device,
                               args.step.device, table,         args.num_segments};
  launch(adam_constants_kernel, params, int((args.num_segments + kThreads - 1) / kThreads), stream);
}

template <int kCapacity>
void launch_adam(const AdamArgs& args, const AdamConstants* table, cudaStream_t stream) {
  AdamParams<kCapacity> params;
  params.master = args.master;
  params.exp_avg = args.exp_avg;
  params.exp_avg_sq = args.exp_avg_sq;
  params.param_outs = param_pointers(args.param_outs);
  params.coefficients = adam_coefficients(args.hyper);
  params.constants = AdamConstants{};
  if (!table) params.constants = adam_constants(args.hyper, args.lr.value, static_cast<long long>(args.step.value));
  params.table = table;
  params.grad_scale = device_scalar(args.grad_scale);
  params.sign = args.hyper.maximize ? -1.0f : 1.0f;
  params.found_inf = args.found_inf;
  params.segment_ids = args.segment_ids;
  params.active = args.active;
  for_each_launch(args.grads, operands_of(args), kUpdateChunk<kAdamUnroll>, params.grads,
                  [&](int num_blocks) { launch(pick<kCapacity>(args), params, num_blocks, stream, kUpdateThreads); });
}

}  // namespace

void adam(const AdamArgs& args, AdamConstants* constants, cudaStream_t stream) {
  if (args.numel == 0 || args.grads.tensors.empty()) return;
  const bool on_device = args.lr.device != nullptr || args.step.device != nullptr;
  if (on_device) fill_constants(args, constants, stream);
  const AdamConstants* table = on_device ? constants : nullptr;
  if (args.grads.is_whole()) {
    launch_adam<1>(args, table, stream);
  } else {
    launch_adam<kManyGrads>(args, table, stream);
  }
}

}  // namespace cuda
}  // namespace pyzero
