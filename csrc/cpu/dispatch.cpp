// Which ISA's kernels run on this processor, and how their work is cut into chunks for the threads.
#if defined(PYZERO_HAVE_AVX2) || defined(PYZERO_HAVE_AVX512)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "launch.h"
#include "math/step_scalars.h"
#include "parallel_for.h"

namespace pyzero {

namespace baseline {
extern const KernelTable kKernels;
}
#if defined(PYZERO_HAVE_AVX2)
namespace avx2 {
extern const KernelTable kKernels;
}
#endif
#if defined(PYZERO_HAVE_AVX512)
namespace avx512 {
extern const KernelTable kKernels;
}
#endif

namespace cpu {
namespace {

// 32k elements are some 0.9 MB of Adam's traffic: enough to hide a hand-over, and few enough to balance two cores.
constexpr int64_t kChunk = 32768;
// Shards and buckets from this size on are written with non-temporal stores. The model's other gradients would evict a
// shard from the caches before Adam reads it. Two bf16 slices of 32M elements are reduced in 28 ms instead of 38 on one
// Zen 3 core, and in 30 instead of 42 on two. A bucket is read by other ranks of the host. 24 MiB on each of two cores
// are packed in 1.55 ms instead of 2.0.
constexpr int64_t kStreamBytes = 4 << 20;
constexpr int64_t kStreamPieceBytes = 4096;  // smaller pieces of a bucket are copied by memcpy
static_assert(kChunk % kSegmentGranule == 0, "a chunk holds whole granules");

#if defined(PYZERO_HAVE_AVX2) || defined(PYZERO_HAVE_AVX512)
// This asks cpuid, because __builtin_cpu_supports knows "f16c" only from GCC 11 on.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

std::vector<const KernelTable*> find_tables() {
  std::vector<const KernelTable*> tables;
#if defined(PYZERO_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && has_f16c())
    tables.push_back(&avx512::kKernels);
#endif
#if defined(PYZERO_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && has_f16c()) tables.push_back(&avx2::kKernels);
#endif
  tables.push_back(&baseline::kKernels);
  return tables;
}

const std::vector<const KernelTable*>& tables() {
  static const std::vector<const KernelTable*> found = find_tables();
  return found;
}

std::atomic<const KernelTable*> g_chosen{nullptr};

const KernelTable& kernels() {
  const KernelTable* chosen = g_chosen.load(std::memory_order_acquire);
  return chosen != nullptr ? *chosen : *tables().front();
}

double read(const Scalar& scalar) { return scalar.device != nullptr ? double(*scalar.device) : scalar.value; }

Wanted wanted_by(const GradStats& grad_stats) {
  if (grad_stats.sumsq != nullptr) return Wanted::kSumsq;
  return grad_stats.found_inf != nullptr ? Wanted::kFlag : Wanted::kNothing;
}

// Adds the chunks in order, so that the sum does not depend on the number of threads.
void write_grad_stats(const GradStats& grad_stats, const std::vector<double>& chunks) {
  double sumsq = 0.0;
  for (const double chunk : chunks) sumsq += chunk;
  if (grad_stats.found_inf != nullptr && is_nonfinite(sumsq)) *grad_stats.found_inf = 1.0f;
  if (grad_stats.sumsq == nullptr) return;
  if (grad_stats.sumsq_is_double) {
    *static_cast<double*>(grad_stats.sumsq) += sumsq;
  } else {
    float* out = static_cast<float*>(grad_stats.sumsq);
    *out = float(double(*out) + sumsq);
  }
}

struct Chunk {
  int64_t which, begin, end;
};

// Calls task(index of the buffer, begin, end) for each chunk of a list of buffers. A thread takes at least kChunk
// elements at a time (except the last ones): waking a thread costs as much as processing many small tensors.
template <typename Task>
void for_each_chunk(const std::vector<Buffer>& list, int num_threads, const GradStats& grad_stats, const Task& task) {
  std::vector<Chunk> chunks;
  std::vector<int64_t> first_of_share;
  int64_t share_numel = kChunk;
  for (int64_t which = 0; which < int64_t(list.size()); ++which) {
    for (int64_t begin = 0; begin < list[which].numel; begin += kChunk) {
      if (share_numel >= kChunk) {
        first_of_share.push_back(int64_t(chunks.size()));
        share_numel = 0;
      }
      chunks.push_back({which, begin, std::min(begin + kChunk, list[which].numel)});
      share_numel += chunks.back().end - begin;
    }
  }
  first_of_share.push_back(int64_t(chunks.size()));
  std::vector<double> sumsq(chunks.size());
  parallel_for(int64_t(first_of_share.size()) - 1, num_threads, [&](int64_t share) {
    for (int64_t i = first_of_share[share]; i < first_of_share[share + 1]; ++i) {
      sumsq[i] = task(chunks[i].which, chunks[i].begin, chunks[i].end);
    }
  });
  write_grad_stats(grad_stats, sumsq);
}

// Whether [begin, end) lies in one segment. The loop has no early exit, so that compilers vectorise it.
bool is_one_segment(const int32_t* segment_ids, int64_t begin, int64_t end) {
  const int64_t first = begin / kSegmentGranule, stop = (end + kSegmentGranule - 1) / kSegmentGranule;
  int32_t differing = 0;
  for (int64_t i = first; i < stop; ++i) differing |= segment_ids[i] ^ segment_ids[first];
  return differing == 0;
}

// Calls body(segment, from, to) for each run of one active segment within [begin, end).
template <typename Body>
void for_each_run(const ShardArgs& args, int64_t begin, int64_t end, const Body& body) {
  if (args.segment_ids == nullptr) return body(0, begin, end);
  const bool is_one = is_one_segment(args.segment_ids, begin, end);
  for (int64_t at = begin; at < end;) {
    const int32_t segment = args.segment_ids[at / kSegmentGranule];
    int64_t stop = is_one ? end : at + kSegmentGranule;
    while (stop < end && args.segment_ids[stop / kSegmentGranule] == segment) stop += kSegmentGranule;
    if (args.active == nullptr || args.active[segment] != 0.0f) body(segment, at, std::min(stop, end));
    at = stop;
  }
}

// Calls body(grad, segment, from, to) for all gradients of a shard, on several threads, unless found_inf is set.
template <typename Body>
void update_shard(const ShardArgs& args, int num_threads, const Body& body) {
  if (args.found_inf != nullptr && *args.found_inf != 0.0f) return;
  const ShardGrads& grads = args.grads;
  for_each_chunk(grads.tensors, num_threads, GradStats{}, [&](int64_t which, int64_t begin, int64_t end) {
    const GradSpan grad{grads.tensors[which], grads.offsets[which]};
    for_each_run(args, grad.offset + begin, grad.offset + end,
                 [&](int32_t segment, int64_t from, int64_t to) { body(grad, segment, from, to); });
    return 0.0;
  });
}

template <typename Args>
float signed_grad_scale(const Args& args) {
  const float scale = float(read(args.grad_scale));
  return args.hyper.maximize ? -scale : scale;
}

}  // namespace

void adam(const AdamArgs& args, int num_threads) {
  std::vector<AdamConstants> constants;  // one per segment
  for (int64_t segment = 0; segment < args.num_segments; ++segment) {
    const double step = args.step.device != nullptr ? double(args.step.device[segment]) : args.step.value;
    constants.push_back(adam_constants(args.hyper, read(args.lr), static_cast<long long>(step)));
  }
  const float grad_scale = signed_grad_scale(args);
  update_shard(args, num_threads, [&](const GradSpan& grad, int32_t segment, int64_t begin, int64_t end) {
    kernels().adam(args, grad, constants[segment], grad_scale, begin, end);
  });
}

void lion(const LionArgs& args, int num_threads) {
  const LionConstants constants = lion_constants(args.hyper, read(args.lr));
  const float grad_scale = signed_grad_scale(args);
  update_shard(args, num_threads, [&](const GradSpan& grad, int32_t, int64_t begin, int64_t end) {
    kernels().lion(args, grad, constants, grad_scale, begin, end);
  });
}

void sgd(const SgdArgs& args, int num_threads) {
  const float lr = float(read(args.lr));
  const float grad_scale = signed_grad_scale(args);
  update_shard(args, num_threads, [&](const GradSpan& grad, int32_t segment, int64_t begin, int64_t end) {
    const bool is_first = (args.step.device != nullptr ? args.step.device[segment] : args.step.value) == 1.0;
    kernels().sgd(args, grad, lr, is_first, grad_scale, begin, end);
  });
}

void unscale(const UnscaleArgs& args, int num_threads) {
  const float scale = float(read(args.inv_scale));
  const bool read_only = args.inv_scale.device == nullptr && args.inv_scale.value == 1.0;
  for_each_chunk(args.tensors, num_threads, args.grad_stats, [&](int64_t which, int64_t begin, int64_t end) {
    const Buffer& source = args.tensors[which];
    const Buffer target{read_only ? nullptr : source.data, source.dtype, source.numel};
    return kernels().scale(target, source, scale, wanted_by(args.grad_stats), begin, end);
  });
}

void pack(const PackArgs& args, int num_threads) {
  const float scale = float(read(args.scale));
  const int64_t item_bytes = element_size(args.bucket.dtype);
  const bool streams = scale == 1.0f && args.bucket.numel * item_bytes >= kStreamBytes;
  for_each_chunk(args.tensors, num_threads, GradStats{}, [&](int64_t which, int64_t begin, int64_t end) {
    const Buffer& source = args.tensors[which];
    char* slot = static_cast<char*>(args.bucket.data) + args.offsets[which] * item_bytes;
    const int64_t num_bytes = (end - begin) * item_bytes;
    if (streams && source.dtype == args.bucket.dtype && num_bytes >= kStreamPieceBytes) {
      const int64_t at = begin * item_bytes;
      kernels().stream_copy(static_cast<const char*>(source.data) + at, slot + at, num_bytes);
      return 0.0;
    }
    return kernels().scale(Buffer{slot, args.bucket.dtype, source.numel}, source, scale, Wanted::kNothing, begin, end);
  });
}

void reduce_scatter(const ReduceScatterArgs& args, int num_threads) {
  const bool non_temporal = !args.accumulate && args.numel * int64_t(sizeof(float)) >= kStreamBytes;
  const ReduceSpan span{args.shard,  args.slices.data(),      static_cast<int>(args.slices.size()),
                        args.dtype,  float(read(args.scale)), args.accumulate,
                        non_temporal};
  const std::vector<Buffer> whole(1, Buffer{args.shard, DType::kFloat32, args.numel});
  for_each_chunk(whole, num_threads, args.grad_stats, [&](int64_t, int64_t begin, int64_t end) {
    return kernels().reduce(span, wanted_by(args.grad_stats) != Wanted::kNothing, begin, end);
  });
}

void step_scalars(const StepScalarsArgs& args) {
  const StepScalars scalars = pyzero::step_scalars(args.stats, args.num_rows, args.clips, args.max_norm,
                                                   float(read(args.unscale)), float(read(args.factor)));
  args.out[0] = scalars.found_inf;
  args.out[1] = scalars.norm;
  args.out[2] = scalars.clip;
  args.out[3] = scalars.grad_scale;
  if (scalars.found_inf != 0.0f) return;
  for (int64_t i = 0; i < args.num_params; ++i) args.steps[i] += args.used[i];
}

void loss_scale_update(float* state, const float* found_inf, const LossScalePolicy& policy) {
  pyzero::loss_scale_update(state, *found_inf != 0.0f, policy);
}

std::vector<const char*> isas() {
  std::vector<const char*> names;
  for (const KernelTable* table : tables()) names.push_back(table->name);
  return names;
}

bool use_isa(const char* name) {
  for (const KernelTable* table : tables()) {
    if (std::strcmp(table->name, name) != 0) continue;
    g_chosen.store(table, std::memory_order_release);
    return true;
  }
  return false;
}

}  // namespace cpu
}  // namespace pyzero
