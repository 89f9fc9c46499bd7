// The host side of a launch over a list of tensors.
#include "tensor_list.cuh"

namespace pyzero {
namespace cuda {

ListLauncher::ListLauncher(ListKernel kernel, const Scalar& scale, const Report& report, double* partials,
                           cudaStream_t stream)
    : kernel_(kernel), report_(report), partials_(partials), stream_(stream) {
  params_.scale = device_scalar(scale);
  params_.report = block_report(report, partials);
}

void ListLauncher::add(const Buffer& source, void* target, DType target_dtype) {
  if (source.numel == 0) return;
  if (params_.num_items == kListCapacity) flush();
  const Span span = span_of(source.numel, {Stream{source.data, source.dtype}, Stream{target, target_dtype}});
  params_.items[params_.num_items++] = ListItem{source.data, target, span, params_.num_chunks, source.dtype};
  params_.num_chunks += num_chunks<kListUnroll>(span);
}

void ListLauncher::flush() {
  if (params_.num_items == 0) return;
  const int blocks = num_blocks(params_.num_chunks);
  launch(kernel_, params_, blocks, stream_);
  finish_sumsq(report_, partials_, blocks, stream_);
  params_.num_items = 0;
  params_.num_chunks = 0;
}

}  // namespace cuda
}  // namespace pyzero
