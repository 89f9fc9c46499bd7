// The CPU module. Its ops take pointers and scalars, and release the GIL while they compute.
#include "bind_common.h"
#include "cpu/launch.h"

namespace py = pybind11;
using namespace pyzero;

namespace {

void adam(const PyRows& rows, const std::vector<int64_t>& offsets, const PyAdamHyper& hyper, PyScalar lr, PyScalar step,
          PyScalar grad_scale, Address found_inf, Address segment_ids, Address active, int64_t num_segments,
          int num_threads) {
  const AdamArgs args =
      adam_args(rows, offsets, hyper, lr, step, grad_scale, found_inf, segment_ids, active, num_segments);
  const py::gil_scoped_release release;
  cpu::adam(args, num_threads);
}

void lion(const PyRows& rows, const std::vector<int64_t>& offsets, const PyLionHyper& hyper, PyScalar lr,
          PyScalar grad_scale, Address found_inf, Address segment_ids, Address active, int num_threads) {
  const LionArgs args = lion_args(rows, offsets, hyper, lr, grad_scale, found_inf, segment_ids, active);
  const py::gil_scoped_release release;
  cpu::lion(args, num_threads);
}

void sgd(const PyRows& rows, const std::vector<int64_t>& offsets, const PySgdHyper& hyper, bool has_buffer, PyScalar lr,
         PyScalar step, PyScalar grad_scale, Address found_inf, Address segment_ids, Address active, int num_threads) {
  const SgdArgs args = sgd_args(rows, offsets, hyper, has_buffer, lr, step, grad_scale, found_inf, segment_ids, active);
  const py::gil_scoped_release release;
  cpu::sgd(args, num_threads);
}

void unscale(const PyRows& rows, PyScalar inv_scale, Address found_inf, Address sumsq, bool sumsq_is_double,
             int num_threads) {
  const UnscaleArgs args{buffers(rows), scalar(inv_scale), grad_stats(found_inf, sumsq, sumsq_is_double)};
  const py::gil_scoped_release release;
  cpu::unscale(args, num_threads);
}

void pack(const PyRows& rows, const std::vector<int64_t>& offsets, PyScalar scale, int num_threads) {
  const PackArgs args = pack_args(rows, offsets, scale);
  const py::gil_scoped_release release;
  cpu::pack(args, num_threads);
}

void reduce_scatter(const PyRows& rows, PyScalar scale, bool accumulate, Address found_inf, Address sumsq,
                    bool sumsq_is_double, int num_threads) {
  const ReduceScatterArgs args =
      reduce_scatter_args(rows, scale, accumulate, grad_stats(found_inf, sumsq, sumsq_is_double));
  const py::gil_scoped_release release;
  cpu::reduce_scatter(args, num_threads);
}

void update_loss_scale(Address state, Address found_inf, const PyPolicy& rule, int /*num_threads*/) {
  const LossScalePolicy args = policy(rule);
  const py::gil_scoped_release release;
  cpu::loss_scale_update(pointer<float>(state), pointer<const float>(found_inf), args);
}

void step_scalars(Address out, Address rows, int64_t num_rows, double max_norm, PyScalar unscale, PyScalar factor,
                  Address steps, Address used, int64_t num_params, int /*num_threads*/) {
  const StepScalarsArgs args =
      step_scalars_args(out, rows, num_rows, max_norm, unscale, factor, steps, used, num_params);
  const py::gil_scoped_release release;
  cpu::step_scalars(args);
}

}  // namespace

PYBIND11_MODULE(_native_cpu, module) {
  bind_rows(module);
  module.def("adam_", &adam);
  module.def("lion_", &lion);
  module.def("sgd_", &sgd);
  module.def("unscale_", &unscale);
  module.def("pack_", &pack);
  module.def("reduce_scatter_", &reduce_scatter);
  module.def("loss_scale_update_", &update_loss_scale);
  module.def("step_scalars_", &step_scalars);
  module.def("isas", &cpu::isas);
  module.def("use_isa", &cpu::use_isa);
}
