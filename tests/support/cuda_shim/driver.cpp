// Runs every CUDA kernel on the host shim over sizes, alignments and types, and compares each result with a plain loop
// over csrc/math, bit for bit. It uses no Python, so that a sanitizer can watch all of it.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/grid.h"
#include "cuda/launch.h"
#include "math/adam.h"
#include "math/lion.h"
#include "math/reduce_scatter.h"
#include "math/sgd.h"
#include "math/step_scalars.h"
#include "math/unscale.h"

using namespace pyzero;

namespace {

constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr int64_t kBlock = cuda::kThreads * 8;  // elements of two chunks of adam_; half a chunk of lists
#if defined(__SANITIZE_THREAD__)
const int64_t kSizes[] = {0, 1, 9, kBlock + 1, 41 * kBlock + 13};  // fewer, because each launch creates threads
#else
const int64_t kSizes[] = {0, 1, 7, 8, 9, kBlock - 1, kBlock, kBlock + 1, 4 * kBlock, 4 * kBlock + 9, 41 * kBlock + 13};
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kCanaryBytes = 0;  // the allocation ends with the last element: the sanitizer guards it
#else
constexpr size_t kCanaryBytes = 64;
#endif
constexpr char kCanary = 0x5a;

std::mt19937 generator(1);

int num_wrong = 0;

// Continues after a wrong value: the sanitizer may still find its cause.
void require(bool good, const char* op, const char* what, int64_t numel) {
  if (good || ++num_wrong > 5) return;
  std::fprintf(stderr, "%s: wrong %s at numel %lld\n", op, what, static_cast<long long>(numel));
}

// `numel` elements that begin `head` elements after a 16-byte boundary, with canaries on both sides.
class Array {
 public:
  Array(DType dtype, int64_t numel, int head = 0, float size = 1.0f)
      : dtype(dtype), numel(numel), element_(dtype == DType::kFloat32 ? 4 : 2), front_(head * element_) {
    const size_t bytes = front_ + size_t(numel) * element_ + kCanaryBytes;
    all_.reset(static_cast<char*>(std::malloc(bytes + (bytes == 0))));  // glibc's malloc aligns to 16 bytes
    std::memset(all_.get(), kCanary, bytes);
    std::normal_distribution<float> normal(0.0f, size);
    for (int64_t i = 0; i < numel; ++i) set(i, i % 97 == 5 ? normal(generator) * 1e-39f : normal(generator));
  }

  char* data() const { return all_.get() + front_; }
  float* floats() const { return reinterpret_cast<float*>(data()); }
  size_t bytes() const { return size_t(numel) * element_; }
  Buffer buffer() const { return Buffer{data(), dtype, numel}; }

  float get(int64_t i) const {
    if (dtype == DType::kFloat32) return read<float>(i);
    return dtype == DType::kBFloat16 ? to_float(read<BFloat16>(i)) : to_float(read<Float16>(i));
  }

  void set(int64_t i, float x) {
    if (dtype == DType::kFloat32) return write(i, x);
    return dtype == DType::kBFloat16 ? write(i, from_float<BFloat16>(x)) : write(i, from_float<Float16>(x));
  }

  Array copy() const {
    Array result(dtype, 0);
    result.numel = numel;
    result.all_.reset(static_cast<char*>(std::malloc(bytes() + 1)));
    std::memcpy(result.all_.get(), data(), bytes());
    return result;
  }

  bool equals(const Array& other) const { return std::memcmp(data(), other.data(), bytes()) == 0 && canaries_live(); }

  DType dtype;
  int64_t numel;

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };

  template <typename T>
  T read(int64_t i) const {
    T x;
    std::memcpy(&x, data() + i * sizeof(T), sizeof(T));
    return x;
  }

  template <typename T>
  void write(int64_t i, T x) {
    std::memcpy(data() + i * sizeof(T), &x, sizeof(T));
  }

  bool canaries_live() const {
    const auto live = [](char c) { return c == kCanary; };
    const char* end = data() + bytes();
    return std::all_of(all_.get(), all_.get() + front_, live) && std::all_of(end, end + kCanaryBytes, live);
  }

  size_t element_;
  size_t front_;
  std::unique_ptr<char, Free> all_;
};

