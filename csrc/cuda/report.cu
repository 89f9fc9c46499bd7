// The last step of a deterministic sum of squares, and the size of the grids whose blocks it adds up.
#include "report.cuh"

namespace pyzero {
namespace cuda {
namespace {

static_assert((kThreads & (kThreads - 1)) == 0, "block_sum halves");

struct FinishParams {
  const double* partials;
  int num_partials;
  void* sumsq;
  bool is_double;
};

// One block. Bytes: 8 per block of the pass before.
__global__ void __launch_bounds__(kThreads) finish_sumsq_kernel(const __grid_constant__ FinishParams params) {
  double sum = 0.0;
  for (int i = int(threadIdx.x); i < params.num_partials; i += kThreads) sum += params.partials[i];
  sum = block_sum(sum);

  if (threadIdx.x != 0) return;
  if (params.is_double) {
    *static_cast<double*>(params.sumsq) += sum;
  } else {
    float* sumsq = static_cast<float*>(params.sumsq);
    *sumsq = float(double(*sumsq) + sum);
  }
}

}  // namespace

void finish_sumsq(const Report& report, const double* partials, int num_partials, cudaStream_t stream) {
  if (report.sumsq == nullptr) return;
  launch(finish_sumsq_kernel, FinishParams{partials, num_partials, report.sumsq, report.sumsq_is_double}, 1, stream);
}

int max_blocks() {
  int device = 0;
  int multiprocessors = 0;
  check(cudaGetDevice(&device), "reading the current device");
  // No cache of ours: the runtime answers this one from memory.
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "counting multiprocessors");
  return multiprocessors * kBlocksPerMultiprocessor;
}

}  // namespace cuda
}  // namespace pyzero
