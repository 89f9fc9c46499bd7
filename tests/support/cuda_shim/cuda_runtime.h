// Replaces CUDA's header when g++ compiles csrc/cuda/*.cu. A block's threads are real threads, __syncthreads is a real
// barrier, and __shared__ memory is really shared, so that sanitizers see what kernels do. Blocks run one after
// another, so that races between blocks go unseen. So does everything that depends on warps or on device memory.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define CUDART_VERSION 12010

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheShim"; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_shim {

// The running block uses its two barriers in turn. To the thread sanitizer, a thread that leaves a barrier late comes
// after all threads that have reached the barrier by then. A single barrier would thus hide races from it.
inline pthread_barrier_t barriers[2];
inline thread_local unsigned turn = 0;
inline std::atomic<int> votes{0};

inline void wait() { pthread_barrier_wait(&barriers[turn++ % 2]); }

}  // namespace cuda_shim

inline void __syncthreads() { cuda_shim::wait(); }
inline void __syncwarp() {}

// The vote is relaxed, like the hardware's: it orders no data between threads. The barriers around it do.
inline int __syncthreads_or(int predicate) {
  if (predicate) cuda_shim::votes.store(1, std::memory_order_relaxed);
  cuda_shim::wait();
  const int result = cuda_shim::votes.load(std::memory_order_relaxed);
  cuda_shim::wait();
  cuda_shim::votes.store(0, std::memory_order_relaxed);
  cuda_shim::wait();
  return result;
}

// Returns when the kernel has run. Each launch creates its threads: a pool would not survive a fork.
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const unsigned num_threads = config->blockDim.x;
  if (config->gridDim.x == 0 || num_threads == 0 || num_threads > 1024) return cudaErrorInvalidConfiguration;
  for (auto& barrier : cuda_shim::barriers) pthread_barrier_init(&barrier, nullptr, num_threads);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < num_threads; ++t) {
    threads.emplace_back([&, t] {
      threadIdx = dim3(t);
      blockDim = config->blockDim;
      gridDim = config->gridDim;
      for (unsigned b = 0; b < gridDim.x; ++b) {
        blockIdx = dim3(b);
        kernel(args...);
        cuda_shim::wait();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (auto& barrier : cuda_shim::barriers) pthread_barrier_destroy(&barrier);
  return cudaSuccess;
}
