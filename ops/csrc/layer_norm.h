// SPDX-License-Identifier: Apache-2.0
// LayerNorm of one row, https://arxiv.org/abs/1607.06450.
#pragma once

#include "common.h"

struct Moments {
  float mean, rstd;
};

inline Moments moments(const float* x, int64_t columns, float epsilon) {
  float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < columns; ++i) sum += x[i];
  const float mean = sum / columns;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < columns; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, 1.0f / std::sqrt(squares / columns + epsilon)};
}

// The gradient of a row's input, and its part of the gradients of scale and bias, from the gradient of its output.
// `dx` may be `dy` or `x`.
inline void layer_norm_backward(const float* x, const float* dy, const float* scale, Moments m, int64_t columns, float* dx,
                                float* d_scale, float* d_bias) {
  float sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < columns; ++i) {
    const float normalized = (x[i] - m.mean) * m.rstd, gradient = dy[i] * scale[i];
    sum += gradient;
    product += gradient * normalized;
    d_scale[i] += dy[i] * normalized;
    d_bias[i] += dy[i];
  }
  sum /= columns;
  product /= columns;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) {
    const float normalized = (x[i] - m.mean) * m.rstd;
    dx[i] = m.rstd * (dy[i] * scale[i] - sum - normalized * product);
  }
}
