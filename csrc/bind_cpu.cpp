// The CPU module: pointers and scalars in, nothing else. Every function releases the GIL while it works.
#include "bind_common.h"
#include "cpu/launch.h"

#ifndef PYZERO_BUILD_HASH
#define PYZERO_BUILD_HASH ""
#endif
#ifndef PYZERO_SOURCE_HASH
#define PYZERO_SOURCE_HASH ""
#endif

namespace py = pybind11;
using namespace pyzero;

namespace {

void adam(Address master, Address exp_avg, Address exp_avg_sq, const PyBuffer& grad, const PyBuffer& param_out,
          const PyHyper& hyper, const PyScalar& lr, const PyScalar& step, const PyScalar& grad_scale, Address found_inf,
          const PySegments& segments, int num_threads) {
  const AdamArgs args =
      adam_args(master, exp_avg, exp_avg_sq, grad, param_out, hyper, lr, step, grad_scale, found_inf, segments);
  const py::gil_scoped_release release;
  cpu::adam(args, num_threads);
}

void unscale(const std::vector<PyBuffer>& tensors, const PyScalar& inv_scale, const PyReport& where, int num_threads) {
  const UnscaleArgs args{buffers(tensors), scalar(inv_scale), report(where)};
  const py::gil_scoped_release release;
  cpu::unscale(args, num_threads);
}

void pack(const PyBuffer& bucket, const std::vector<PyBuffer>& tensors, const std::vector<int64_t>& offsets,
          const PyScalar& scale, const PyReport& where, int num_threads) {
  const PackArgs args{buffer(bucket), buffers(tensors), offsets, scalar(scale), report(where)};
  const py::gil_scoped_release release;
  cpu::pack(args, num_threads);
}

void reduce_scatter(Address shard, const std::vector<Address>& slices, int dtype, int64_t numel, const PyScalar& scale,
                    bool accumulate, const PyReport& where, int num_threads) {
  const ReduceScatterArgs args = reduce_scatter_args(shard, slices, dtype, numel, scale, accumulate, where);
  const py::gil_scoped_release release;
  cpu::reduce_scatter(args, num_threads);
}

void update_loss_scale(Address state, Address found_inf, const PyPolicy& rule) {
  loss_scale_update(pointer<float>(state), *pointer<const float>(found_inf) != 0.0f, policy(rule));
}

}  // namespace

PYBIND11_MODULE(_native_cpu, module) {
  module.attr("build_hash") = PYZERO_BUILD_HASH;
  module.attr("source_hash") = PYZERO_SOURCE_HASH;
  module.def("adam_", &adam);
  module.def("unscale_", &unscale);
  module.def("pack_", &pack);
  module.def("reduce_scatter_", &reduce_scatter);
  module.def("loss_scale_update_", &update_loss_scale);
  module.def("isas", &cpu::isas);
  module.def("use_isa", &cpu::use_isa);
}
