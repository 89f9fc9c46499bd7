// The outputs of an update: this rank's weights, and those of its peers, whose memory this device can access.
#pragma once

#include "vector_io.cuh"

namespace pyzero {
namespace cuda {

struct NoOutput {};  // the output type if there is no param_out

struct ParamPointers {
  void* data[kMaxParamOuts];
  int count;
};

inline ParamPointers param_pointers(const ParamOuts& outs) {
  ParamPointers pointers{};
  for (int i = 0; i < outs.count; ++i) pointers.data[i] = outs.buffers[i].data;
  pointers.count = outs.count;
  return pointers;
}

inline void add_operands(const ParamOuts& outs, std::vector<Operand>& operands) {
  for (int i = 0; i < outs.count; ++i) operands.push_back(Operand{outs.buffers[i].data, outs.buffers[i].dtype});
}

// Calls store(pointer) for each output. The first is outside the loop, because most calls have only one.
template <typename Out, typename Store>
__device__ __forceinline__ void for_each_out(const ParamPointers& outs, const Store& store) {
  store(static_cast<Out*>(outs.data[0]));
#pragma unroll 1
  for (int i = 1; i < outs.count; ++i) store(static_cast<Out*>(outs.data[i]));
}

}  // namespace cuda
}  // namespace pyzero
