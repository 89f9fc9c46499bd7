// What every launcher shares on the host side: block and grid sizes, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace pyzero {
namespace cuda {

#ifndef PYZERO_THREADS_PER_BLOCK  // the host shim makes a block of fewer threads
#define PYZERO_THREADS_PER_BLOCK 256
#endif

constexpr int kThreads = PYZERO_THREADS_PER_BLOCK;
// Allows 80 registers. Left alone, ptxas 13.0 aims at 40 in some kernels and spills there; so it does when held to 64.
constexpr int kMinBlocks = 3;
constexpr int kBlocksPerMultiprocessor = 8;  // 2048 threads: as many as any target keeps resident

inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // a launch error must not surface again in the next, innocent call
  throw std::runtime_error(std::string("CUDA error while ") + doing + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

inline int num_blocks(int64_t num_chunks) { return int(std::min<int64_t>(num_chunks, max_blocks())); }

}  // namespace cuda
}  // namespace pyzero
