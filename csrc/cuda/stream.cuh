// How every kernel walks memory: eight elements per thread at a time, in 16-byte accesses, with a scalar head and tail
// for views that start anywhere.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "../math/types.h"
#include "grid.h"

namespace pyzero {
namespace cuda {

constexpr int kVector = 8;  // elements: 16 bytes of a 16-bit type, twice 16 of fp32

template <typename T>
struct alignas(16) Vector {
  T x[kVector];
};

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

__device__ __forceinline__ uint32_t word(const Vector<float>& v, int w) { return float_bits(v.x[w]); }

template <typename T>
__device__ __forceinline__ uint32_t word(const Vector<T>& v, int w) {
  return uint32_t(v.x[2 * w].bits) | uint32_t(v.x[2 * w + 1].bits) << 16;
}

// 16 bytes in one store. In PTX, for nvcc 13.0 makes four of the words, or eight of a plain copy's 16-bit members.
__device__ __forceinline__ void store_words(void* p, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(x), "r"(y), "r"(z),
               "r"(w)
               : "memory");
#else
  *static_cast<uint4*>(p) = uint4{x, y, z, w};
#endif
}

template <typename T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T>& v) {
#pragma unroll
  for (int q = 0; q < int(sizeof(v) / 16); ++q) {
    store_words(p + q * (16 / sizeof(T)), word(v, 4 * q), word(v, 4 * q + 1), word(v, 4 * q + 2), word(v, 4 * q + 3));
  }
}

// A run of elements: `head` of them precede the first vector.
struct Span {
  int64_t numel;
  int head;
  bool vectors;  // false: no head aligns all pointers at once, so every element goes alone
};

inline int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct Stream {
  const void* data;
  DType dtype;
};

inline bool aligned_after(int head, const Stream& stream) {
  return (reinterpret_cast<uintptr_t>(stream.data) + uintptr_t(head * element_size(stream.dtype))) % 16 == 0;
}

template <typename Streams>
Span span_of(int64_t numel, const Streams& streams) {
  for (int head = 0; head < kVector; ++head) {
    const bool aligned =
        std::all_of(streams.begin(), streams.end(), [&](const Stream& stream) { return aligned_after(head, stream); });
    if (aligned) return Span{numel, int(std::min<int64_t>(head, numel)), true};
  }
  return Span{numel, 0, false};
}

inline Span span_of(int64_t numel, std::initializer_list<Stream> streams) {
  return span_of<std::initializer_list<Stream>>(numel, streams);
}

// Elements of one chunk, which one block handles at a time.
template <int kUnroll>
constexpr int64_t kChunk = int64_t(kThreads) * kVector * kUnroll;

template <int kUnroll>
int64_t num_chunks(const Span& span) {
  if (span.numel == 0) return 0;
  return std::max<int64_t>(1, (span.numel - span.head + kChunk<kUnroll> - 1) / kChunk<kUnroll>);
}

// body.load(i) reads the vector at element i, body.finish(i, vector) computes and writes it, body.element(i) does one
// element alone. Of a full chunk each thread has kBatch vectors per stream under way before the first is used: one load
// of a 16-bit type alone would leave memory idle. What is no full vector (the head, with chunk 0; the tail) goes alone.
template <int kUnroll, int kBatch = kUnroll, typename Body>
__device__ __forceinline__ void stream_chunk(const Span& span, int64_t chunk, const Body& body) {
  constexpr int64_t kStride = int64_t(kThreads) * kVector;
  const int64_t begin = span.head + chunk * kChunk<kUnroll>;
  const int64_t end = span.numel < begin + kChunk<kUnroll> ? span.numel : begin + kChunk<kUnroll>;
  const int64_t vectors_end = span.vectors ? begin + (end - begin) / kVector * kVector : begin;
  const int64_t first = begin + int64_t(threadIdx.x) * kVector;

  if (kUnroll > 1 && vectors_end - begin == kChunk<kUnroll>) {
#pragma unroll
    for (int batch = 0; batch < kUnroll; batch += kBatch) {
      typename Body::Inputs inputs[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) inputs[u] = body.load(first + (batch + u) * kStride);
#pragma unroll
      for (int u = 0; u < kBatch; ++u) body.finish(first + (batch + u) * kStride, inputs[u]);
    }
  } else {
#pragma unroll 1
    for (int64_t i = first; i < vectors_end; i += kStride) {
      typename Body::Inputs inputs = body.load(i);
      body.finish(i, inputs);
    }
  }

  const int64_t head = chunk == 0 ? span.head : 0;
  const int64_t num_alone = head + end - vectors_end;
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < num_alone; j += kThreads) body.element(j < head ? j : vectors_end + j - head);
}

}  // namespace cuda
}  // namespace pyzero
