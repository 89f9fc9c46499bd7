// A list of tensors in one launch. Each tensor is cut into chunks of one size, which the blocks divide among them.
#pragma once

#include <vector>

#include "grad_stats.cuh"
#include "vector_io.cuh"

namespace pyzero {
namespace cuda {

constexpr int64_t kListChunk = int64_t(kThreads) * 16;  // elements; per thread 32 bytes of a 16-bit type, or 64 of fp32

struct ListItem {
  const void* source;
  void* target;  // the source itself if the op works in place
  Span span;
  DType dtype;  // of the source
};

// As many items as kernel parameters can hold; a longer list takes several launches.
constexpr int kListCapacity = (kParameterBytes - 128) / (sizeof(ListItem) + sizeof(unsigned));

struct ListParams {
  DeviceScalar scale;
  BlockStats grad_stats;
  Runs runs;
  int num_items;
  unsigned first_chunk[kListCapacity];  // of each item, in the launch; an array of its own, for find_item
  ListItem items[kListCapacity];
};

// Calls visit(item, chunk within the item) for each chunk of the block's run.
template <typename Visit>
__device__ __forceinline__ void for_each_chunk(const ListParams& params, const Visit& visit) {
  unsigned chunk = unsigned(params.runs.begin(blockIdx.x));
  const unsigned end = unsigned(params.runs.end(blockIdx.x));
  int item = find_item(params, chunk);
  for (; chunk < end; ++chunk) {
    while (item + 1 < params.num_items && params.first_chunk[item + 1] <= chunk) ++item;
    visit(params.items[item], chunk - params.first_chunk[item]);
  }
}

template <typename Body>
__device__ __forceinline__ void visit_list_chunk(const ListItem& item, int64_t chunk, const Body& body) {
  visit_chunk<int(kListChunk / (kThreads * Body::kElements)), Body::kElements>(item.span, chunk, body);
}

// The statistics of an op that reports none.
struct NoStats {
  template <typename T>
  __device__ __forceinline__ void add(const T&) const {}
};

template <typename In, typename Out, typename Seen>
struct ScaleBody {
  static constexpr int kElements = kWidth<In, Out>;
  using Inputs = Vector<In, kElements>;

  const ListItem& item;
  float scale;
  Seen& stats;

  __device__ __forceinline__ const In* source() const { return static_cast<const In*>(item.source); }
  __device__ __forceinline__ Out* target() const { return static_cast<Out*>(item.target); }
  __device__ __forceinline__ Out scaled(In x) const { return from_float<Out>(scale_element(to_float(x), scale)); }

  __device__ __forceinline__ Inputs load(int64_t i) const { return load_vector<kElements>(source() + i); }

  __device__ __forceinline__ void finish(int64_t i, const Inputs& in) const {
    Vector<Out, kElements> out;
#pragma unroll
    for (int k = 0; k < kElements; ++k) out.x[k] = scaled(in.x[k]);
    stats.add(out);
    store_vector(target() + i, out);
  }

  __device__ __forceinline__ void element(int64_t i) const {
    const Out out = scaled(source()[i]);
    stats.add(out);
    target()[i] = out;
  }
};

using ListKernel = void (*)(ListParams);

constexpr int64_t kEveryChunk = int64_t(1) << 31;  // max_blocks: one per chunk; for kernels without statistics

// Collects items, and launches the kernel whenever its parameters are full.
class ListLauncher {
 public:
  ListLauncher(ListKernel kernel, const Scalar& scale, const GradStats& grad_stats, double* partials,
               cudaStream_t stream, int64_t max_blocks = kMaxPartials);
  void add(const Buffer& source, void* target, const Span& span);
  void flush();  // launches the kernel for the rest

 private:
  ListKernel kernel_;
  int64_t max_blocks_;
  GradStats grad_stats_;
  double* partials_;
  cudaStream_t stream_;
  int64_t num_chunks_ = 0;
  ListParams params_{};
};

}  // namespace cuda
}  // namespace pyzero
