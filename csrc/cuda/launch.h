// The CUDA launchers: one per op, on the calling thread's current device. All only enqueue work on `stream`; none reads
// anything back, allocates or copies, so all can be captured in a CUDA graph. A failed launch throws
// std::runtime_error.
#pragma once

#include <cuda_runtime.h>

#include "../args.h"

namespace pyzero {
namespace cuda {

constexpr int kMaxRanks = 1024;  // slices of one reduce_scatter: their addresses travel as kernel parameters

// constants: num_segments entries; used, and needed, only where lr or step is on the device.
void adam(const AdamArgs& args, AdamConstants* constants, cudaStream_t stream);

void lion(const LionArgs& args, cudaStream_t stream);

// partials: max_blocks() entries; used, and needed, only where a sum of squares is asked for.
void unscale(const UnscaleArgs& args, double* partials, cudaStream_t stream);
void pack(const PackArgs& args, double* partials, cudaStream_t stream);
void reduce_scatter(const ReduceScatterArgs& args, double* partials, cudaStream_t stream);

void loss_scale_update(float* state, const float* found_inf, const LossScalePolicy& policy, cudaStream_t stream);

int max_blocks();  // of any launch on the current device

}  // namespace cuda
}  // namespace pyzero
