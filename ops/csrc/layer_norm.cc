// SPDX-License-Identifier: Apache-2.0
// LayerNorm over the last dimension.
#include "layer_norm.h"

namespace {

std::vector<Tensor> forward(const Tensor& x, const Tensor& scale, const Tensor& bias, float epsilon) {
  const int64_t columns = shape_of(x, 1).back(), rows = rows_of(x);
  expect_shapes({{"the weight of LayerNorm", scale, {columns}}, {"the bias of LayerNorm", bias, {columns}}});
  Tensor y = same_shape(x), saved = empty<float>({rows, 2});
  const float *from = pointer<float>(x), *g = pointer<float>(scale), *b = pointer<float>(bias);
  float* to = pointer<float>(y);
  Moments* kept = reinterpret_cast<Moments*>(pointer<float>(saved));
  parallel(rows, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* in = from + row * columns;
      float* out = to + row * columns;
      const Moments m = kept[row] = moments(in, columns, epsilon);
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) out[i] = (in[i] - m.mean) * m.rstd * g[i] + b[i];
    }
  });
  return {y, saved};
}

std::vector<Tensor> backward(const Tensor& x, const Tensor& scale, const Tensor& saved, const Tensor& dy) {
  const int64_t columns = x.shape().back(), rows = rows_of(x);
  Tensor dx = same_shape(x);
  ColumnSums d_scale(columns), d_bias(columns);
  const float *from = pointer<float>(x), *g = pointer<float>(scale), *gradient = pointer<float>(dy);
  float* to = pointer<float>(dx);
  const Moments* kept = reinterpret_cast<const Moments*>(pointer<float>(saved));
  parallel(rows, [&](int64_t first, int64_t last) {
    float *scale_sum = d_scale.of_this_thread(), *bias_sum = d_bias.of_this_thread();
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * columns;
      layer_norm_backward(from + at, gradient + at, g, kept[row], columns, to + at, scale_sum, bias_sum);
    }
  });
  return {dx, d_scale.total(), d_bias.total()};
}

}  // namespace

PD_BUILD_OP(leanvit_layer_norm)
    .Inputs({"X", "Scale", "Bias"})
    .Outputs({"Y", "Saved"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(forward));

PD_BUILD_GRAD_OP(leanvit_layer_norm)
    .Inputs({"X", "Scale", "Saved", paddle::Grad("Y")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Scale"), paddle::Grad("Bias")})
    .SetKernelFn(PD_KERNEL(backward));

NO_SECOND_DERIVATIVE(leanvit_layer_norm, "X");
