// lion_: one pass over a flat shard.
#include <type_traits>

#include "../math/lion.h"
#include "launch.cuh"
#include "vector_io.cuh"

namespace pyzero {
namespace cuda {
namespace {

struct NoOutput {};  // instead of param_out's type

struct LionParams {
  float* master;
  float* exp_avg;
  const void* grad;
  void* param_out;
  Span span;
  LionHyper hyper;
  LionCoefficients coefficients;
  LionConstants constants;  // where lr is a number
  const float* lr_device;
  DeviceScalar grad_scale;
  float sign;  // -1 to maximize
  const float* found_inf;
  const int32_t* segment_ids;
  const float* active;
};

template <typename Grad, typename Out>
struct LionBody {
  static constexpr bool kHasOut = !std::is_same<Out, NoOutput>::value;

  const LionParams& params;
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
    return params.segment_ids != nullptr ? load_now(params.segment_ids + uint64_t(i) / kSegmentGranule) : 0;
  }

  __device__ __forceinline__ bool is_active(int segment) const {
    return found_inf == 0.0f && (params.active == nullptr || params.active[segment] != 0.0f);
  }

  __device__ __forceinline__ Inputs load(int64_t i) const {
    return Inputs{segment_of(i), load_vector(params.master + i), load_vector(params.exp_avg + i),
                  load_vector(static_cast<const Grad*>(params.grad) + i)};
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

    store_vector(params.master + i, in.master);
    store_vector(params.exp_avg + i, in.exp_avg);
    if constexpr (kHasOut) store_vector(static_cast<Out*>(params.param_out) + i, out);
  }

  __device__ __forceinline__ void element(int64_t i) const {
    if (!is_active(segment_of(i))) return;
    const LionState before{params.master[i], params.exp_avg[i]};
    const float grad = to_float(static_cast<const Grad*>(params.grad)[i]);

    const LionState now = lion_element(before, grad, grad_scale * params.sign, params.coefficients, constants);

    params.master[i] = now.master;
    params.exp_avg[i] = now.exp_avg;
    if constexpr (kHasOut) static_cast<Out*>(params.param_out)[i] = from_float<Out>(now.master);
  }
};

constexpr int kLionUnroll = 2;  // four loads of 16 bytes under way, and two of the gradients

// Bytes per element: 8 read + 8 written of state, gradient read, param_out written: 20 with bf16 in and out. Where
// found_inf is set, what was read is dropped, as in adam.cu.
template <typename Grad, typename Out>
__global__ void __launch_bounds__(kThreads, kMinBlocks) lion_kernel(const __grid_constant__ LionParams params) {
  const float found_inf = params.found_inf != nullptr ? load_now(params.found_inf) : 0.0f;
  const LionConstants constants =
      params.lr_device != nullptr ? lion_constants(params.hyper, double(*params.lr_device)) : params.constants;
  const LionBody<Grad, Out> body{params, read(params.grad_scale), found_inf, constants};
  visit_chunk<kLionUnroll>(params.span, blockIdx.x, body);
}

using Kernel = void (*)(LionParams);

template <typename Grad>
Kernel pick(const Buffer& param_out) {
  if (param_out.data == nullptr) return lion_kernel<Grad, NoOutput>;
  switch (param_out.dtype) {
    case DType::kFloat32:
      return lion_kernel<Grad, float>;
    case DType::kBFloat16:
      return lion_kernel<Grad, BFloat16>;
    default:
      return lion_kernel<Grad, Float16>;
  }
}

Kernel pick(const LionArgs& args) {
  switch (args.grad.dtype) {
    case DType::kFloat32:
      return pick<float>(args.param_out);
    case DType::kBFloat16:
      return pick<BFloat16>(args.param_out);
    default:
      return pick<Float16>(args.param_out);
  }
}

Span lion_span(const LionArgs& args) {
  const Operand master{args.master, DType::kFloat32};
  const Operand out = args.param_out.data != nullptr ? Operand{args.param_out.data, args.param_out.dtype} : master;
  return span_of(args.numel,
                 {master, Operand{args.exp_avg, DType::kFloat32}, Operand{args.grad.data, args.grad.dtype}, out});
}

}  // namespace

void lion(const LionArgs& args, cudaStream_t stream) {
  if (args.numel == 0) return;
  LionParams params{};
  params.master = args.master;
  params.exp_avg = args.exp_avg;
  params.grad = args.grad.data;
  params.param_out = args.param_out.data;
  params.span = lion_span(args);
  params.hyper = args.hyper;
  params.coefficients = lion_coefficients(args.hyper);
  params.constants = lion_constants(args.hyper, args.lr.value);
  params.lr_device = args.lr.device;
  params.grad_scale = device_scalar(args.grad_scale);
  params.sign = args.hyper.maximize ? -1.0f : 1.0f;
  params.found_inf = args.found_inf;
  params.segment_ids = args.segment_ids;
  params.active = args.active;
  launch(pick(args), params, int(num_chunks(params.span, kChunk<kLionUnroll>)), stream);
}

}  // namespace cuda
}  // namespace pyzero