// The gradients of a shard: one, or many that lie apart, with gaps.
class Gradients {
 public:
  Gradients(DType dtype, int64_t numel, int head, bool apart) {
    int64_t begin = 0;
    do {
      const int64_t size = apart ? std::min<int64_t>(numel - begin, int64_t(generator() % 5) * 37) : numel;
      arrays_.emplace_back(dtype, size, apart ? int(generator() % 2) : head);
      args.offsets.push_back(begin);
      args.tensors.push_back(arrays_.back().buffer());
      begin += (size / kSegmentGranule + 1) * kSegmentGranule;
    } while (begin < numel);
  }

  bool covers(int64_t i) const { return i - args.offsets[at(i)] < arrays_[at(i)].numel; }
  float get(int64_t i) const { return arrays_[at(i)].get(i - args.offsets[at(i)]); }

  ShardGrads args;

 private:
  size_t at(int64_t i) const {
    return size_t(std::upper_bound(args.offsets.begin(), args.offsets.end(), i) - args.offsets.begin()) - 1;
  }

  std::vector<Array> arrays_;
};

unsigned num_expected = 0;

// The statistics of an op, and those that the plain loop expects. Cases take turns: a sum in fp32, one in fp64, none.
class Expected {
 public:
  Expected()
      : is_double_(num_expected % 3 == 1), has_sum_(num_expected % 3 != 2), partials_(new double[cuda::kMaxPartials]) {
    ++num_expected;
  }

  GradStats grad_stats() {
    void* sumsq = is_double_ ? static_cast<void*>(&got_double_) : &got_float_;
    return GradStats{&found_inf_, has_sum_ ? sumsq : nullptr, is_double_};
  }

  double* partials() { return partials_.get(); }

  void add(float stored) {
    nonfinite_ |= is_nonfinite(stored);
    sumsq_ += square(stored);
  }

  void check(const char* op, int64_t numel) {
    require(found_inf_ == (nonfinite_ ? 1.0f : 0.0f), op, "found_inf", numel);
    if (nonfinite_) return;
    if (!has_sum_) sumsq_ = 0.5;  // unchanged
    const double got = is_double_ ? got_double_ : double(got_float_);
    require(fabs(got - sumsq_) <= sumsq_ * (is_double_ ? 1e-12 : 1.2e-7), op, "sumsq", numel);
  }

 private:
  bool is_double_;
  bool has_sum_;
  std::unique_ptr<double[]> partials_;
  bool nonfinite_ = false;
  double sumsq_ = 0.5;
  double got_double_ = 0.5;  // added to, not overwritten
  float got_float_ = 0.5f;
  float found_inf_ = 0.0f;
};

struct AdamCase {
  DType grad;
  bool has_out;
  DType out;
  AdamHyper hyper;
  bool on_device;  // lr, step and grad_scale
  bool segments;
  float found_inf;
};

