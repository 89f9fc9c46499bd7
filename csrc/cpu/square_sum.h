// Sums squares in the same order on every ISA. Include only from kernels.cpp.
#pragma once

#include "convert.h"
#include "math/unscale.h"

namespace pyzero {
namespace PYZERO_ISA {
namespace {

constexpr int kLanes = 16;  // independent fp64 sums; fixed, so that every ISA adds in the same order

// A vector of as many lanes as one register holds. In plain C++, GCC keeps more than 8 lanes in memory.
#if defined(__AVX512F__)
using Doubles = __m512d;
inline Doubles to_doubles(const float* values) { return _mm512_cvtps_pd(_mm256_loadu_ps(values)); }
#elif defined(__AVX__)
using Doubles = __m256d;
inline Doubles to_doubles(const float* values) { return _mm256_cvtps_pd(_mm_loadu_ps(values)); }
#else
typedef double Doubles __attribute__((vector_size(16)));
inline Doubles to_doubles(const float* values) { return Doubles{values[0], values[1]}; }
#endif

// The fp64 square of an fp32 value cannot overflow, so the sum of a span is finite if and only if all its values are.
struct SquareSum {
  double lanes[kLanes] = {};

  void add(const float* values, int64_t count) {
    constexpr int kWidth = sizeof(Doubles) / sizeof(double);
    constexpr int kNumSums = kLanes / kWidth;
    Doubles sums[kNumSums];
    memcpy(sums, lanes, sizeof(sums));
    const int64_t whole = count - count % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int j = 0; j < kNumSums; ++j) {
        const Doubles x = to_doubles(values + i + j * kWidth);
        sums[j] += x * x;
      }
    }
    memcpy(lanes, sums, sizeof(sums));
    for (int64_t i = whole; i < count; ++i) lanes[i - whole] += square(values[i]);
  }

  double total() const {
    double sum = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
  }
};

}  // namespace
}  // namespace PYZERO_ISA
}  // namespace pyzero
