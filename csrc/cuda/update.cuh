// Shared by adam_, lion_ and sgd_: one pass over a flat shard. A rule says how an element changes.
#pragma once

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "param_outs.cuh"
#include "shard_grads.cuh"

namespace pyzero {
namespace cuda {

// A rule is a struct among a kernel's parameters, with:
//   kNumStates                                   number of fp32 values per element, the master first
//   Scalars scalars()                            values that may be on the device, read once by each thread
//   constants_of(segment, scalars)               values that the elements of a segment share
//   update(state, grad, grad_scale, constants)   replaces an element's state by the new one
template <typename Rule, int kCapacity>
struct UpdateParams {
  float* states[Rule::kNumStates];
  ParamPointers param_outs;
  Rule rule;
  DeviceScalar grad_scale;
  float sign;  // -1 to maximize
  const float* found_inf;
  const int32_t* segment_ids;
  const float* active;
  ShardGradList<kCapacity> grads;
};

// Calls run(0) to run(N - 1). A loop that nvcc unrolls makes adam_'s kernels up to 16 instructions longer.
template <int N, typename Run>
__device__ __forceinline__ void unrolled(const Run& run) {
  if constexpr (N > 0) {
    unrolled<N - 1>(run);
    run(N - 1);
  }
}

// Elements are numbered from the first one of the gradient.
template <typename Rule, typename Grad, typename Out, typename Params>
struct UpdateBody {
  static constexpr int kNumStates = Rule::kNumStates;
  static constexpr bool kHasOut = !std::is_same<Out, NoOutput>::value;

  const Params& params;
  const Grad* grad;
  int64_t offset;    // in the shard, of the gradient's first element
  float grad_scale;  // without the sign, so that no instruction waits for it before the loads are issued
  float found_inf;
  typename Rule::Scalars scalars;

  struct Inputs {
    int segment;
    Vector<float> states[kNumStates];
    Vector<Grad> grad;
  };

  __device__ __forceinline__ int segment_of(int64_t i) const {
    return params.segment_ids != nullptr ? load_volatile(params.segment_ids + uint64_t(offset + i) / kSegmentGranule)
                                         : 0;
  }

  __device__ __forceinline__ bool is_active(int segment) const {
    return found_inf == 0.0f && (params.active == nullptr || params.active[segment] != 0.0f);
  }

  __device__ __forceinline__ Inputs load(int64_t i) const {
    const int64_t at = offset + i;
    Inputs in;
    in.segment = segment_of(i);
    unrolled<kNumStates>([&](int s) { in.states[s] = load_vector(params.states[s] + at); });
    in.grad = load_vector(grad + i);
    return in;
  }

  // A vector never straddles two segments: kSegmentGranule is a multiple of its size, and spans with segments have no
  // head.
  __device__ __forceinline__ void finish(int64_t i, Inputs& in) const {
    if (!is_active(in.segment)) return;
    const auto constants = params.rule.constants_of(in.segment, scalars);
    Vector<typename std::conditional<kHasOut, Out, float>::type> out;

#pragma unroll
    for (int k = 0; k < out.kSize; ++k) {
      float state[kNumStates];
      unrolled<kNumStates>([&](int s) { state[s] = in.states[s].x[k]; });
      params.rule.update(state, to_float(in.grad.x[k]), grad_scale * params.sign, constants);
      unrolled<kNumStates>([&](int s) { in.states[s].x[k] = state[s]; });
      if constexpr (kHasOut) out.x[k] = from_float<Out>(state[0]);
    }

    const int64_t at = offset + i;
    unrolled<kNumStates>([&](int s) { store_vector(params.states[s] + at, in.states[s]); });
    if constexpr (kHasOut) {
      for_each_out<Out>(params.param_outs, [&](Out* weights) { store_vector(weights + at, out); });
    }
  }

