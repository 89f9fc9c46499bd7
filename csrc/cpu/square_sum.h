// Sums of squares in one order, whatever the ISA. Include only from kernels.cpp.
#pragma once

#include "convert.h"
#include "math/unscale.h"

namespace pyzero {
namespace PYZERO_ISA {
namespace {

constexpr int kLanes = 8;  // independent fp64 sums; fixed, so that every ISA adds in the same order

// Squares in fp64 cannot overflow, so the sum of a span is finite exactly where all its values are.
struct SquareSum {
  double lanes[kLanes] = {};

  void add(const float* values, int64_t count) {
    double sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane];
    const int64_t whole = count - count % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += square(values[i + lane]);
    }
    for (int64_t i = whole; i < count; ++i) sums[i - whole] += square(values[i]);
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = sums[lane];
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
