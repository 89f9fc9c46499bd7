// pack_ copies the gradients of one bucket into its flat buffer, scaled and cast, in one launch. A second launch copies
// those that are aligned differently from their place in the bucket.
#include <optional>

#include "tensor_list.cuh"

namespace pyzero {
namespace cuda {
namespace {

template <typename In, typename Out>
using PlainBody = ScaleBody<In, Out, const NoStats>;

// For an aligned target and an unaligned source. Each vector is shifted out of the two aligned vectors that it
// straddles. The second of these is the first of the next vector. The very first one may begin up to 15 bytes before
// the source. Others may be writing those bytes, which are shifted out.
template <typename In, typename Out>
struct ShiftedBody : PlainBody<In, Out> {
  using Base = PlainBody<In, Out>;
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
__device__ __forceinline__ void pack_chunk(const ListItem& item, int64_t chunk, const PlainBody<In, Out>& body) {
  visit_list_chunk(item, chunk, body);
}

// The span ends one vector before the item, because memory may end before the last vector's second part. The elements
// after the span are copied one by one.
template <typename In, typename Out>
__device__ __forceinline__ void pack_chunk(const ListItem& item, int64_t chunk, const ShiftedBody<In, Out>& body) {
  visit_list_chunk(item, chunk, body);
  const bool is_last = item.span.head + (chunk + 1) * kListChunk >= item.span.numel;
  if (is_last && threadIdx.x < body.kElements) body.element(item.span.numel + threadIdx.x);
}

// Bytes per element: its size in the gradient plus its size in the bucket. From bf16 to bf16: 4.
template <typename Out, template <typename, typename> class Body>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ ListParams params) {
  const NoStats none;
  const float scale = read(params.scale);
  for_each_chunk(params, [&](const ListItem& item, int64_t chunk) {
    switch (item.dtype) {
      case DType::kFloat32:
        return pack_chunk(item, chunk, Body<float, Out>{item, scale, none});
      case DType::kBFloat16:
        return pack_chunk(item, chunk, Body<BFloat16, Out>{item, scale, none});
      default:
        return pack_chunk(item, chunk, Body<Float16, Out>{item, scale, none});
    }
  });
}

template <template <typename, typename> class Body>
ListKernel pick(DType bucket) {
  switch (bucket) {
    case DType::kFloat32:
      return pack_kernel<float, Body>;
    case DType::kBFloat16:
      return pack_kernel<BFloat16, Body>;
    default:
      return pack_kernel<Float16, Body>;
  }
}

}  // namespace

void pack(const PackArgs& args, cudaStream_t stream) {
  const DType dtype = args.bucket.dtype;
  ListLauncher list(pick<PlainBody>(dtype), args.scale, GradStats{}, nullptr, stream);
  std::optional<ListLauncher> shifted;
  for (size_t i = 0; i < args.tensors.size(); ++i) {
    const Buffer& tensor = args.tensors[i];
    char* target = static_cast<char*>(args.bucket.data) + args.offsets[i] * element_size(dtype);
    Span span = span_of(tensor.numel, {Operand{tensor.data, tensor.dtype}, Operand{target, dtype}});
    const int width = kVectorBytes / std::max(element_size(tensor.dtype), element_size(dtype));
    if (span.vectors || tensor.numel < 3 * width) {
      list.add(tensor, target, span);
      continue;
    }
    span = span_of(tensor.numel - width, {Operand{target, dtype}});
    if (!shifted) shifted.emplace(pick<ShiftedBody>(dtype), args.scale, GradStats{}, nullptr, stream, kEveryChunk);
    shifted->add(tensor, target, span);
  }
  list.flush();
  if (shifted) shifted->flush();
}

}  // namespace cuda
}  // namespace pyzero
