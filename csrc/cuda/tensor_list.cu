// The host side of a launch over a list of tensors.
#include "tensor_list.cuh"

namespace pyzero {
namespace cuda {

ListLauncher::ListLauncher(ListKernel kernel, const Scalar& scale, const GradStats& grad_stats, double* partials,
                           cudaStream_t stream, int64_t max_blocks)
    : kernel_(kernel), max_blocks_(max_blocks), grad_stats_(grad_stats), partials_(partials), stream_(stream) {
  params_.scale = device_scalar(scale);
  params_.grad_stats = block_stats(grad_stats, partials);
}

void ListLauncher::add(const Buffer& source, void* target, const Span& span) {
  if (source.numel == 0) return;
  if (params_.num_items == kListCapacity) flush();
  params_.first_chunk[params_.num_items] = unsigned(num_chunks_);
  params_.items[params_.num_items++] = ListItem{source.data, target, span, source.dtype};
  num_chunks_ += num_chunks(span, kListChunk);
}

void ListLauncher::flush() {
  if (params_.num_items == 0) return;
  params_.runs = runs_of(num_chunks_, max_blocks_);  // limited even if no sum is wanted
  launch(kernel_, params_, params_.runs.num_blocks(), stream_);
  finish_sumsq(grad_stats_, partials_, params_.runs.num_blocks(), stream_);
  params_.num_items = 0;
  num_chunks_ = 0;
}

}  // namespace cuda
}  // namespace pyzero
