// The per-ISA kernels: straight loops over [begin, end), no threads, no standard library.
//
// kernels.cpp is compiled once per ISA into a namespace of its own. It must not instantiate any template of the
// standard library: the linker would keep one copy for all ISAs, and an old processor could then run a new one's.
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
  bool non_temporal;  // stores past the caches; never where the shard is read, too
};

struct GradSpan {
  const Buffer& values;
  int64_t offset;  // of the first in the shard
};

enum class Wanted { kNothing, kFlag, kSumsq };  // statistics of the values that a pass has stored

struct KernelTable {
  const char* name;
  // The elements [begin, end), which share the constants and lie in one gradient.
  void (*adam)(const AdamArgs& args, const GradSpan& grad, const AdamConstants& constants, float grad_scale,
               int64_t begin, int64_t end);
  void (*lion)(const LionArgs& args, const GradSpan& grad, const LionConstants& constants, float grad_scale,
               int64_t begin, int64_t end);
  void (*sgd)(const SgdArgs& args, const GradSpan& grad, float lr, bool is_first, float grad_scale, int64_t begin,
              int64_t end);
  // dst[begin, end) = round(factor * src[begin, end)); dst may be src, or have no data: then the pass only reads.
  // Returns the sum of squares of what was stored where asked for, NaN or 0 where only the flag is: either is not
  // finite exactly where some value was not.
  double (*scale)(const Buffer& dst, const Buffer& src, float factor, Wanted wanted, int64_t begin, int64_t end);
  void (*stream_copy)(const void* src, void* dst, int64_t num_bytes);  // past the caches
  double (*reduce)(const ReduceSpan& span, bool want_sumsq, int64_t begin, int64_t end);
};

}  // namespace pyzero
