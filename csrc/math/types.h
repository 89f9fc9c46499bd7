// Scalar types of the kernels and their exact conversions, for host and device.
//
// Host conversions have no branches, so that compilers vectorise them on every ISA. Device code uses the hardware's
// instructions for fp16. For bf16 it does what the host does: to widen is a shift, and the instruction that rounds to
// bf16 exists from sm_80 on only. All round to nearest even, and keep a NaN a NaN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PZ_HD __host__ __device__ __forceinline__
#else
#define PZ_HD inline __attribute__((always_inline))
#endif

namespace pyzero {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };  // in the order of FLOAT_DTYPES in ops/rows.py

PZ_HD int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

PZ_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

PZ_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// A test of bits means the same under every compiler flag; x - x != 0 does not.
PZ_HD bool is_nonfinite(float x) { return (float_bits(x) & 0x7f800000u) == 0x7f800000u; }

PZ_HD bool is_nonfinite(BFloat16 x) { return (x.bits & 0x7f80u) == 0x7f80u; }
PZ_HD bool is_nonfinite(Float16 x) { return (x.bits & 0x7c00u) == 0x7c00u; }

PZ_HD float to_float(float x) { return x; }

PZ_HD float to_float(BFloat16 x) { return bits_float(uint32_t(x.bits) << 16); }

PZ_HD float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t rebiased = magnitude + 0x38000000u;  // exponent bias 15 -> 127
  // inf and NaN: push the exponent to all ones. Subnormals: 2^-14 + x, minus 2^-14, is exact.
  const uint32_t special = exponent == 0x0f800000u ? 0x38000000u : 0u;
  const float subnormal = bits_float(rebiased + 0x00800000u) - bits_float(0x38800000u);
  const uint32_t bits = exponent == 0u ? float_bits(subnormal) : rebiased + special;
  return bits_float(bits | (uint32_t(x.bits & 0x8000u) << 16));
#endif
}

template <typename T>
PZ_HD T from_float(float x);

template <>
PZ_HD float from_float<float>(float x) {
  return x;
}

template <>
PZ_HD BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{uint16_t(nan ? 0x7fc0u : rounded)};
}

template <>
PZ_HD Float16 from_float<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal range: rebias the exponent (127 -> 15), round the 13 dropped bits; a carry out of the mantissa is right.
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 makes the float unit round at 2^-24, the spacing of fp16's subnormals.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, or beyond fp16's range
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t result = magnitude >= 0x47800000u ? large : finite;
  return Float16{uint16_t(result | ((bits >> 16) & 0x8000u))};
#endif
}

}  // namespace pyzero
