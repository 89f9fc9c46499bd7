// The kernels of one ISA: plain loops over [begin, end), without threads or the standard library.
//
// kernels.cpp is compiled once per ISA into a namespace of its own. It must not instantiate any template of the
// standard library: the linker keeps one copy for all ISAs, which might use instructions that an old processor lacks.
#pragma once

#include "args.h"
#include "math/unscale.h"

namespace pyzero {

struct ReduceSpan {
  float* shard;
  const void* const* slices;
  int num_slices;
  DType dtype;
  float scale;
  bool accumulate;
  bool non_temporal;  // non-temporal stores; not with accumulate, which reads the shard
};

struct GradSpan {
  const Buffer& values;
  int64_t offset;  // in the shard, of the first value
};

enum class Wanted { kNothing, kFlag, kSumsq };  // the statistic of the values that a pass stores

struct KernelTable {
  const char* name;
  // These update the elements [begin, end), which share the constants and lie in one gradient.
  void (*adam)(const AdamArgs& args, const GradSpan& grad, const AdamConstants& constants, float grad_scale,
               int64_t begin, int64_t end);
  void (*lion)(const LionArgs& args, const GradSpan& grad, const LionConstants& constants, float grad_scale,
               int64_t begin, int64_t end);
  void (*sgd)(const SgdArgs& args, const GradSpan& grad, float lr, bool is_first, float grad_scale, int64_t begin,
              int64_t end);
  // dst[begin, end) = round(factor * src[begin, end)). dst may be src. If dst has no data, the pass only reads src.
  // Returns the sum of squares of the stored values for kSumsq, and NaN or 0 for kFlag. Either is finite if and
  // only if all these values are.
  double (*scale)(const Buffer& dst, const Buffer& src, float factor, Wanted wanted, int64_t begin, int64_t end);
  void (*stream_copy)(const void* src, void* dst, int64_t num_bytes);  // non-temporal stores
  double (*reduce)(const ReduceSpan& span, bool want_sumsq, int64_t begin, int64_t end);
};

}  // namespace pyzero
