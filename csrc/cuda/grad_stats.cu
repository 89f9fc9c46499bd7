// The last part of a deterministic sum of squares.
#include "grad_stats.cuh"

namespace pyzero {
namespace cuda {
namespace {

constexpr int kFinishThreads = 4 * kThreads;
constexpr int kPerThread = (kMaxPartials + kFinishThreads - 1) / kFinishThreads;

struct FinishParams {
  const double* partials;
  int num_partials;
  void* sumsq;
  bool is_double;
};

// One block. Bytes: 8 read per block of the pass before.
__global__ void __launch_bounds__(kFinishThreads) finish_sumsq_kernel(const __grid_constant__ FinishParams params) {
  double partials[kPerThread];  // all loads are issued before the first add
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int i = k * kFinishThreads + int(threadIdx.x);
    partials[k] = i < params.num_partials ? params.partials[i] : 0.0;
  }

  double sum = 0.0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) sum += partials[k];
  sum = block_sum<kFinishThreads>(sum);

  if (threadIdx.x != 0) return;
  if (params.is_double) {
    *static_cast<double*>(params.sumsq) += sum;
  } else {
    float* sumsq = static_cast<float*>(params.sumsq);
    *sumsq = float(double(*sumsq) + sum);
  }
}

}  // namespace

void finish_sumsq(const GradStats& grad_stats, const double* partials, int num_partials, cudaStream_t stream) {
  if (grad_stats.sumsq == nullptr) return;
  const FinishParams params{partials, num_partials, grad_stats.sumsq, grad_stats.sumsq_is_double};
  launch(finish_sumsq_kernel, params, 1, stream, kFinishThreads);
}

}  // namespace cuda
}  // namespace pyzero
