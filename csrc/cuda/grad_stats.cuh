// The statistics of a pass over gradients: whether any value is inf or NaN, and the sum of squares.
//
// The sum is the same in every run and on every GPU: there are no float atomics, and the grid depends only on the
// sizes. Each block writes one fp64 number into the workspace. A kernel of one block adds these in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../math/unscale.h"
#include "launch.cuh"
#include "vector_io.cuh"

namespace pyzero {
namespace cuda {

// GradStats among a kernel's parameters. Both pointers may be null.
struct BlockStats {
  float* found_inf;
  double* partials;  // one per block
};

inline BlockStats block_stats(const GradStats& grad_stats, double* partials) {
  return BlockStats{grad_stats.found_inf, grad_stats.sumsq != nullptr ? partials : nullptr};
}

// Without a sum, there is one run per chunk.
inline Runs runs_of(int64_t num_chunks, const BlockStats& grad_stats) {
  return runs_of(num_chunks, grad_stats.partials != nullptr ? kMaxPartials : num_chunks);
}

// Non-zero if a value in the word has an exponent of all ones: adding one to such an exponent carries into the sign.
template <typename T>
__device__ __forceinline__ uint32_t nonfinite_bits(uint32_t word) {
  constexpr bool kIsFloat = std::is_same<T, float>::value;
  constexpr uint32_t kSigns = kIsFloat ? 0x80000000u : 0x80008000u;
  constexpr uint32_t kOnes = kIsFloat ? 0x00800000u : std::is_same<T, BFloat16>::value ? 0x00800080u : 0x04000400u;
  return ((word & ~kSigns) + kOnes) & kSigns;
}

// The statistics of one thread. If a sum is wanted, the sum also detects inf and NaN (see math/unscale.h).
struct ThreadStats {
  bool want_sumsq;
  uint32_t nonfinite = 0;
  double sumsq = 0.0;

  template <typename T, int kElements>
  __device__ __forceinline__ void add(const Vector<T, kElements>& stored) {
    if (want_sumsq) {
#pragma unroll
      for (int k = 0; k < kElements; ++k) add_square(to_float(stored.x[k]));
    } else {
#pragma unroll
      for (int w = 0; w < stored.kWords; ++w) nonfinite |= nonfinite_bits<T>(word(stored, w));
    }
  }

  template <typename T>
  __device__ __forceinline__ void add(T stored) {
    if (want_sumsq) {
      add_square(to_float(stored));
    } else {
      nonfinite |= uint32_t(is_nonfinite(stored));
    }
  }

 private:
  // The same bits as sumsq + square(x): the square is exact in fp64, so both round once.
  __device__ __forceinline__ void add_square(float x) { sumsq = fma(double(x), double(x), sumsq); }
};

// Returns the block's sum to thread 0. It adds up each column, then the columns. All threads of the block must call it.
template <int kNumThreads>
__device__ __forceinline__ double block_sum(double value) {
  constexpr int kRows = kNumThreads >= 1024 ? 32 : kNumThreads >= 256 ? 16 : 4;
  constexpr int kColumns = kNumThreads / kRows;
  static_assert(kRows * kColumns == kNumThreads, "no thread may be left out");
  __shared__ double sums[kNumThreads];
  __shared__ double column_sums[kColumns];
  sums[threadIdx.x] = value;
  __syncthreads();

  if (threadIdx.x < kColumns) {
    double sum = 0.0;
#pragma unroll
    for (int row = 0; row < kRows; ++row) sum += sums[row * kColumns + threadIdx.x];
    column_sums[threadIdx.x] = sum;
  }
  __syncthreads();

  double sum = 0.0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) sum += column_sums[column];
  }
  return sum;
}

// The blocks that saw an inf all store the same 1, so their order does not matter.
__device__ __forceinline__ void finish_block(const ThreadStats& stats, const BlockStats& grad_stats) {
  bool nonfinite = false;
  if (grad_stats.partials != nullptr) {
    const double sum = block_sum<kThreads>(stats.sumsq);
    nonfinite = is_nonfinite(sum);
    if (threadIdx.x == 0) grad_stats.partials[blockIdx.x] = sum;
  } else if (grad_stats.found_inf != nullptr) {
    nonfinite = __syncthreads_or(stats.nonfinite != 0);
  }
  if (nonfinite && threadIdx.x == 0 && grad_stats.found_inf != nullptr) *grad_stats.found_inf = 1.0f;
}

// Adds partials[0 .. num_partials) to *grad_stats.sumsq if that is wanted. Defined in grad_stats.cu.
void finish_sumsq(const GradStats& grad_stats, const double* partials, int num_partials, cudaStream_t stream);

}  // namespace cuda
}  // namespace pyzero
