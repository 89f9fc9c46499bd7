// pybind11 signatures that the CPU and the CUDA module share. Python passes integers, floats and rows of integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "args.h"
#include "tensor_rows.h"

namespace pyzero {

using Address = uintptr_t;
using PyRows = pybind11::bytes;     // of ops/rows.py: address, numel and DType of each tensor, as int64
using PyScalar = pybind11::handle;  // a float is the value, an int is its device address
using PyAdamHyper = std::tuple<double, double, double, double, bool, bool>;
using PyLionHyper = std::tuple<double, double, double, bool>;
using PySgdHyper = std::tuple<double, double, double, bool, bool>;
using PyPolicy = std::tuple<float, float, float, float, float, float, float, bool>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Scalar scalar(PyScalar s) {
  if (PyFloat_Check(s.ptr())) return Scalar{PyFloat_AS_DOUBLE(s.ptr()), nullptr};
  return Scalar{0.0, pointer<const float>(s.cast<Address>())};
}

inline std::vector<Buffer> buffers(const PyRows& rows) {
  const size_t num_rows = size_t(PyBytes_GET_SIZE(rows.ptr())) / sizeof(Row);
  std::vector<Buffer> result(num_rows);
  for (size_t i = 0; i < num_rows; ++i) {
    Row row;
    std::memcpy(&row, PyBytes_AS_STRING(rows.ptr()) + i * sizeof(Row), sizeof(Row));
    result[i] = Buffer{pointer<void>(Address(row.address)), static_cast<DType>(row.dtype), row.numel};
  }
  return result;
}

inline GradStats grad_stats(Address found_inf, Address sumsq, bool sumsq_is_double) {
  return GradStats{pointer<float>(found_inf), pointer<void>(sumsq), sumsq_is_double};
}

inline LossScalePolicy policy(const PyPolicy& p) {
  return LossScalePolicy{std::get<0>(p), std::get<1>(p), std::get<2>(p), std::get<3>(p),
                         std::get<4>(p), std::get<5>(p), std::get<6>(p), std::get<7>(p)};
}

// Both modules also export these functions, which read rows from tensors.
inline void bind_rows(pybind11::module_& module) {
  module.def("use_exchange_api", [](pybind11::handle tensor_type, pybind11::handle parameter_type) {
    return row_reader().use(tensor_type, parameter_type);
  });
  module.def("rows_of", [](pybind11::handle tensors, int num_fp32, int rules) {
    return row_reader().read(tensors, num_fp32, rules);
  });
  module.def("shard_rows_of", [](pybind11::tuple shard, int num_fp32, pybind11::list grads, pybind11::list offsets) {
    return row_reader().read_shard(shard, num_fp32, grads, offsets);
  });
  module.def("layouts_of", [](pybind11::list tensors) { return row_reader().layouts(tensors); });
}

// The last rows are the gradients, one per offset.
inline ShardGrads shard_grads(const std::vector<Buffer>& tensors, const std::vector<int64_t>& offsets) {
  return ShardGrads{std::vector<Buffer>(tensors.end() - int64_t(offsets.size()), tensors.end()), offsets};
}

// The rows between the states and the gradients are the param_outs.
inline ParamOuts param_outs(const std::vector<Buffer>& tensors, size_t num_states, size_t num_grads) {
  ParamOuts outs;
  for (size_t i = num_states; i + num_grads < tensors.size(); ++i) {
    if (outs.count == kMaxParamOuts) throw std::invalid_argument("more param_out than a call can take");
    outs.buffers[outs.count++] = tensors[i];
  }
  return outs;
}

// tensors: num_states states (the master first), then all param_outs, then the gradients.
inline void fill_shard(ShardArgs& args, const std::vector<Buffer>& tensors, size_t num_states,
                       const std::vector<int64_t>& offsets, PyScalar lr, PyScalar grad_scale, Address found_inf,
                       Address segment_ids, Address active) {
  args.master = static_cast<float*>(tensors.at(0).data);
  args.param_outs = param_outs(tensors, num_states, offsets.size());
  args.numel = tensors[0].numel;
  args.grads = shard_grads(tensors, offsets);
  args.lr = scalar(lr);
  args.grad_scale = scalar(grad_scale);
  args.found_inf = pointer<const float>(found_inf);
  args.segment_ids = pointer<const int32_t>(segment_ids);
  args.active = pointer<const float>(active);
}

// States: master, exp_avg, exp_avg_sq.
inline AdamArgs adam_args(const PyRows& rows, const std::vector<int64_t>& offsets, const PyAdamHyper& hyper,
                          PyScalar lr, PyScalar step, PyScalar grad_scale, Address found_inf, Address segment_ids,
                          Address active, int64_t num_segments) {
  const std::vector<Buffer> tensors = buffers(rows);
  AdamArgs args;
  fill_shard(args, tensors, 3, offsets, lr, grad_scale, found_inf, segment_ids, active);
  args.exp_avg = static_cast<float*>(tensors.at(1).data);
  args.exp_avg_sq = static_cast<float*>(tensors.at(2).data);
  args.hyper = AdamHyper{std::get<0>(hyper), std::get<1>(hyper), std::get<2>(hyper),
                         std::get<3>(hyper), std::get<4>(hyper), std::get<5>(hyper)};
  args.step = scalar(step);
  args.num_segments = num_segments;
  return args;
}

// States: master, exp_avg.
inline LionArgs lion_args(const PyRows& rows, const std::vector<int64_t>& offsets, const PyLionHyper& hyper,
                          PyScalar lr, PyScalar grad_scale, Address found_inf, Address segment_ids, Address active) {
  const std::vector<Buffer> tensors = buffers(rows);
  LionArgs args;
  fill_shard(args, tensors, 2, offsets, lr, grad_scale, found_inf, segment_ids, active);
  args.exp_avg = static_cast<float*>(tensors.at(1).data);
  args.hyper = LionHyper{std::get<0>(hyper), std::get<1>(hyper), std::get<2>(hyper), std::get<3>(hyper)};
  return args;
}

// States: master, and momentum_buffer if has_buffer.
inline SgdArgs sgd_args(const PyRows& rows, const std::vector<int64_t>& offsets, const PySgdHyper& hyper,
                        bool has_buffer, PyScalar lr, PyScalar step, PyScalar grad_scale, Address found_inf,
                        Address segment_ids, Address active) {
  const std::vector<Buffer> tensors = buffers(rows);
  SgdArgs args;
  fill_shard(args, tensors, has_buffer ? 2 : 1, offsets, lr, grad_scale, found_inf, segment_ids, active);
  args.momentum_buffer = has_buffer ? static_cast<float*>(tensors.at(1).data) : nullptr;
  args.hyper =
      SgdHyper{std::get<0>(hyper), std::get<1>(hyper), std::get<2>(hyper), std::get<3>(hyper), std::get<4>(hyper)};
  args.step = scalar(step);
  return args;
}

// A negative max_norm means no clipping.
inline StepScalarsArgs step_scalars_args(Address out, Address stats, int64_t num_rows, double max_norm,
                                         PyScalar unscale, PyScalar factor, Address steps, Address used,
                                         int64_t num_params) {
  return StepScalarsArgs{pointer<float>(out),
                         pointer<const double>(stats),
                         num_rows,
                         max_norm >= 0.0,
                         float(max_norm),
                         scalar(unscale),
                         scalar(factor),
                         pointer<float>(steps),
                         pointer<const float>(used),
                         num_params};
}

// rows: the bucket, then the tensors.
inline PackArgs pack_args(const PyRows& rows, const std::vector<int64_t>& offsets, PyScalar scale) {
  PackArgs args;
  args.tensors = buffers(rows);
  args.bucket = args.tensors.at(0);
  args.tensors.erase(args.tensors.begin());
  args.offsets = offsets;
  args.scale = scalar(scale);
  return args;
}

// rows: the shard, then the slices.
inline ReduceScatterArgs reduce_scatter_args(const PyRows& rows, PyScalar scale, bool accumulate,
                                             const GradStats& grad_stats) {
  const std::vector<Buffer> tensors = buffers(rows);
  ReduceScatterArgs args;
  args.shard = static_cast<float*>(tensors.at(0).data);
  args.numel = tensors[0].numel;
  args.dtype = tensors.at(1).dtype;
  for (size_t i = 1; i < tensors.size(); ++i) args.slices.push_back(tensors[i].data);
  args.scale = scalar(scale);
  args.accumulate = accumulate;
  args.grad_stats = grad_stats;
  return args;
}

}  // namespace pyzero