void adam_case(const AdamCase& c, int64_t numel, int head, int other_head) {
  Array master(DType::kFloat32, numel, head), m(DType::kFloat32, numel, head), v(DType::kFloat32, numel, head);
  const Gradients grads(c.grad, numel, other_head, c.segments && !c.on_device);
  Array out(c.out, c.has_out ? numel : 0, other_head), peer(c.out, out.numel, other_head);
  for (int64_t i = 0; i < out.numel; ++i) peer.set(i, out.get(i));
  for (int64_t i = 0; i < numel; ++i) v.set(i, fabsf(v.get(i)));
  Array want_master = master.copy(), want_m = m.copy(), want_v = v.copy(), want_out = out.copy();

  const float lr = 1e-2f, steps[] = {3.0f, 7.0f, 11.0f}, active[] = {1.0f, 0.0f, 1.0f}, grad_scale = 0.37f;
  std::vector<int32_t> ids(size_t((numel + kSegmentGranule - 1) / kSegmentGranule));
  for (int32_t& id : ids) id = int32_t(generator() % 3);
  AdamConstants table[3];

  AdamArgs args{};
  args.master = master.floats();
  args.exp_avg = m.floats();
  args.exp_avg_sq = v.floats();
  args.grads = grads.args;
  if (c.has_out) args.param_outs = ParamOuts{{out.buffer(), peer.buffer()}, 2};
  args.numel = numel;
  args.hyper = c.hyper;
  args.lr = Scalar{double(lr), c.on_device ? &lr : nullptr};
  args.step = Scalar{3.0, c.on_device ? steps : nullptr};
  args.grad_scale = Scalar{double(grad_scale), c.on_device ? &grad_scale : nullptr};
  args.found_inf = &c.found_inf;
  args.segment_ids = c.segments ? ids.data() : nullptr;
  args.active = c.segments ? active : nullptr;
  args.num_segments = c.segments ? 3 : 1;
  cuda::adam(args, table, nullptr);

  const float scale = c.hyper.maximize ? -grad_scale : grad_scale;
  for (int64_t i = 0; i < numel && c.found_inf == 0.0f; ++i) {
    if (!grads.covers(i)) continue;
    const int segment = c.segments ? ids[size_t(i / kSegmentGranule)] : 0;
    if (c.segments && active[segment] == 0.0f) continue;
    const AdamConstants k = adam_constants(c.hyper, lr, c.on_device ? int64_t(steps[segment]) : 3);
    const AdamState before{want_master.get(i), want_m.get(i), want_v.get(i)};
    const AdamCoefficients shared = adam_coefficients(c.hyper);
    const AdamState now = adam_is_coupled(c.hyper) ? adam_element<true>(before, grads.get(i), scale, shared, k)
                                                   : adam_element<false>(before, grads.get(i), scale, shared, k);
    want_master.set(i, now.master);
    want_m.set(i, now.exp_avg);
    want_v.set(i, now.exp_avg_sq);
    if (c.has_out) want_out.set(i, now.master);
  }
  require(master.equals(want_master) && m.equals(want_m) && v.equals(want_v), "adam", "state", numel);
  require(out.equals(want_out) && peer.equals(want_out), "adam", "param_out", numel);
}

void adam() {
  unsigned turn = 0;
  for (const int64_t numel : kSizes) {
    for (const DType grad : kTypes) {
      for (int out = 0; out < 4; ++out) {
        const AdamHyper hyper{0.9, 0.999, 1e-8, turn % 3 ? 0.1 : 0.0, turn % 2 == 0, turn % 5 == 0};
        const bool segments = turn % 4 == 1;
        const AdamCase c{grad, out > 0, kTypes[out % 3], hyper, turn % 3 == 1, segments, turn % 7 == 6 ? 1.0f : 0.0f};
        const int head = segments ? 0 : int(turn % 4);
        adam_case(c, numel, head, turn % 6 == 3 && !segments ? head + 1 : head);
        ++turn;
      }
    }
  }
}

struct LionCase {
  DType grad;
  bool has_out;
  DType out;
  LionHyper hyper;
  bool on_device;  // lr and grad_scale
  bool segments;
  float found_inf;
};

void lion_case(const LionCase& c, int64_t numel, int head, int other_head) {
  Array master(DType::kFloat32, numel, head), m(DType::kFloat32, numel, head);
  const Gradients grads(c.grad, numel, other_head, c.segments && !c.on_device);
  Array out(c.out, c.has_out ? numel : 0, other_head), peer(c.out, out.numel, other_head);
  for (int64_t i = 0; i < out.numel; ++i) peer.set(i, out.get(i));
  Array want_master = master.copy(), want_m = m.copy(), want_out = out.copy();

  const float lr = 1e-2f, active[] = {1.0f, 0.0f, 1.0f}, grad_scale = 0.37f;
  std::vector<int32_t> ids(size_t((numel + kSegmentGranule - 1) / kSegmentGranule));
  for (int32_t& id : ids) id = int32_t(generator() % 3);

  LionArgs args{};
  args.master = master.floats();
  args.exp_avg = m.floats();
  args.grads = grads.args;
  if (c.has_out) args.param_outs = ParamOuts{{out.buffer(), peer.buffer()}, 2};
  args.numel = numel;
  args.hyper = c.hyper;
  args.lr = Scalar{double(lr), c.on_device ? &lr : nullptr};
  args.grad_scale = Scalar{double(grad_scale), c.on_device ? &grad_scale : nullptr};
  args.found_inf = &c.found_inf;
  args.segment_ids = c.segments ? ids.data() : nullptr;
  args.active = c.segments ? active : nullptr;
  cuda::lion(args, nullptr);

  const LionConstants k = lion_constants(c.hyper, lr);
  const float scale = c.hyper.maximize ? -grad_scale : grad_scale;
  for (int64_t i = 0; i < numel && c.found_inf == 0.0f; ++i) {
    if (!grads.covers(i)) continue;
    if (c.segments && active[ids[size_t(i / kSegmentGranule)]] == 0.0f) continue;
    const LionState before{want_master.get(i), want_m.get(i)};
    const LionState now = lion_element(before, grads.get(i), scale, lion_coefficients(c.hyper), k);
    want_master.set(i, now.master);
    want_m.set(i, now.exp_avg);
    if (c.has_out) want_out.set(i, now.master);
  }
  require(master.equals(want_master) && m.equals(want_m), "lion", "state", numel);
  require(out.equals(want_out) && peer.equals(want_out), "lion", "param_out", numel);
}

