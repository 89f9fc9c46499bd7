// Shared by all launchers on the host: block and grid sizes, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../math/types.h"
#include "launch.h"

namespace pyzero {
namespace cuda {

#ifndef PYZERO_THREADS_PER_BLOCK  // the host shim uses smaller blocks
#define PYZERO_THREADS_PER_BLOCK 256
#endif

constexpr int kThreads = PYZERO_THREADS_PER_BLOCK;
constexpr int kMinBlocks = 4;  // of kernels with many operands: leaves 64 registers, which hold all loads of a chunk

inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // clears the error, or the next call would report it
  throw std::runtime_error(std::string("CUDA error while ") + doing + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Chunks in runs, one run per block. There are as many blocks as chunks, or almost `max_blocks`. The grid is not cut
// down to the resident blocks: multiprocessors differ in bandwidth, and one that is done takes the next block.
struct Runs {
  int64_t num_chunks;
  int64_t length;  // chunks per run

  int num_blocks() const { return int((num_chunks + length - 1) / length); }
  PZ_HD int64_t begin(unsigned block) const { return block * length; }
  PZ_HD int64_t end(unsigned block) const { return num_chunks < begin(block + 1) ? num_chunks : begin(block + 1); }
};

inline Runs runs_of(int64_t num_chunks, int64_t max_blocks) {
  return Runs{num_chunks, std::max<int64_t>(1, (num_chunks + max_blocks - 1) / max_blocks)};
}

}  // namespace cuda
}  // namespace pyzero
