// The host side of a launch over a list of tensors.
#include "tensor_list.cuh"

namespace pyzero {
namespace cuda {

ListLauncher::ListLauncher(ListKernel kernel, const Scalar& scale, const GradStats& grad_stats, double* partials,
                           cudaStream_t stream)
    : kernel_(kernel), grad_stats_(grad_stats), partials_(partials), stream_(stream) {
  params_.scale = device_scalar(scale);
  params_.grad_stats = block_stats(grad_stats, partials);
}

namespace {

// Of a source and a target that no head aligns at once: the target is aligned, and around each vector of the source lie
// the two aligned ones that it is taken from. The first may begin before the source, where allocations are aligned; the
// second must not end behind it.
Span shifted_span(const Buffer& source, const Operand& target) {
  Span span = span_of(source.numel, {target});
  span.vectors_end = source.numel - kVectorBytes / std::max(element_size(source.dtype), element_size(target.dtype));
  return span;
}

}  // namespace

void ListLauncher::add(const Buffer& source, void* target, DType target_dtype) {
  if (source.numel == 0) return;
  if (params_.num_items == kListCapacity) flush();
  Span span = span_of(source.numel, {Operand{source.data, source.dtype}, Operand{target, target_dtype}});
  if (span.vectors_end == 0) span = shifted_span(source, Operand{target, target_dtype});
  params_.first_chunk[params_.num_items] = unsigned(num_chunks_);
  params_.items[params_.num_items++] = ListItem{source.data, target, span, source.dtype};
  num_chunks_ += num_chunks(span, kListChunk);
}

void ListLauncher::flush() {
  if (params_.num_items == 0) return;
  // Of a kernel that reports: each block ends with a barrier, so that one of a single chunk is mostly barrier.
  const bool reports = grad_stats_.found_inf != nullptr || grad_stats_.sumsq != nullptr;
  params_.runs = runs_of(num_chunks_, reports ? kMaxPartials : num_chunks_);
  launch(kernel_, params_, params_.runs.num_blocks(), stream_);
  finish_sumsq(grad_stats_, partials_, params_.runs.num_blocks(), stream_);
  params_.num_items = 0;
  num_chunks_ = 0;
}

}  // namespace cuda
}  // namespace pyzero
