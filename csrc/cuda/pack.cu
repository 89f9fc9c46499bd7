// pack_: the gradients of one bucket into its flat buffer, scaled and cast, in one launch.
#include "tensor_list.cuh"

namespace pyzero {
namespace cuda {
namespace {

// Where the target is aligned and the source is not: a vector is taken from the two aligned ones that it lies across,
// of which the second is its neighbor's first.
template <typename In, typename Out>
struct ShiftedBody : ScaleBody<In, Out, const NoStats> {
  using Base = ScaleBody<In, Out, const NoStats>;
  using Vector = typename Base::Inputs;
  struct Inputs {
    Vector low, high;
  };

  __device__ __forceinline__ unsigned offset(int64_t i) const {  // in bytes, from an aligned vector
    return unsigned(reinterpret_cast<uintptr_t>(this->source() + i) % sizeof(Vector));
  }

  __device__ __forceinline__ Inputs load(int64_t i) const {
    const In* low = this->source() + i - offset(i) / sizeof(In);
    return Inputs{load_vector<Base::kElements>(low), load_vector<Base::kElements>(low + Base::kElements)};
  }

  __device__ __forceinline__ void finish(int64_t i, const Inputs& in) const {
    constexpr int kWords = Vector::kWords;
    uint32_t words[2 * kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      words[w] = word(in.low, w);
      words[kWords + w] = word(in.high, w);
    }
    const unsigned num_words = offset(i) / 4;
#pragma unroll
    for (int step = kWords / 2; step > 0; step /= 2) {
      if ((num_words & step) == 0) continue;
#pragma unroll
      for (int w = 0; w < 2 * kWords - step; ++w) words[w] = words[w + step];
    }
    const unsigned num_bits = offset(i) % 4 * 8;
    Vector shifted;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      set_word(shifted, w, uint32_t((uint64_t(words[w + 1]) << 32 | words[w]) >> num_bits));
    }
    Base::finish(i, shifted);
  }
};

template <typename In, typename Out>
__device__ __forceinline__ void pack_chunk(const ListItem& item, int64_t chunk, float scale) {
  const NoStats none;
  const ShiftedBody<In, Out> shifted{{item, scale, none}};
  if (shifted.offset(item.span.head) == 0) {
    visit_list_chunk(item, chunk, static_cast<const ScaleBody<In, Out, const NoStats>&>(shifted));
  } else {
    visit_list_chunk(item, chunk, shifted);
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
