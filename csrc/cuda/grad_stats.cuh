// What a pass over gradients reports: whether any value is inf or NaN, and the sum of squares.
//
// The sum is the same from run to run, and on every GPU: no float atomics, and a grid that depends on the sizes alone.
// Each block leaves one fp64 number in the workspace, and a kernel of one block adds those in order.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../math/unscale.h"
#include "launch.cuh"
#include "vector_io.cuh"

namespace pyzero {
namespace cuda {

// In the kernels' parameters; both may be null.
struct BlockStats {
  float* found_inf;
  double* partials;  // one per block
};

inline BlockStats block_stats(const GradStats& grad_stats, double* partials) {
  return BlockStats{grad_stats.found_inf, grad_stats.sumsq != nullptr ? partials : nullptr};
}

// One run per chunk where no sum is wanted.
inline Runs runs_of(int64_t num_chunks, const BlockStats& grad_stats) {
  return runs_of(num_chunks, grad_stats.partials != nullptr ? kMaxPartials : num_chunks);
}

// Exponents of all ones in a word, as non-zero bits: one added to such an exponent carries into the sign's place.
template <typename T>
__device__ __forceinline__ uint32_t nonfinite_bits(uint32_t word) {
  constexpr bool kIsFloat = std::is_same<T, float>::value;
  constexpr uint32_t kSigns = kIsFloat ? 0x80000000u : 0x80008000u;
  constexpr uint32_t kOnes = kIsFloat ? 0x00800000u : std::is_same<T, BFloat16>::value ? 0x00800080u : 0x04000400u;
  return ((word & ~kSigns) + kOnes) & kSigns;
}

// What a thread has seen so far. Where a sum is wanted it answers for inf and NaN too (see math/unscale.h).
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
  // sumsq + square(x): that square is exact in fp64, so to round once is to round as often.
  __device__ __forceinline__ void add_square(float x) { sumsq = fma(double(x), double(x), sumsq); }
};

// The block's sum, in a fixed order, for thread 0: column by column, then the columns. All threads must come here.
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

// Adds partials[0 .. num_partials) to *grad_stats.sumsq, where that is wanted. In grad_stats.cu.
void finish_sumsq(const GradStats& grad_stats, const double* partials, int num_partials, cudaStream_t stream);

}  // namespace cuda
}  // namespace pyzero
