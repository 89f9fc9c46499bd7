// unscale_: a list of gradients, in place, each value scaled, rounded, checked and squared in one pass.
#include "tensor_list.cuh"

namespace pyzero {
namespace cuda {
namespace {

// Bytes per element: its size read, and its size written unless kWrite is false: 4 for bf16, 2 to check only.
template <bool kWrite>
__global__ void __launch_bounds__(kThreads, kMinBlocks) unscale_kernel(const __grid_constant__ ListParams params) {
  Stats stats{params.report.partials != nullptr};
  const float scale = read(params.scale);
  for_each_chunk(params, [&](const ListItem& item, int64_t chunk) {
    switch (item.dtype) {
      case DType::kFloat32:
        return scale_chunk<float, float, kWrite>(item, chunk, scale, stats);
      case DType::kBFloat16:
        return scale_chunk<BFloat16, BFloat16, kWrite>(item, chunk, scale, stats);
      default:
        return scale_chunk<Float16, Float16, kWrite>(item, chunk, scale, stats);
    }
  });
  finish_block(stats, params.report);
}

}  // namespace

void unscale(const UnscaleArgs& args, double* partials, cudaStream_t stream) {
  const bool read_only = args.inv_scale.device == nullptr && args.inv_scale.value == 1.0;
  ListLauncher list(read_only ? unscale_kernel<false> : unscale_kernel<true>, args.inv_scale, args.report, partials,
                    stream);
  for (const Buffer& tensor : args.tensors) list.add(tensor, tensor.data, tensor.dtype);
  list.flush();
}

}  // namespace cuda
}  // namespace pyzero
