// How kernels are launched. They take one struct by value, so that a list of tensors needs no copy to the device first.
#pragma once

#include <cuda_runtime.h>

#include "grid.h"
#include "vector_io.cuh"

namespace pyzero {
namespace cuda {

// Kernel parameters may take 32,764 bytes from CUDA 12.1 on (driver 530), 4,096 before. With an earlier
// driver the backend is not available: see needed_driver in ops/build_spec.py.
constexpr size_t kParameterBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;

// cudaLaunchKernelEx, unlike <<<>>>, returns the error, and tests/support/cuda_shim can replace it.
template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int num_blocks, cudaStream_t stream,
            int num_threads = kThreads) {
  static_assert(sizeof(Params) <= kParameterBytes, "more than a launch can carry");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(num_blocks));
  config.blockDim = dim3(unsigned(num_threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, params), "launching a kernel");
}

// Returns the item of the list that the chunk belongs to: the last one that starts at or before it.
template <typename List>
__device__ __forceinline__ int find_item(const List& list, unsigned chunk) {
  int low = 0;
  int high = list.num_items;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// A number known at launch, or an fp32 value on the device.
struct DeviceScalar {
  float value;
  const float* device;
};

inline DeviceScalar device_scalar(const Scalar& scalar) { return DeviceScalar{float(scalar.value), scalar.device}; }

__device__ __forceinline__ float read(const DeviceScalar& scalar) {
  return scalar.device != nullptr ? load_volatile(scalar.device) : scalar.value;
}

}  // namespace cuda
}  // namespace pyzero