void lion() {
  unsigned turn = 0;
  for (const int64_t numel : kSizes) {
    for (const DType grad : kTypes) {
      for (int out = 0; out < 4; ++out) {
        const bool segments = turn % 4 == 1;
        const LionHyper hyper{0.9, 0.99, turn % 3 ? 0.1 : 0.0, turn % 5 == 0};
        const LionCase c{grad, out > 0, kTypes[out % 3], hyper, turn % 3 == 1, segments, turn % 7 == 6 ? 1.0f : 0.0f};
        const int head = segments ? 0 : int(turn % 4);
        lion_case(c, numel, head, turn % 6 == 3 && !segments ? head + 1 : head);
        ++turn;
      }
    }
  }
}

struct SgdCase {
  DType grad;
  bool has_out;
  DType out;
  bool has_buffer;
  SgdHyper hyper;
  bool on_device;  // lr, step and grad_scale
  bool segments;
  float found_inf;
};

void sgd_case(const SgdCase& c, int64_t numel, int head, int other_head) {
  Array master(DType::kFloat32, numel, head), m(DType::kFloat32, numel, head);
  const Gradients grads(c.grad, numel, other_head, c.segments && !c.on_device);
  Array out(c.out, c.has_out ? numel : 0, other_head), peer(c.out, out.numel, other_head);
  for (int64_t i = 0; i < out.numel; ++i) peer.set(i, out.get(i));
  Array want_master = master.copy(), want_m = m.copy(), want_out = out.copy();

  const float lr = 1e-2f, steps[] = {1.0f, 1.0f, 11.0f}, active[] = {1.0f, 0.0f, 1.0f}, grad_scale = 0.37f;
  std::vector<int32_t> ids(size_t((numel + kSegmentGranule - 1) / kSegmentGranule));
  for (int32_t& id : ids) id = int32_t(generator() % 3);

  SgdArgs args{};
  args.master = master.floats();
  args.momentum_buffer = c.has_buffer ? m.floats() : nullptr;
  args.grads = grads.args;
  if (c.has_out) args.param_outs = ParamOuts{{out.buffer(), peer.buffer()}, 2};
  args.numel = numel;
  args.hyper = c.hyper;
  args.lr = Scalar{double(lr), c.on_device ? &lr : nullptr};
  args.step = Scalar{3.0, c.on_device ? steps : nullptr};
  args.grad_scale = Scalar{double(grad_scale), c.on_device ? &grad_scale : nullptr};
  args.found_inf = &c.found_inf;
  args.segment_ids = c.segments ? ids.data() : nullptr;
  args.active = c.segments ? active : nullptr;
  cuda::sgd(args, nullptr);

  const SgdCoefficients k = sgd_coefficients(c.hyper);
  const float scale = c.hyper.maximize ? -grad_scale : grad_scale;
  for (int64_t i = 0; i < numel && c.found_inf == 0.0f; ++i) {
    if (!grads.covers(i)) continue;
    const int segment = c.segments ? ids[size_t(i / kSegmentGranule)] : 0;
    if (c.segments && active[segment] == 0.0f) continue;
    const bool first = c.on_device && steps[segment] == 1.0f;
    const SgdState before{want_master.get(i), want_m.get(i)};
    const SgdState now = c.has_buffer ? sgd_element<true>(before, grads.get(i), scale, k, lr, first)
                                      : sgd_element<false>(before, grads.get(i), scale, k, lr, first);
    want_master.set(i, now.master);
    if (c.has_buffer) want_m.set(i, now.momentum_buffer);
    if (c.has_out) want_out.set(i, now.master);
  }
  require(master.equals(want_master) && m.equals(want_m), "sgd", "state", numel);
  require(out.equals(want_out) && peer.equals(want_out), "sgd", "param_out", numel);
}

