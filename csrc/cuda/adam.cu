// adam_: one pass over a flat shard, and the step-wide constants before it where only the device knows lr or step.
#include <type_traits>

#include "../math/adam.h"
#include "launch.cuh"
#include "vector_io.cuh"

namespace pyzero {
namespace cuda {
namespace {

struct NoOutput {};  // instead of param_out's type

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

struct AdamParams {
  float* master;
  float* exp_avg;
  float* exp_avg_sq;
  const void* grad;
  void* param_out;
  Span span;
  AdamCoefficients coefficients;
  AdamConstants constants;
  const AdamConstants* table;  // (num_segments,), or null: `constants` are everyone's
  DeviceScalar grad_scale;
  float sign;  // -1 to maximize
  const float* found_inf;
  const int32_t* segment_ids;
  const float* active;
};

template <typename Grad, typename Out, bool kCoupled>
struct AdamBody {
  static constexpr bool kHasOut = !std::is_same<Out, NoOutput>::value;

  const AdamParams& params;
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
    return params.segment_ids != nullptr ? load_now(params.segment_ids + uint64_t(i) / kSegmentGranule) : 0;
  }

  __device__ __forceinline__ bool is_active(int segment) const {
    return found_inf == 0.0f && (params.active == nullptr || params.active[segment] != 0.0f);
  }

  __device__ __forceinline__ AdamConstants constants_of(int segment) const {
    return params.table != nullptr ? params.table[segment] : params.constants;
  }

  __device__ __forceinline__ Inputs load(int64_t i) const {
    return Inputs{segment_of(i), load_vector(params.master + i), load_vector(params.exp_avg + i),
                  load_vector(params.exp_avg_sq + i), load_vector(static_cast<const Grad*>(params.grad) + i)};
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

    store_vector(params.master + i, in.master);
    store_vector(params.exp_avg + i, in.exp_avg);
    store_vector(params.exp_avg_sq + i, in.exp_avg_sq);
    if constexpr (kHasOut) store_vector(static_cast<Out*>(params.param_out) + i, out);
  }

  __device__ __forceinline__ void element(int64_t i) const {
    const int segment = segment_of(i);
    if (!is_active(segment)) return;
    const AdamState before{params.master[i], params.exp_avg[i], params.exp_avg_sq[i]};
    const float grad = to_float(static_cast<const Grad*>(params.grad)[i]);

    const AdamState now =
        adam_element<kCoupled>(before, grad, grad_scale * params.sign, params.coefficients, constants_of(segment));

    params.master[i] = now.master;
    params.exp_avg[i] = now.exp_avg;
    params.exp_avg_sq[i] = now.exp_avg_sq;
    if constexpr (kHasOut) static_cast<Out*>(params.param_out)[i] = from_float<Out>(now.master);
  }
};

constexpr int kAdamUnroll = 2;  // six loads of 16 bytes under way, and two of the gradients

// Bytes per element: 12 read + 12 written of state, gradient read, param_out written: 28 with bf16 in and out. Where
// found_inf is set, what was read is dropped: to wait for it first would cost every other step.
template <typename Grad, typename Out, bool kCoupled>
__global__ void __launch_bounds__(kThreads, kMinBlocks) adam_kernel(const __grid_constant__ AdamParams params) {
  const float found_inf = params.found_inf != nullptr ? load_now(params.found_inf) : 0.0f;
  const AdamBody<Grad, Out, kCoupled> body{params, read(params.grad_scale), found_inf};
  visit_chunk<kAdamUnroll>(params.span, blockIdx.x, body);
}

using Kernel = void (*)(AdamParams);

template <typename Grad, typename Out>
Kernel pick(bool coupled) {
  return coupled ? Kernel(adam_kernel<Grad, Out, true>) : Kernel(adam_kernel<Grad, Out, false>);
}

template <typename Grad>
Kernel pick(const Buffer& param_out, bool coupled) {
  if (param_out.data == nullptr) return pick<Grad, NoOutput>(coupled);
  switch (param_out.dtype) {
    case DType::kFloat32:
      return pick<Grad, float>(coupled);
    case DType::kBFloat16:
      return pick<Grad, BFloat16>(coupled);
    default:
      return pick<Grad, Float16>(coupled);
  }
}

Kernel pick(const AdamArgs& args) {
  const bool coupled = adam_is_coupled(args.hyper);
  switch (args.grad.dtype) {
    case DType::kFloat32:
      return pick<float>(args.param_out, coupled);
    case DType::kBFloat16:
      return pick<BFloat16>(args.param_out, coupled);
    default:
      return pick<Float16>(args.param_out, coupled);
  }
}

Span adam_span(const AdamArgs& args) {
  const Operand master{args.master, DType::kFloat32};
  const Operand out = args.param_out.data != nullptr ? Operand{args.param_out.data, args.param_out.dtype} : master;
  return span_of(args.numel, {master, Operand{args.exp_avg, DType::kFloat32}, Operand{args.exp_avg_sq, DType::kFloat32},
                              Operand{args.grad.data, args.grad.dtype}, out});
}

void fill_constants(const AdamArgs& args, AdamConstants* table, cudaStream_t stream) {
  const ConstantsParams params{args.hyper,       args.lr.value, args.step.value,  args.lr.device,
                               args.step.device, table,         args.num_segments};
  launch(adam_constants_kernel, params, int((args.num_segments + kThreads - 1) / kThreads), stream);
}

}  // namespace

void adam(const AdamArgs& args, AdamConstants* constants, cudaStream_t stream) {
  if (args.numel == 0) return;
  const bool on_device = args.lr.device != nullptr || args.step.device != nullptr;
  if (on_device) fill_constants(args, constants, stream);

  AdamParams params{};
  params.master = args.master;
  params.exp_avg = args.exp_avg;
  params.exp_avg_sq = args.exp_avg_sq;
  params.grad = args.grad.data;
  params.param_out = args.param_out.data;
  params.span = adam_span(args);
  params.coefficients = adam_coefficients(args.hyper);
  if (!on_device) params.constants = adam_constants(args.hyper, args.lr.value, static_cast<long long>(args.step.value));
  params.table = on_device ? constants : nullptr;
  params.grad_scale = device_scalar(args.grad_scale);
  params.sign = args.hyper.maximize ? -1.0f : 1.0f;
  params.found_inf = args.found_inf;
  params.segment_ids = args.segment_ids;
  params.active = args.active;
  launch(pick(args), params, int(num_chunks(params.span, kChunk<kAdamUnroll>)), stream);
}

}  // namespace cuda
}  // namespace pyzero
