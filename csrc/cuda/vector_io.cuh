// How every kernel accesses memory. A thread takes vectors of 16 bytes of the widest type. Its vectors lie a block's
// width apart, so that each access of a warp is contiguous. Views may start anywhere: the elements before the first
// vector (the head) and after the last one (the tail) are accessed one by one.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "../math/types.h"
#include "grid.h"

namespace pyzero {
namespace cuda {

constexpr int kVectorBytes = 16;  // the widest access that all targets have

// Elements per vector: four if fp32 is among the types, eight if all are 16-bit.
template <typename... Types>
constexpr int kWidth = kVectorBytes / int(std::max({sizeof(Types)...}));

template <typename T, int kElements = kWidth<float>>
struct alignas(kElements * sizeof(T)) Vector {
  static constexpr int kSize = kElements;
  static constexpr int kWords = kElements * int(sizeof(T)) / 4;  // 4, or 2 of a 16-bit type beside fp32
  T x[kElements];
};

template <int kElements>
__device__ __forceinline__ uint32_t word(const Vector<float, kElements>& v, int w) {
  return float_bits(v.x[w]);
}

template <typename T, int kElements>
__device__ __forceinline__ uint32_t word(const Vector<T, kElements>& v, int w) {
  return uint32_t(v.x[2 * w].bits) | uint32_t(v.x[2 * w + 1].bits) << 16;
}

template <int kElements>
__device__ __forceinline__ void set_word(Vector<float, kElements>& v, int w, uint32_t bits) {
  v.x[w] = bits_float(bits);
}

template <typename T, int kElements>
__device__ __forceinline__ void set_word(Vector<T, kElements>& v, int w, uint32_t bits) {
  v.x[2 * w] = T{uint16_t(bits)};
  v.x[2 * w + 1] = T{uint16_t(bits >> 16)};
}

// These are PTX for two reasons: nvcc moves no volatile load behind a branch, and nvcc 13.0 splits a plain store of
// 16-bit members into one store for each.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ void load_words(const void* p, uint32_t (&w)[4]) {
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "l"(__cvta_generic_to_global(p)));
}

__device__ __forceinline__ void load_words(const void* p, uint32_t (&w)[2]) {
  asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(__cvta_generic_to_global(p)));
}

__device__ __forceinline__ void load_words(const void* p, uint32_t (&w)[1]) {
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(w[0]) : "l"(__cvta_generic_to_global(p)));
}

__device__ __forceinline__ void store_words(void* p, const uint32_t (&w)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(w[0]), "r"(w[1]),
               "r"(w[2]), "r"(w[3])
               : "memory");
}

__device__ __forceinline__ void store_words(void* p, const uint32_t (&w)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(w[0]), "r"(w[1]) : "memory");
}
#else
template <int kWords>
void load_words(const void* p, uint32_t (&w)[kWords]) {
  struct alignas(4 * kWords) Words {
    uint32_t x[kWords];
  };
  const Words words = *static_cast<const Words*>(p);
  memcpy(w, words.x, sizeof(words));
}

template <int kWords>
void store_words(void* p, const uint32_t (&w)[kWords]) {
  struct alignas(4 * kWords) Words {
    uint32_t x[kWords];
  } words;
  memcpy(words.x, w, sizeof(words));
  *static_cast<Words*>(p) = words;
}
#endif

template <int kElements = kWidth<float>, typename T>
__device__ __forceinline__ Vector<T, kElements> load_vector(const T* p) {
  Vector<T, kElements> v;
  uint32_t words[v.kWords];
  load_words(p, words);
#pragma unroll
  for (int w = 0; w < v.kWords; ++w) set_word(v, w, words[w]);
  return v;
}

template <typename T, int kElements>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, kElements>& v) {
  uint32_t words[v.kWords];
#pragma unroll
  for (int w = 0; w < v.kWords; ++w) words[w] = word(v, w);
  store_words(p, words);
}

// Loads four bytes. nvcc does not move this load behind a branch.
template <typename T>
__device__ __forceinline__ T load_volatile(const T* p) {
  static_assert(sizeof(T) == 4, "one word");
  uint32_t words[1];
  load_words(p, words);
  T value;
  memcpy(&value, words, sizeof(value));
  return value;
}

// A run of elements: `head` of them precede the first vector.
struct Span {
  int64_t numel;
  int head;
  bool vectors;  // false if no head aligns all pointers at once: all elements are accessed one by one
};

struct Operand {
  const void* data;
  DType dtype;
};

template <typename Operands>
Span span_of(int64_t numel, const Operands& operands) {
  int widest = 0;
  for (const Operand& operand : operands) widest = std::max(widest, element_size(operand.dtype));
  const int width = kVectorBytes / widest;

  for (int head = 0; head < width; ++head) {
    const bool aligned = std::all_of(operands.begin(), operands.end(), [&](const Operand& operand) {
      const int size = element_size(operand.dtype);
      return (reinterpret_cast<uintptr_t>(operand.data) + uintptr_t(head * size)) % uintptr_t(width * size) == 0;
    });
    if (aligned) return Span{numel, int(std::min<int64_t>(head, numel)), true};
  }
  return Span{numel, 0, false};
}

inline Span span_of(int64_t numel, std::initializer_list<Operand> operands) {
  return span_of<std::initializer_list<Operand>>(numel, operands);
}

// Elements of one chunk: kUnroll vectors for each thread of a block.
template <int kUnroll, int kElements = kWidth<float>, int kBlock = kThreads>
constexpr int64_t kChunk = int64_t(kBlock) * kElements * kUnroll;

inline int64_t num_chunks(const Span& span, int64_t chunk) {
  if (span.numel == 0) return 0;
  return std::max<int64_t>(1, (span.numel - span.head + chunk - 1) / chunk);
}

// body.load(i) reads the vector at element i, body.finish(i, inputs) computes and writes it, and body.element(i) does
// both for one element. Elements outside full vectors (the head, in chunk 0, and the tail) are done one by one.
// All loads of a full chunk are issued before the first is used: ptxas moves no load across __syncwarp, which costs no
// instruction. Without __syncwarp, ptxas moved loads behind the first branch of finish.
template <int kUnroll, int kElements = kWidth<float>, int kBlock = kThreads, typename Body>
__device__ __forceinline__ void visit_chunk(const Span& span, int64_t chunk, const Body& body) {
  constexpr int64_t kSize = kChunk<kUnroll, kElements, kBlock>;
  constexpr int64_t kStride = kSize / kUnroll;
  const int64_t begin = span.head + chunk * kSize;
  const int64_t end = span.numel < begin + kSize ? span.numel : begin + kSize;
  const int64_t vectors_end = span.vectors ? begin + (end - begin) / kElements * kElements : begin;
  const int64_t first = begin + int64_t(threadIdx.x) * kElements;

  if (kUnroll > 1 && vectors_end - begin == kSize) {
    typename Body::Inputs inputs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) inputs[u] = body.load(first + u * kStride);
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) body.finish(first + u * kStride, inputs[u]);
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
  for (int64_t j = threadIdx.x; j < num_alone; j += kBlock) body.element(j < head ? j : vectors_end + j - head);
}

}  // namespace cuda
}  // namespace pyzero