void sgd() {
  unsigned turn = 0;
  for (const int64_t numel : kSizes) {
    for (const DType grad : kTypes) {
      for (int out = 0; out < 4; ++out) {
        for (const bool has_buffer : {true, false}) {
          const bool segments = turn % 4 == 1;
          const SgdHyper hyper{0.9, 0.25, turn % 3 ? 0.1 : 0.0, turn % 2 == 0, turn % 5 == 0};
          const float found_inf = turn % 7 == 6 ? 1.0f : 0.0f;
          const SgdCase c{grad, out > 0, kTypes[out % 3], has_buffer, hyper, turn % 3 == 1, segments, found_inf};
          const int head = segments ? 0 : int(turn % 4);
          sgd_case(c, numel, head, turn % 6 == 3 && !segments ? head + 1 : head);
        }
        ++turn;
      }
    }
  }
}

void unscale_case(int64_t numel, int head, float inv_scale, bool on_device, bool overflow) {
  std::vector<Array> tensors, wants;
  for (int k = 0; k < 7; ++k) {
    tensors.emplace_back(kTypes[k % 3], k == 4 ? 0 : numel + k, head + k % 2, overflow ? 3e4f : 1.0f);
    wants.push_back(tensors.back().copy());
  }
  Expected expected;
  UnscaleArgs args;
  for (const Array& tensor : tensors) args.tensors.push_back(tensor.buffer());
  args.inv_scale = Scalar{double(inv_scale), on_device ? &inv_scale : nullptr};
  args.grad_stats = expected.grad_stats();
  cuda::unscale(args, expected.partials(), nullptr);

  for (size_t k = 0; k < tensors.size(); ++k) {
    for (int64_t i = 0; i < wants[k].numel; ++i) {
      wants[k].set(i, scale_element(wants[k].get(i), inv_scale));
      expected.add(wants[k].get(i));
    }
    require(tensors[k].equals(wants[k]), "unscale", "values", numel);
  }
  expected.check("unscale", numel);
}

void unscale() {
  for (const int64_t numel : kSizes) {
    for (int head = 0; head < 3; ++head) unscale_case(numel, head, 0.125f, head == 1, false);
    unscale_case(numel, 0, 1.0f, false, false);
    unscale_case(numel, 1, 8.0f, true, true);
  }
  cuda::unscale(UnscaleArgs{}, nullptr, nullptr);
}

// More tensors than one launch can carry.
void unscale_many() {
  constexpr size_t kMany = 1500;
  std::vector<Array> tensors, wants;
  UnscaleArgs args;
  for (size_t k = 0; k < kMany; ++k) {
    tensors.emplace_back(DType::kBFloat16, int64_t(k % 3));
    wants.push_back(tensors.back().copy());
    args.tensors.push_back(tensors.back().buffer());
  }
  Expected expected;
  args.inv_scale = Scalar{0.3, nullptr};
  args.grad_stats = expected.grad_stats();
  cuda::unscale(args, expected.partials(), nullptr);
  for (size_t k = 0; k < kMany; ++k) {
    for (int64_t i = 0; i < wants[k].numel; ++i) {
      wants[k].set(i, scale_element(wants[k].get(i), 0.3f));
      expected.add(wants[k].get(i));
    }
    require(tensors[k].equals(wants[k]), "unscale", "values in a long list", int64_t(k));
  }
  expected.check("unscale of many", int64_t(kMany));
}

void pack() {
  for (const int64_t numel : kSizes) {
    for (const DType out : kTypes) {
      const int64_t gap = numel % 3;
      Array bucket(out, 3 * (numel + gap) + 2, int(numel % 2));
      Array want = bucket.copy();
      std::vector<Array> tensors;
      PackArgs args;
      args.bucket = bucket.buffer();
      for (int k = 0; k < 3; ++k) {
        tensors.emplace_back(kTypes[k], numel, k == 1);
        args.tensors.push_back(tensors.back().buffer());
        args.offsets.push_back(k * (numel + gap) + 1);
        for (int64_t i = 0; i < numel; ++i) {
          want.set(args.offsets.back() + i, scale_element(tensors.back().get(i), 0.7f));
        }
      }
      args.scale = Scalar{0.7, nullptr};
      cuda::pack(args, nullptr);
      require(bucket.equals(want), "pack", "bucket", numel);
    }
  }
}

