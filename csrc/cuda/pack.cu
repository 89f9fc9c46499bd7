// pack_: the gradients of one bucket into its flat buffer, scaled and cast, in one launch.
#include "tensor_list.cuh"

namespace pyzero {
namespace cuda {
namespace {

// Where no vector is aligned in both the gradient and the bucket, elements go alone, as many of them at a time.
template <typename In, typename Out>
__device__ __forceinline__ void pack_chunk(const ListItem& item, int64_t chunk, float scale) {
  const NoStats none;
  if (item.span.vectors) {
    visit_list_chunk(item, chunk, ScaleBody<In, Out, const NoStats>{item, scale, none});
  } else {
    visit_list_chunk(item, chunk, ScaleBody<In, Out, const NoStats, 1>{item, scale, none});
  }
}

// Bytes per element: its size in the gradient read, its size in the bucket written: 4 from bf16 to bf16.
template <typename Out>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ ListParams params) {
  const float scale = read(params.scale);
  for_each_chunk(params, [&](const ListItem& item, int64_t chunk) {
    switch (item.dtype) {
      case DType::kFloat32:
        return pack_chunk<float, Out>(item, chunk, scale);
      case DType::kBFloat16:
        return pack_chunk<BFloat16, Out>(item, chunk, scale);
      default:
        return pack_chunk<Float16, Out>(item, chunk, scale);
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
