// The CUDA launchers, one per op. They only enqueue kernels on `stream`, on the calling thread's current device. They
// do not read back, allocate or copy, so a CUDA graph can capture them. A failed launch throws std::runtime_error.
#pragma once

#include <cuda_runtime.h>

#include "../args.h"

namespace pyzero {
namespace cuda {

#ifndef PYZERO_MAX_PARTIALS  // the host shim uses fewer blocks
#define PYZERO_MAX_PARTIALS 16384
#endif

// The most blocks of a launch that takes a sum: many times the resident blocks of any GPU, yet added in microseconds.
constexpr int kMaxPartials = PYZERO_MAX_PARTIALS;
constexpr int kMaxRanks = 1024;  // slices of one reduce_scatter; their addresses are kernel parameters

// constants: num_segments entries; may be null unless lr or step is on the device.
void adam(const AdamArgs& args, AdamConstants* constants, cudaStream_t stream);

void lion(const LionArgs& args, cudaStream_t stream);
void sgd(const SgdArgs& args, cudaStream_t stream);

// partials: kMaxPartials entries; may be null unless a sum of squares is wanted.
void unscale(const UnscaleArgs& args, double* partials, cudaStream_t stream);
void pack(const PackArgs& args, cudaStream_t stream);
void reduce_scatter(const ReduceScatterArgs& args, double* partials, cudaStream_t stream);

void step_scalars(const StepScalarsArgs& args, cudaStream_t stream);
void loss_scale_update(float* state, const float* found_inf, const LossScalePolicy& policy, cudaStream_t stream);

}  // namespace cuda
}  // namespace pyzero