void reduce_scatter_case(int64_t numel, int ranks, DType dtype, int head, bool accumulate) {
  Array shard(DType::kFloat32, numel, head);
  Array want = shard.copy();
  std::vector<Array> slices;
  ReduceScatterArgs args{};
  for (int r = 0; r < ranks; ++r) {
    slices.emplace_back(dtype, numel, head);
    args.slices.push_back(slices.back().data());
  }
  Expected expected;
  const float scale = 0.3f;
  args.shard = shard.floats();
  args.dtype = dtype;
  args.numel = numel;
  args.scale = Scalar{0.3, accumulate ? &scale : nullptr};
  args.accumulate = accumulate;
  args.grad_stats = expected.grad_stats();
  cuda::reduce_scatter(args, expected.partials(), nullptr);

  for (int64_t i = 0; i < numel; ++i) {
    float sum = slices[0].get(i);
    for (int r = 1; r < ranks; ++r) sum = reduce_add(sum, slices[size_t(r)].get(i));
    want.set(i,
             accumulate ? reduce_finish<true>(want.get(i), sum, scale) : reduce_finish<false>(want.get(i), sum, scale));
    expected.add(want.get(i));
  }
  require(shard.equals(want), "reduce_scatter", "shard", numel);
  expected.check("reduce_scatter", numel);
}

void reduce_scatter() {
  unsigned turn = 0;
  for (const int64_t numel : kSizes) {
    for (const int ranks : {1, 2, 3, 4, 7, 8}) {
      for (const DType dtype : kTypes) {
        reduce_scatter_case(numel, ranks, dtype, int(turn % 3), turn % 2 == 0);
        ++turn;
      }
    }
  }
}

void loss_scale() {
  const LossScalePolicy policy{2.0f, 0.5f, 2.0f, 1.0f, 65536.0f, 2.0f, 1.0f, false};
  float got[kLossScaleSlots] = {16.0f, 0.0f, 2.0f, 0.0f, 0.0f};
  float want[kLossScaleSlots] = {16.0f, 0.0f, 2.0f, 0.0f, 0.0f};
  for (const float found_inf : {1.0f, 0.0f, 1.0f, 1.0f, 0.0f, 0.0f, 0.0f}) {
    cuda::loss_scale_update(got, &found_inf, policy, nullptr);
    loss_scale_update(want, found_inf != 0.0f, policy);
    require(std::memcmp(got, want, sizeof(want)) == 0, "loss_scale", "state", 0);
  }
}

void step_scalars() {
  const double rows[2 * kStatsColumns] = {0.0, 9.0, 0.0, 0.0, 16.0, 0.0};
  const double bad_rows[2 * kStatsColumns] = {0.0, 9.0, 0.0, 1.0, 16.0, 0.0};
  for (const int64_t numel : {int64_t(0), int64_t(1), int64_t(255), int64_t(256), int64_t(257)}) {
    for (const double* stats : {rows, bad_rows}) {
      float out[4] = {};
      std::vector<float> steps(static_cast<size_t>(numel), 3.0f);
      const std::vector<float> used(static_cast<size_t>(numel), 1.0f);
      const Scalar half{0.5, nullptr};
      cuda::step_scalars({out, stats, 2, true, 1.0f, half, half, steps.data(), used.data(), numel}, nullptr);
      const StepScalars want = pyzero::step_scalars(stats, 2, true, 1.0f, 0.5f, 0.5f);
      require(std::memcmp(out, &want, sizeof(want)) == 0, "step_scalars", "scalars", numel);
      const std::vector<float> counted(static_cast<size_t>(numel), stats == rows ? 4.0f : 3.0f);
      require(steps == counted, "step_scalars", "steps", numel);
    }
  }
}

}  // namespace

// Runs the named op, or all.
int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  const auto run = [&](const char* name, void (*op)()) {
    if (only.empty() || only == name) op();
  };
  run("adam", adam);
  run("lion", lion);
  run("sgd", sgd);
  run("unscale", unscale);
  run("unscale_many", unscale_many);
  run("pack", pack);
  run("reduce_scatter", reduce_scatter);
  run("loss_scale", loss_scale);
  run("step_scalars", step_scalars);
  if (num_wrong > 0) return 1;
  std::puts("the kernels agree with plain loops");
}
