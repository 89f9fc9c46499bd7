// pybind11 signatures that the CPU and the CUDA module share: Python hands over integers, floats and lists of them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "args.h"

namespace pyzero {

using Address = uintptr_t;
using PyScalar = std::tuple<double, Address>;         // value, or a device address where not 0
using PyBuffer = std::tuple<Address, int, int64_t>;   // address, DType, numel
using PyReport = std::tuple<Address, Address, bool>;  // found_inf, sumsq, sumsq is fp64
using PyHyper = std::tuple<double, double, double, double, bool, bool>;
using PySegments = std::tuple<Address, Address, int64_t>;  // segment_ids, active, num_segments
using PyPolicy = std::tuple<float, float, float, float, float, float, float, bool>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Scalar scalar(const PyScalar& s) { return Scalar{std::get<0>(s), pointer<const float>(std::get<1>(s))}; }

inline Buffer buffer(const PyBuffer& b) {
  return Buffer{pointer<void>(std::get<0>(b)), static_cast<DType>(std::get<1>(b)), std::get<2>(b)};
}

inline Report report(const PyReport& r) {
  return Report{pointer<float>(std::get<0>(r)), pointer<void>(std::get<1>(r)), std::get<2>(r)};
}

inline std::vector<Buffer> buffers(const std::vector<PyBuffer>& items) {
  std::vector<Buffer> result;
  result.reserve(items.size());
  for (const auto& item : items) result.push_back(buffer(item));
  return result;
}

inline LossScalePolicy policy(const PyPolicy& p) {
  return LossScalePolicy{std::get<0>(p), std::get<1>(p), std::get<2>(p), std::get<3>(p),
                         std::get<4>(p), std::get<5>(p), std::get<6>(p), std::get<7>(p)};
}

inline AdamArgs adam_args(Address master, Address exp_avg, Address exp_avg_sq, const PyBuffer& grad,
                          const PyBuffer& param_out, const PyHyper& hyper, const PyScalar& lr, const PyScalar& step,
                          const PyScalar& grad_scale, Address found_inf, const PySegments& segments) {
  AdamArgs args;
  args.master = pointer<float>(master);
  args.exp_avg = pointer<float>(exp_avg);
  args.exp_avg_sq = pointer<float>(exp_avg_sq);
  args.grad = buffer(grad);
  args.param_out = buffer(param_out);
  args.numel = args.grad.numel;
  args.hyper = AdamHyper{std::get<0>(hyper), std::get<1>(hyper), std::get<2>(hyper),
                         std::get<3>(hyper), std::get<4>(hyper), std::get<5>(hyper)};
  args.lr = scalar(lr);
  args.step = scalar(step);
  args.grad_scale = scalar(grad_scale);
  args.found_inf = pointer<const float>(found_inf);
  args.segment_ids = pointer<const int32_t>(std::get<0>(segments));
  args.active = pointer<const float>(std::get<1>(segments));
  args.num_segments = std::get<2>(segments);
  return args;
}

inline ReduceScatterArgs reduce_scatter_args(Address shard, const std::vector<Address>& slices, int dtype,
                                             int64_t numel, const PyScalar& scale, bool accumulate,
                                             const PyReport& where) {
  ReduceScatterArgs args;
  args.shard = pointer<float>(shard);
  for (const Address slice : slices) args.slices.push_back(pointer<void>(slice));
  args.dtype = static_cast<DType>(dtype);
  args.numel = numel;
  args.scale = scalar(scale);
  args.accumulate = accumulate;
  args.report = report(where);
  return args;
}

}  // namespace pyzero
