// The CPU module. Its ops take pointers and scalars, and release the GIL while they compute.
#include "bind_common.h"
#include "cpu/launch.h"

namespace pyzero {
namespace {

void adam_(const PyRows& rows, const std::vector<int64_t>& offsets, const PyAdamHyper& hyper, PyScalar lr,
           PyScalar step, PyScalar grad_scale, Address found_inf, Address segment_ids, Address active,
           int64_t num_segments, int num_threads) {
  const AdamArgs args =
      adam_args(rows, offsets, hyper, lr, step, grad_scale, found_inf, segment_ids, active, num_segments);
  const pybind11::gil_scoped_release release;
  cpu::adam(args, num_threads);
}

void lion_(const PyRows& rows, const std::vector<int64_t>& offsets, const PyLionHyper& hyper, PyScalar lr,
           PyScalar grad_scale, Address found_inf, Address segment_ids, Address active, int num_threads) {
  const LionArgs args = lion_args(rows, offsets, hyper, lr, grad_scale, found_inf, segment_ids, active);
  const pybind11::gil_scoped_release release;
  cpu::lion(args, num_threads);
}

void sgd_(const PyRows& rows, const std::vector<int64_t>& offsets, const PySgdHyper& hyper, bool has_buffer,
          PyScalar lr, PyScalar step, PyScalar grad_scale, Address found_inf, Address segment_ids, Address active,
          int num_threads) {
  const SgdArgs args = sgd_args(rows, offsets, hyper, has_buffer, lr, step, grad_scale, found_inf, segment_ids, active);
  const pybind11::gil_scoped_release release;
  cpu::sgd(args, num_threads);
}

void unscale_(const PyRows& rows, PyScalar inv_scale, Address found_inf, Address sumsq, bool sumsq_is_double,
              int num_threads) {
  const UnscaleArgs args{buffers(rows), scalar(inv_scale), grad_stats(found_inf, sumsq, sumsq_is_double)};
  const pybind11::gil_scoped_release release;
  cpu::unscale(args, num_threads);
}

void pack_(const PyRows& rows, const std::vector<int64_t>& offsets, PyScalar scale, int num_threads) {
  const PackArgs args = pack_args(rows, offsets, scale);
  const pybind11::gil_scoped_release release;
  cpu::pack(args, num_threads);
}

void reduce_scatter_(const PyRows& rows, PyScalar scale, bool accumulate, Address found_inf, Address sumsq,
                     bool sumsq_is_double, int num_threads) {
  const ReduceScatterArgs args =
      reduce_scatter_args(rows, scale, accumulate, grad_stats(found_inf, sumsq, sumsq_is_double));
  const pybind11::gil_scoped_release release;
  cpu::reduce_scatter(args, num_threads);
}

void loss_scale_update_(Address state, Address found_inf, const PyPolicy& rule, int /*num_threads*/) {
  const LossScalePolicy args = policy(rule);
  const pybind11::gil_scoped_release release;
  cpu::loss_scale_update(pointer<float>(state), pointer<const float>(found_inf), args);
}

void step_scalars_(Address out, Address stats, int64_t num_rows, double max_norm, PyScalar unscale, PyScalar factor,
                   Address steps, Address used, int64_t num_params, int /*num_threads*/) {
  const StepScalarsArgs args =
      step_scalars_args(out, stats, num_rows, max_norm, unscale, factor, steps, used, num_params);
  const pybind11::gil_scoped_release release;
  cpu::step_scalars(args);
}

}  // namespace
}  // namespace pyzero

PYBIND11_MODULE(_native_cpu, m) {
  pyzero::bind_rows(m);
  m.def("adam_", &pyzero::adam_);
  m.def("lion_", &pyzero::lion_);
  m.def("sgd_", &pyzero::sgd_);
  m.def("unscale_", &pyzero::unscale_);
  m.def("pack_", &pyzero::pack_);
  m.def("reduce_scatter_", &pyzero::reduce_scatter_);
  m.def("loss_scale_update_", &pyzero::loss_scale_update_);
  m.def("step_scalars_", &pyzero::step_scalars_);
  m.def("isas", &pyzero::cpu::isas);
  m.def("use_isa", &pyzero::cpu::use_isa);
}