  __device__ __forceinline__ void element(int64_t i) const {
    const int segment = segment_of(i);
    if (!is_active(segment)) return;
    const int64_t at = offset + i;
    float state[kNumStates];
    unrolled<kNumStates>([&](int s) { state[s] = params.states[s][at]; });

    params.rule.update(state, to_float(grad[i]), grad_scale * params.sign, params.rule.constants_of(segment, scalars));

    unrolled<kNumStates>([&](int s) { params.states[s][at] = state[s]; });
    if constexpr (kHasOut) {
      const Out out = from_float<Out>(state[0]);
      for_each_out<Out>(params.param_outs, [&](Out* weights) { weights[at] = out; });
    }
  }
};

// If found_inf is set, the loaded values are dropped. To wait for it before loading would slow down every other step.
template <typename Rule, typename Grad, typename Out, int kCapacity>
__global__ void __launch_bounds__(kUpdateThreads, kUpdateMinBlocks)
    update_kernel(const __grid_constant__ UpdateParams<Rule, kCapacity> params) {
  const float found_inf = params.found_inf != nullptr ? load_volatile(params.found_inf) : 0.0f;
  unsigned chunk;
  const ShardGrad& grad = find_grad(params.grads, chunk);
  using Body = UpdateBody<Rule, Grad, Out, UpdateParams<Rule, kCapacity>>;
  const Body body{params,
                  static_cast<const Grad*>(grad.data),
                  kCapacity == 1 ? 0 : grad.offset,
                  read(params.grad_scale),
                  found_inf,
                  params.rule.scalars()};
  visit_chunk<kUpdateUnroll, kWidth<float>, kUpdateThreads>(grad.span, chunk, body);
}

template <typename Rule, int kCapacity>
using UpdateKernel = void (*)(UpdateParams<Rule, kCapacity>);

template <typename Rule, typename Grad, int kCapacity>
UpdateKernel<Rule, kCapacity> pick(const ParamOuts& param_outs) {
  if (param_outs.count == 0) return update_kernel<Rule, Grad, NoOutput, kCapacity>;
  switch (param_outs.dtype()) {
    case DType::kFloat32:
      return update_kernel<Rule, Grad, float, kCapacity>;
    case DType::kBFloat16:
      return update_kernel<Rule, Grad, BFloat16, kCapacity>;
    default:
      return update_kernel<Rule, Grad, Float16, kCapacity>;
  }
}

template <typename Rule, int kCapacity>
UpdateKernel<Rule, kCapacity> pick(DType grad, const ParamOuts& param_outs) {
  switch (grad) {
    case DType::kFloat32:
      return pick<Rule, float, kCapacity>(param_outs);
    case DType::kBFloat16:
      return pick<Rule, BFloat16, kCapacity>(param_outs);
    default:
      return pick<Rule, Float16, kCapacity>(param_outs);
  }
}

template <int kCapacity, typename Rule, typename Args>
void launch_update(const Rule& rule, float* const (&states)[Rule::kNumStates], const Args& args, cudaStream_t stream) {
  UpdateParams<Rule, kCapacity> params;
  std::copy(std::begin(states), std::end(states), params.states);
  params.param_outs = param_pointers(args.param_outs);
  params.rule = rule;
  params.grad_scale = device_scalar(args.grad_scale);
  params.sign = args.hyper.maximize ? -1.0f : 1.0f;
  params.found_inf = args.found_inf;
  params.segment_ids = args.segment_ids;
  params.active = args.active;

  std::vector<Operand> operands;
  for (const float* state : states) operands.push_back(Operand{state, DType::kFloat32});
  add_operands(args.param_outs, operands);
  const UpdateKernel<Rule, kCapacity> kernel = pick<Rule, kCapacity>(args.grads.dtype(), args.param_outs);
  for_each_launch(args.grads, operands, kUpdateChunk, params.grads,
                  [&](int num_blocks) { launch(kernel, params, num_blocks, stream, kUpdateThreads); });
}

// states: kNumStates arrays of (numel,). Args: the op's subclass of ShardArgs, which has its hyper.
template <typename Rule, typename Args>
void update_shard(const Rule& rule, float* const (&states)[Rule::kNumStates], const Args& args, cudaStream_t stream) {
  if (args.numel == 0 || args.grads.tensors.empty()) return;
  if (args.grads.is_whole()) {
    launch_update<1>(rule, states, args, stream);
  } else {
    launch_update<kManyGrads>(rule, states, args, stream);
  }
}

}  // namespace cuda
}  // namespace pyzero
