// The CUDA module. Its ops take addresses, numbers, a device index and a stream handle, and launch kernels. It uses no
// torch header. To import it needs no CUDA library: the runtime is linked statically, and first used by a call.
//
// `workspace` is device memory that the caller keeps alive on `stream` (adam_workspace_bytes,
// grad_stats_workspace_bytes), or 0 if the op needs none. DeviceGuard selects the device, so that callers need not.
#include "bind_common.h"
#include "cuda/grid.h"
#include "cuda/launch.h"

#ifndef PYZERO_MODULE_NAME
#define PYZERO_MODULE_NAME _native_cuda
#endif

namespace pyzero {
namespace {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda::check(cudaGetDevice(&previous_), "reading the current device");
    changed_ = previous_ != device;
    if (changed_) cuda::check(cudaSetDevice(device), "selecting the tensors' device");
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

cudaStream_t stream_of(Address handle) { return pointer<CUstream_st>(handle); }

void adam_(const PyRows& rows, const std::vector<int64_t>& offsets, const PyAdamHyper& hyper, PyScalar lr,
           PyScalar step, PyScalar grad_scale, Address found_inf, Address segment_ids, Address active,
           int64_t num_segments, Address workspace, int device, Address stream) {
  const DeviceGuard guard(device);
  cuda::adam(adam_args(rows, offsets, hyper, lr, step, grad_scale, found_inf, segment_ids, active, num_segments),
             pointer<AdamConstants>(workspace), stream_of(stream));
}

void lion_(const PyRows& rows, const std::vector<int64_t>& offsets, const PyLionHyper& hyper, PyScalar lr,
           PyScalar grad_scale, Address found_inf, Address segment_ids, Address active, int device, Address stream) {
  const DeviceGuard guard(device);
  cuda::lion(lion_args(rows, offsets, hyper, lr, grad_scale, found_inf, segment_ids, active), stream_of(stream));
}

void sgd_(const PyRows& rows, const std::vector<int64_t>& offsets, const PySgdHyper& hyper, bool has_buffer,
          PyScalar lr, PyScalar step, PyScalar grad_scale, Address found_inf, Address segment_ids, Address active,
          int device, Address stream) {
  const DeviceGuard guard(device);
  cuda::sgd(sgd_args(rows, offsets, hyper, has_buffer, lr, step, grad_scale, found_inf, segment_ids, active),
            stream_of(stream));
}

void unscale_(const PyRows& rows, PyScalar inv_scale, Address found_inf, Address sumsq, bool sumsq_is_double,
              Address workspace, int device, Address stream) {
  const DeviceGuard guard(device);
  cuda::unscale(UnscaleArgs{buffers(rows), scalar(inv_scale), grad_stats(found_inf, sumsq, sumsq_is_double)},
                pointer<double>(workspace), stream_of(stream));
}

void pack_(const PyRows& rows, const std::vector<int64_t>& offsets, PyScalar scale, int device, Address stream) {
  const DeviceGuard guard(device);
  cuda::pack(pack_args(rows, offsets, scale), stream_of(stream));
}

void reduce_scatter_(const PyRows& rows, PyScalar scale, bool accumulate, Address found_inf, Address sumsq,
                     bool sumsq_is_double, Address workspace, int device, Address stream) {
  const DeviceGuard guard(device);
  cuda::reduce_scatter(reduce_scatter_args(rows, scale, accumulate, grad_stats(found_inf, sumsq, sumsq_is_double)),
                       pointer<double>(workspace), stream_of(stream));
}

void loss_scale_update_(Address state, Address found_inf, const PyPolicy& rule, int device, Address stream) {
  const DeviceGuard guard(device);
  cuda::loss_scale_update(pointer<float>(state), pointer<const float>(found_inf), policy(rule), stream_of(stream));
}

void step_scalars_(Address out, Address stats, int64_t num_rows, double max_norm, PyScalar unscale, PyScalar factor,
                   Address steps, Address used, int64_t num_params, int device, Address stream) {
  const DeviceGuard guard(device);
  cuda::step_scalars(step_scalars_args(out, stats, num_rows, max_norm, unscale, factor, steps, used, num_params),
                     stream_of(stream));
}

int64_t adam_workspace_bytes(int64_t num_segments) { return num_segments * int64_t(sizeof(AdamConstants)); }

}  // namespace
}  // namespace pyzero

PYBIND11_MODULE(PYZERO_MODULE_NAME, m) {
  m.attr("grad_stats_workspace_bytes") = pyzero::cuda::kMaxPartials * sizeof(double);
  pyzero::bind_rows(m);
  m.def("adam_", &pyzero::adam_);
  m.def("lion_", &pyzero::lion_);
  m.def("sgd_", &pyzero::sgd_);
  m.def("unscale_", &pyzero::unscale_);
  m.def("pack_", &pyzero::pack_);
  m.def("reduce_scatter_", &pyzero::reduce_scatter_);
  m.def("loss_scale_update_", &pyzero::loss_scale_update_);
  m.def("step_scalars_", &pyzero::step_scalars_);
  m.def("adam_workspace_bytes", &pyzero::adam_workspace_bytes);
}
