// pack_: the gradients of one bucket into its flat buffer, scaled and cast, in one launch.
#include "tensor_list.cuh"

namespace pyzero {
namespace cuda {
namespace {

// Bytes per element: its size in the gradient read, its size in the bucket written: 4 from bf16 to bf16.
template <typename Out>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ ListParams params) {
  const NoStats none;
  const float scale = read(params.scale);
  for_each_chunk(params, [&](const ListItem& item, int64_t chunk) {
    switch (item.dtype) {
      case DType::kFloat32:
        return visit_list_chunk(item, chunk, ScaleBody<float, Out, const NoStats>{item, scale, none});
      case DType::kBFloat16:
        return visit_list_chunk(item, chunk, ScaleBody<BFloat16, Out, const NoStats>{item, scale, none});
      default:
        return visit_list_chunk(item, chunk, ScaleBody<Float16, Out, const NoStats>{item, scale, none});
    }
  });
}

ListKernel pick(DType bucket) {
  switch (bucket) {
    case DType::kFloat32:
      return pack_kernel<float>;
    case DType::kBFloat16:
      return pack_kernel<BFloat16>;
    default:
      return pack_kernel<Float16>;
  }
}

}  // namespace

void pack(const PackArgs& args, cudaStream_t stream) {
  ListLauncher list(pick(args.bucket.dtype), args.scale, GradStats{}, nullptr, stream);
  for (size_t i = 0; i < args.tensors.size(); ++i) {
    char* target = static_cast<char*>(args.bucket.data) + args.offsets[i] * element_size(args.bucket.dtype);
    list.add(args.tensors[i], target, args.bucket.dtype);
  }
  list.flush();
}

}  // namespace cuda
}  // namespace pyzero
