// The gradients of a shard as kernel parameters: one, or up to kManyGrads. Each is cut into chunks of its own.
#pragma once

#include "launch.cuh"

namespace pyzero {
namespace cuda {

// Blocks are half as large as in other kernels. 128 threads reach a copy's bandwidth, 256 reach 96% of it and 512 98%.
constexpr int kUpdateThreads = kThreads / 2;
constexpr int kUpdateMinBlocks = 2 * kMinBlocks;

constexpr int kUpdateUnroll = 2;  // two loads of 16 bytes in flight for each state, and two for the gradients
constexpr int64_t kUpdateChunk = kChunk<kUpdateUnroll, kWidth<float>, kUpdateThreads>;

struct ShardGrad {
  const void* data;
  int64_t offset;  // of its first element in the shard
  Span span;
};

template <int kCapacity>
struct ShardGradList {
  int num_items;
  unsigned first_chunk[kCapacity];  // of each item, in the launch; an array of its own, for find_item
  ShardGrad items[kCapacity];
};

#ifndef PYZERO_MANY_GRADS  // the host shim takes fewer
#define PYZERO_MANY_GRADS (kParameterBytes > 16384 ? 256 : 64)
#endif

// Gradients per launch; a longer list takes several launches. In the module, each kernel takes that much space, too.
constexpr int kManyGrads = PYZERO_MANY_GRADS;

// Returns the gradient that this block updates, and sets `chunk` to the chunk within it.
template <int kCapacity>
__device__ __forceinline__ const ShardGrad& find_grad(const ShardGradList<kCapacity>& list, unsigned& chunk) {
  const int item = kCapacity == 1 ? 0 : find_item(list, blockIdx.x);
  chunk = blockIdx.x - (kCapacity == 1 ? 0 : list.first_chunk[item]);
  return list.items[item];
}

// Fills the list and calls run(number of chunks), as often as it takes. `operands` point to the shard's start. At the
// gradient's offset they are aligned in the same way, because offsets are multiples of kSegmentGranule.
template <int kCapacity, typename Run>
void for_each_launch(const ShardGrads& grads, std::vector<Operand> operands, int64_t chunk,
                     ShardGradList<kCapacity>& list, const Run& run) {
  int64_t chunks = 0;
  list.num_items = 0;
  for (size_t i = 0; i < grads.tensors.size(); ++i) {
    const Buffer& grad = grads.tensors[i];
    if (grad.numel == 0) continue;
    operands.push_back(Operand{grad.data, grad.dtype});
    const Span span = span_of(grad.numel, operands);
    operands.pop_back();
    list.first_chunk[list.num_items] = unsigned(chunks);
    list.items[list.num_items++] = ShardGrad{grad.data, grads.offsets[i], span};
    chunks += num_chunks(span, chunk);
    if (list.num_items == kCapacity) {
      run(int(chunks));
      list.num_items = 0;
      chunks = 0;
    }
  }
  if (list.num_items > 0) run(int(chunks));
}

}  // namespace cuda
}  // namespace pyzero
