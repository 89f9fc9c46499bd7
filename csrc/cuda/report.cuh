// What a pass over gradients reports: whether any value is inf or NaN, and the sum of squares.
//
// The sum is the same from run to run: no float atomics. Each block leaves one fp64 number in the workspace, and a
// kernel of one block adds those in order. The order depends on the number of multiprocessors, so on another GPU the
// last bits may differ.
#pragma once

#include <cuda_runtime.h>

#include "../math/unscale.h"
#include "launch.cuh"

namespace pyzero {
namespace cuda {

// What a thread has seen so far.
struct Stats {
  bool want_sumsq;
  bool nonfinite = false;
  double sumsq = 0.0;

  __device__ __forceinline__ void add(float stored) {
    nonfinite |= is_nonfinite(stored);
    if (want_sumsq) sumsq += square(stored);
  }
};

// In the kernels' parameters; both may be null.
struct BlockReport {
  float* found_inf;
  double* partials;  // one per block
};

inline BlockReport block_report(const Report& report, double* partials) {
  return BlockReport{report.found_inf, report.sumsq != nullptr ? partials : nullptr};
}

// The block's sum, in a fixed order, for thread 0. All threads must come here.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  __syncthreads();

#pragma unroll
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return sums[0];
}

// The blocks that saw an inf all store the same 1, so their order does not matter.
__device__ __forceinline__ void finish_block(const Stats& stats, const BlockReport& report) {
  if (__syncthreads_or(stats.nonfinite) && threadIdx.x == 0 && report.found_inf != nullptr) *report.found_inf = 1.0f;
  if (report.partials == nullptr) return;
  const double sum = block_sum(stats.sumsq);
  if (threadIdx.x == 0) report.partials[blockIdx.x] = sum;
}

// Adds partials[0 .. num_partials) to *report.sumsq, where that is wanted. In report.cu.
void finish_sumsq(const Report& report, const double* partials, int num_partials, cudaStream_t stream);

}  // namespace cuda
}  // namespace pyzero
