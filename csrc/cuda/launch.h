// The CUDA launchers: one per op, on the calling thread's current device. All only enqueue work on `stream`; none reads
// anything back, allocates or copies, so all can be captured in a CUDA graph. A failed launch throws
// std::runtime_error.
#pragma once

#include <cuda_runtime.h>

#include "../args.h"

namespace pyzero {
namespace cuda {

#ifndef PYZERO_MAX_PARTIALS  // the host shim makes fewer blocks
#define PYZERO_MAX_PARTIALS 16384
#endif

// Blocks of a launch that takes a sum: on any GPU many times as many as are resident, yet added up in microseconds.
constexpr int kMaxPartials = PYZERO_MAX_PARTIALS;
constexpr int kMaxRanks = 1024;  // slices of one reduce_scatter: their addresses travel as kernel parameters

// constants: num_segments entries; used, and needed, only where lr or step is on the device.
void adam(const AdamArgs& args, AdamConstants* constants, cudaStream_t stream);

void lion(const LionArgs& args, cudaStream_t stream);
void sgd(const SgdArgs& args, cudaStream_t stream);

// partials: kMaxPartials entries; used, and needed, only where a sum of squares is asked for.
void unscale(const UnscaleArgs& args, double* partials, cudaStream_t stream);
void pack(const PackArgs& args, cudaStream_t stream);
void reduce_scatter(const ReduceScatterArgs& args, double* partials, cudaStream_t stream);

void step_scalars(const StepScalarsArgs& args, cudaStream_t stream);
void loss_scale_update(float* state, const float* found_inf, const LossScalePolicy& policy, cudaStream_t stream);

}  // namespace cuda
}  // namespace pyzero
