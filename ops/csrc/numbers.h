// SPDX-License-Identifier: Apache-2.0
// bfloat16 in memory, and element functions that the compiler vectorizes. All arithmetic is in float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct bf16 {
  uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void store(float value, float& place) { place = value; }

// Round to the nearest bfloat16, ties to even. NaN stays NaN: the sum would carry its bits into the sign.
inline void store(float value, bf16& place) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  place.bits = static_cast<uint16_t>((value != value ? bits | 0x400000 : rounded) >> 16);
}

// e^x for x <= 0, relative error 2e-7 (range reduction to |r| <= ln(2) / 2 and a polynomial of degree 6).
inline float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
}

// Exact GELU x * cdf(x), and its derivative cdf(x) + x * pdf(x), of the normal distribution.
// The error function is formula 7.1.26 of Abramowitz and Stegun, absolute error 1.5e-7.
inline void gelu(float x, float& value, float& derivative) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  const float density = exp_negative(-z * z);
  const float poly = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const float tail = 0.5f * poly * density;
  const float cdf = x >= 0.0f ? 1.0f - tail : tail;
  value = x * cdf;
  derivative = cdf + x * density * 0.39894228f;
}

inline float gelu(float x) {
  float value, derivative;
  gelu(x, value, derivative);
  return value;
}
