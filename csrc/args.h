// The arguments of the launchers in csrc/cpu and csrc/cuda: raw pointers, sizes and scalars.
#pragma once

#include <cstdint>
#include <vector>

#include "math/adam.h"
#include "math/lion.h"
#include "math/loss_scale.h"
#include "math/sgd.h"
#include "math/types.h"

namespace pyzero {

constexpr int64_t kSegmentGranule = 64;  // elements that share one entry of ShardArgs::segment_ids
constexpr int kMaxParamOuts = 16;        // per call: a rank's own weights, and those of its peers on the host

// A number, or an fp32 value on the device. `value` is ignored if `device` is not null.
struct Scalar {
  double value = 0.0;
  const float* device = nullptr;
};

struct Buffer {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t numel = 0;
};

// The gradients of a shard: one or several tensors. Elements that none of them covers are not updated.
struct ShardGrads {
  std::vector<Buffer> tensors;   // of one dtype
  std::vector<int64_t> offsets;  // into the shard, ascending, multiples of kSegmentGranule

  DType dtype() const { return tensors.front().dtype; }
  bool is_whole() const { return tensors.size() == 1 && offsets[0] == 0; }  // may end early
};

// Outputs of the updated weights: none, or several (numel,) of one dtype. No std::vector: see csrc/cpu/kernels.h.
struct ParamOuts {
  Buffer buffers[kMaxParamOuts];
  int count = 0;

  DType dtype() const { return buffers[0].dtype; }
};

// The arguments of every update rule: a flat shard and its gradients.
struct ShardArgs {
  float* master;  // (numel,)
  ParamOuts param_outs;
  int64_t numel;
  ShardGrads grads;
  Scalar lr;
  Scalar grad_scale;
  const float* found_inf;      // if it is not 0, nothing is written; may be null
  const int32_t* segment_ids;  // (ceil(numel / kSegmentGranule),), or null: one segment
  const float* active;         // (num_segments,): 0 if the segment is not updated; may be null
};

struct AdamArgs : ShardArgs {
  float* exp_avg;     // (numel,)
  float* exp_avg_sq;  // (numel,)
  AdamHyper hyper;
  Scalar step;  // step.device: (num_segments,)
  int64_t num_segments;
};

// Lion has no step count. Segments only say which elements are active.
struct LionArgs : ShardArgs {
  float* exp_avg;  // (numel,)
  LionHyper hyper;
};

struct SgdArgs : ShardArgs {
  float* momentum_buffer;  // (numel,), or null: no momentum
  SgdHyper hyper;
  Scalar step;  // at step 1 the gradient is not dampened. step.device: (num_segments,)
};

// The outputs of a pass over gradients. Both pointers may be null.
struct GradStats {
  float* found_inf = nullptr;  // set to 1, never cleared
  void* sumsq = nullptr;       // the sum is added to it
  bool sumsq_is_double = false;
};

struct UnscaleArgs {
  std::vector<Buffer> tensors;
  Scalar inv_scale;
  GradStats grad_stats;
};

struct StepScalarsArgs {
  float* out;           // (4,)
  const double* stats;  // (num_rows, kStatsColumns)
  int64_t num_rows;
  bool clips;
  float max_norm;
  Scalar unscale;
  Scalar factor;
  float* steps;       // (num_params,)
  const float* used;  // (num_params,)
  int64_t num_params;
};

struct PackArgs {
  Buffer bucket;
  std::vector<Buffer> tensors;
  std::vector<int64_t> offsets;  // into the bucket, in elements
  Scalar scale;
};

struct ReduceScatterArgs {
  float* shard;               // (numel,)
  std::vector<void*> slices;  // one per rank, (numel,) each
  DType dtype;                // of the slices
  int64_t numel;
  Scalar scale;
  bool accumulate;
  GradStats grad_stats;
};

}  // namespace pyzero
