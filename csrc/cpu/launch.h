// The CPU launchers: choose the ISA, cut the work into chunks, run them on num_threads threads.
#pragma once

#include "args.h"

namespace pyzero {
namespace cpu {

void adam(const AdamArgs& args, int num_threads);
void lion(const LionArgs& args, int num_threads);
void sgd(const SgdArgs& args, int num_threads);
void unscale(const UnscaleArgs& args, int num_threads);
void pack(const PackArgs& args, int num_threads);
void reduce_scatter(const ReduceScatterArgs& args, int num_threads);

// These compute a few numbers per call or parameter, which is not worth a thread.
void step_scalars(const StepScalarsArgs& args);
void loss_scale_update(float* state, const float* found_inf, const LossScalePolicy& policy);

// The ISAs that were built and that this processor runs, best first.
std::vector<const char*> isas();
// For tests: later calls use this ISA. Returns false if it was not built or does not run here.
bool use_isa(const char* name);

}  // namespace cpu
}  // namespace pyzero
