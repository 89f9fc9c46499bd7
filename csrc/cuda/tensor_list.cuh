// A list of tensors in one launch: each is cut into chunks, and the blocks share the chunks of all of them evenly.
#pragma once

#include <vector>

#include "report.cuh"
#include "stream.cuh"

namespace pyzero {
namespace cuda {

constexpr int kListUnroll = 4;  // 8,192 elements per chunk: 16 KiB of a 16-bit type

struct ListItem {
  const void* source;
  void* target;  // the source itself where the op works in place
  Span span;
  int64_t first_chunk;  // in the whole list
  DType dtype;          // of the source
};

// As many as a launch can carry; a longer list takes several launches.
constexpr int kListCapacity = (kParameterBytes - 128) / sizeof(ListItem);

struct ListParams {
  DeviceScalar scale;
  BlockReport report;
  int64_t num_chunks;
  int num_items;
  ListItem items[kListCapacity];
};

// The item that a chunk belongs to: the last one that starts at or before it.
__device__ __forceinline__ int find_item(const ListParams& params, int64_t chunk) {
  int low = 0;
  int high = params.num_items;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (params.items[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Chunks in one piece per block, so that the search is made once: visit(item, chunk within the item).
template <typename Visit>
__device__ __forceinline__ void for_each_chunk(const ListParams& params, const Visit& visit) {
  int64_t chunk = params.num_chunks * blockIdx.x / gridDim.x;
  const int64_t end = params.num_chunks * (blockIdx.x + 1) / gridDim.x;
  int item = find_item(params, chunk);
  for (; chunk < end; ++chunk) {
    while (item + 1 < params.num_items && params.items[item + 1].first_chunk <= chunk) ++item;
    visit(params.items[item], chunk - params.items[item].first_chunk);
  }
}

template <typename In, typename Out, bool kWrite>
struct ScaleBody {
  const In* source;
  Out* target;
  float scale;
  Stats& stats;

  using Inputs = Vector<In>;

  __device__ __forceinline__ Inputs load(int64_t i) const { return load_vector(source + i); }

  __device__ __forceinline__ Out scaled(In x) const {
    const Out result = from_float<Out>(scale_element(to_float(x), scale));
    stats.add(to_float(result));
    return result;
  }

  __device__ __forceinline__ void finish(int64_t i, const Inputs& in) const {
    Vector<Out> out;
#pragma unroll
    for (int k = 0; k < kVector; ++k) out.x[k] = scaled(in.x[k]);
    if (kWrite) store_vector(target + i, out);
  }

  __device__ __forceinline__ void element(int64_t i) const {
    const Out out = scaled(source[i]);
    if (kWrite) target[i] = out;
  }
};

template <typename In, typename Out, bool kWrite>
__device__ __forceinline__ void scale_chunk(const ListItem& item, int64_t chunk, float scale, Stats& stats) {
  const ScaleBody<In, Out, kWrite> body{static_cast<const In*>(item.source), static_cast<Out*>(item.target), scale,
                                        stats};
  constexpr int kBatch = sizeof(In) == 2 ? kListUnroll : kListUnroll / 2;  // 64 bytes under way; more cost registers
  stream_chunk<kListUnroll, kBatch>(item.span, chunk, body);
}

using ListKernel = void (*)(ListParams);

// Gathers items and launches whenever the parameters are full.
class ListLauncher {
 public:
  ListLauncher(ListKernel kernel, const Scalar& scale, const Report& report, double* partials, cudaStream_t stream);
  void add(const Buffer& source, void* target, DType target_dtype);
  void flush();  // launches what is left

 private:
  ListKernel kernel_;
  Report report_;
  double* partials_;
  cudaStream_t stream_;
  ListParams params_{};
};

}  // namespace cuda
}  // namespace pyzero
