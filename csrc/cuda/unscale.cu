// unscale_ scales, rounds, checks and squares each value of a list of gradients, in place and in one pass.
#include "tensor_list.cuh"

namespace pyzero {
namespace cuda {
namespace {

// Bytes per element: its size read and written. For bf16: 4.
__global__ void __launch_bounds__(kThreads) unscale_kernel(const __grid_constant__ ListParams params) {
  ThreadStats stats{params.grad_stats.partials != nullptr};
  const float scale = read(params.scale);
  for_each_chunk(params, [&](const ListItem& item, int64_t chunk) {
    switch (item.dtype) {
      case DType::kFloat32:
        return visit_list_chunk(item, chunk, ScaleBody<float, float, ThreadStats>{item, scale, stats});
      case DType::kBFloat16:
        return visit_list_chunk(item, chunk, ScaleBody<BFloat16, BFloat16, ThreadStats>{item, scale, stats});
      default:
        return visit_list_chunk(item, chunk, ScaleBody<Float16, Float16, ThreadStats>{item, scale, stats});
    }
  });
  finish_block(stats, params.grad_stats);
}

// For a scale of 1, which changes nothing: tests the bits, or adds the squares, of the loaded values.
template <typename T>
struct CheckBody {
  static constexpr int kElements = kWidth<T>;
  using Inputs = Vector<T, kElements>;

  const ListItem& item;
  ThreadStats& stats;

  __device__ __forceinline__ const T* source() const { return static_cast<const T*>(item.source); }
  __device__ __forceinline__ Inputs load(int64_t i) const { return load_vector<kElements>(source() + i); }
  __device__ __forceinline__ void finish(int64_t, const Inputs& in) const { stats.add(in); }
  __device__ __forceinline__ void element(int64_t i) const { stats.add(source()[i]); }
};

// Bytes per element: its size read. For bf16: 2.
__global__ void __launch_bounds__(kThreads) check_kernel(const __grid_constant__ ListParams params) {
  ThreadStats stats{params.grad_stats.partials != nullptr};
  for_each_chunk(params, [&](const ListItem& item, int64_t chunk) {
    switch (item.dtype) {
      case DType::kFloat32:
        return visit_list_chunk(item, chunk, CheckBody<float>{item, stats});
      case DType::kBFloat16:
        return visit_list_chunk(item, chunk, CheckBody<BFloat16>{item, stats});
      default:
        return visit_list_chunk(item, chunk, CheckBody<Float16>{item, stats});
    }
  });
  finish_block(stats, params.grad_stats);
}

}  // namespace

void unscale(const UnscaleArgs& args, double* partials, cudaStream_t stream) {
  const bool read_only = args.inv_scale.device == nullptr && args.inv_scale.value == 1.0;
  ListLauncher list(read_only ? check_kernel : unscale_kernel, args.inv_scale, args.grad_stats, partials, stream);
  for (const Buffer& tensor : args.tensors) {
    list.add(tensor, tensor.data, span_of(tensor.numel, {Operand{tensor.data, tensor.dtype}}));
  }
  list.flush();
}

}  // namespace cuda
}  // namespace pyzero
