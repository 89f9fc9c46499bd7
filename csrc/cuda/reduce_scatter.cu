// reduce_scatter_ sums all ranks' slices in rank order into this rank's shard, scales and checks it, in one pass.
#include "../math/reduce_scatter.h"
#include "grad_stats.cuh"
#include "vector_io.cuh"

namespace pyzero {
namespace cuda {
namespace {

// kRanks is the number of ranks, whose loads are issued together. kAnyRanks means a loop over the slices.
constexpr int kAnyRanks = 0;
constexpr int kMaxSlices = sizeof(void*) * kMaxRanks + 256 <= kParameterBytes ? kMaxRanks : 448;

template <int kRanks>
struct ReduceParams {
  float* shard;
  Span span;
  Runs runs;
  DeviceScalar scale;
  BlockStats grad_stats;
  int num_ranks;
  const void* slices[kRanks == kAnyRanks ? kMaxSlices : kRanks];
};

template <typename T, int kRanks, bool kAccumulate>
struct ReduceBody {
  const ReduceParams<kRanks>& params;
  float scale;
  ThreadStats& stats;

  struct Inputs {
    Vector<float> shard;  // used if kAccumulate
    Vector<T> slices[kRanks == kAnyRanks ? 1 : kRanks];
  };

  __device__ __forceinline__ const T* slice(int rank) const { return static_cast<const T*>(params.slices[rank]); }

  __device__ __forceinline__ Inputs load(int64_t i) const {
    Inputs in{};
    if (kAccumulate) in.shard = load_vector(params.shard + i);
#pragma unroll
    for (int r = 0; r < (kRanks == kAnyRanks ? 1 : kRanks); ++r) in.slices[r] = load_vector(slice(r) + i);
    return in;
  }

  __device__ __forceinline__ void finish(int64_t i, const Inputs& in) const {
    Vector<float> sum;
#pragma unroll
    for (int k = 0; k < sum.kSize; ++k) sum.x[k] = to_float(in.slices[0].x[k]);

    if constexpr (kRanks == kAnyRanks) {
#pragma unroll 4  // four loads in flight
      for (int r = 1; r < params.num_ranks; ++r) add(sum, load_vector(slice(r) + i));
    } else {
#pragma unroll
      for (int r = 1; r < kRanks; ++r) add(sum, in.slices[r]);
    }

#pragma unroll
    for (int k = 0; k < sum.kSize; ++k) sum.x[k] = reduce_finish<kAccumulate>(in.shard.x[k], sum.x[k], scale);
    stats.add(sum);
    store_vector(params.shard + i, sum);
  }

  __device__ __forceinline__ static void add(Vector<float>& sum, const Vector<T>& slice) {
#pragma unroll
    for (int k = 0; k < sum.kSize; ++k) sum.x[k] = reduce_add(sum.x[k], to_float(slice.x[k]));
  }

  __device__ __forceinline__ void element(int64_t i) const {
    float sum = to_float(slice(0)[i]);
#pragma unroll 4
    for (int r = 1; r < params.num_ranks; ++r) sum = reduce_add(sum, to_float(slice(r)[i]));
    sum = reduce_finish<kAccumulate>(kAccumulate ? params.shard[i] : 0.0f, sum, scale);
    stats.add(sum);
    params.shard[i] = sum;
  }
};

// Vectors per thread and slice: few ranks leave room for more loads at once.
template <typename T, int kRanks>
constexpr int kReduceUnroll = kRanks == 1 || kRanks == 2 ? 4
                              : kRanks * sizeof(T) == 32 ? 1
                                                         : 2;

// Bytes per element: its size in each rank's slice read, 4 written, and 4 more read to accumulate. For two bf16: 8.
template <typename T, int kRanks, bool kAccumulate>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    reduce_scatter_kernel(const __grid_constant__ ReduceParams<kRanks> params) {
  ThreadStats stats{params.grad_stats.partials != nullptr};
  const ReduceBody<T, kRanks, kAccumulate> body{params, read(params.scale), stats};
  for (int64_t chunk = params.runs.begin(blockIdx.x); chunk < params.runs.end(blockIdx.x); ++chunk) {
    visit_chunk<kReduceUnroll<T, kRanks>>(params.span, chunk, body);
  }
  finish_block(stats, params.grad_stats);
}

Span reduce_span(const ReduceScatterArgs& args) {
  std::vector<Operand> operands{Operand{args.shard, DType::kFloat32}};
  for (const void* slice : args.slices) operands.push_back(Operand{slice, args.dtype});
  return span_of(args.numel, operands);
}

template <typename T, int kRanks>
void reduce(const ReduceScatterArgs& args, double* partials, cudaStream_t stream) {
  ReduceParams<kRanks> params{};
  params.shard = args.shard;
  params.span = reduce_span(args);
  params.scale = device_scalar(args.scale);
  params.grad_stats = block_stats(args.grad_stats, partials);
  params.runs = runs_of(num_chunks(params.span, kChunk<kReduceUnroll<T, kRanks>>), params.grad_stats);
  params.num_ranks = int(args.slices.size());
  std::copy(args.slices.begin(), args.slices.end(), params.slices);
  const auto kernel =
      args.accumulate ? reduce_scatter_kernel<T, kRanks, true> : reduce_scatter_kernel<T, kRanks, false>;
  launch(kernel, params, params.runs.num_blocks(), stream);
  finish_sumsq(args.grad_stats, partials, params.runs.num_blocks(), stream);
}

template <typename T>
void reduce(const ReduceScatterArgs& args, double* partials, cudaStream_t stream) {
  switch (args.slices.size()) {
    case 1:
      return reduce<T, 1>(args, partials, stream);
    case 2:
      return reduce<T, 2>(args, partials, stream);
    case 4:
      return reduce<T, 4>(args, partials, stream);
    case 8:
      return reduce<T, 8>(args, partials, stream);
    default:
      return reduce<T, kAnyRanks>(args, partials, stream);
  }
}

}  // namespace

void reduce_scatter(const ReduceScatterArgs& args, double* partials, cudaStream_t stream) {
  if (args.slices.empty() || args.slices.size() > size_t(kMaxSlices)) {
    throw std::invalid_argument("expected 1 to " + std::to_string(kMaxSlices) + " slices, one per rank, got " +
                                std::to_string(args.slices.size()) +
                                "; reduce within each node first, then between nodes");
  }
  if (args.numel == 0) return;
  switch (args.dtype) {
    case DType::kFloat32:
      return reduce<float>(args, partials, stream);
    case DType::kBFloat16:
      return reduce<BFloat16>(args, partials, stream);
    default:
      return reduce<Float16>(args, partials, stream);
  }
}

}  // namespace cuda
}  // namespace pyzero
