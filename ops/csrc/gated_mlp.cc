// SPDX-License-Identifier: Apache-2.0
// MLP with a spatial gating unit (gMLP, https://arxiv.org/abs/2105.08050): Linear, exact GELU, u * (W^T LayerNorm(v) + b), Linear.
#include "layer_norm.h"

namespace {

struct Weights {
  const Tensor &w1, &b1, &scale, &bias, &spatial, &spatial_bias, &w2;
};

struct Sizes {
  int64_t batch, tokens, channels, half;  // half of the hidden channels
  int64_t rows() const { return batch * tokens; }
};

Sizes sizes_of(const Tensor& x, const Weights& w) {
  auto shape = x.shape();
  return {shape[0], shape[1], shape[2], w.w1.shape()[1] / 2};
}

// [B, N, half] and [B, N, N]; the batch strides of a shared matrix are 0.
template <typename T>
View tokens(T* x, const Sizes& n) {
  return view(x, {n.batch, n.tokens, n.half}, {n.tokens * n.half, n.half, 1});
}

template <typename T>
View spatial_map(T* weight, const Sizes& n, bool shared) {
  return view(weight, {shared ? 1 : n.batch, n.tokens, n.tokens}, {n.tokens * n.tokens, n.tokens, 1});
}

template <typename T>
std::vector<Tensor> run(const Tensor& x, const Weights& w, const Tensor& b2, float epsilon) {
  const Sizes n = sizes_of(x, w);
  const int64_t hidden = 2 * n.half;
  const Tensor from = cast<T>(x), w1 = cast<T>(w.w1), w2 = cast<T>(w.w2), spatial = cast<T>(w.spatial);
  Tensor h = empty<T>({n.rows(), hidden}), u = empty<T>({n.rows(), n.half}), v = empty<T>({n.rows(), n.half});
  Tensor gate = empty<T>({n.rows(), n.half}), y = empty<float>(x.shape());
  T *hp = pointer<T>(h), *up = pointer<T>(u), *vp = pointer<T>(v), *gp = pointer<T>(gate);
  const float *scale = pointer<float>(w.scale), *bias = pointer<float>(w.bias), *shift = pointer<float>(w.spatial_bias);
  multiply(matrix(pointer<T>(from), n.rows(), n.channels), matrix(pointer<T>(w1), n.channels, hidden),
           matrix(hp, n.rows(), hidden), pointer<float>(w.b1));
  parallel(n.rows(), [=](int64_t first, int64_t last) {
    std::vector<float> active(hidden);
    for (int64_t row = first; row < last; ++row) {
      float* a = active.data();
#pragma omp simd
      for (int64_t i = 0; i < hidden; ++i) a[i] = gelu(load(hp[row * hidden + i]));
      const float* second = a + n.half;
      const Moments m = moments(second, n.half, epsilon);
#pragma omp simd
      for (int64_t i = 0; i < n.half; ++i) {
        store(a[i], up[row * n.half + i]);
        store((second[i] - m.mean) * m.rstd * scale[i] + bias[i], vp[row * n.half + i]);
      }
    }
  });
  multiply(spatial_map(pointer<T>(spatial), n, true).transposed(), tokens(vp, n), tokens(gp, n));
  parallel(n.rows(), [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float add = shift[row % n.tokens];
      const int64_t at = row * n.half;
#pragma omp simd
      for (int64_t i = 0; i < n.half; ++i) {
        const float value = load(gp[at + i]) + add;
        store(value, gp[at + i]);
        store(load(up[at + i]) * value, up[at + i]);
      }
    }
  });
  multiply(matrix(up, n.rows(), n.half), matrix(pointer<T>(w2), n.half, n.channels),
           matrix(pointer<float>(y), n.rows(), n.channels), pointer<float>(b2));
  return {y, h, gate};
}

std::vector<Tensor> forward(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& scale, const Tensor& bias,
                            const Tensor& spatial, const Tensor& spatial_bias, const Tensor& w2, const Tensor& b2,
                            float epsilon, bool half) {
  const auto shape = shape_of(x, 3);
  const int64_t tokens = shape[1], channels = shape[2], gated = shape_of(w1, 2)[1] / 2;
  expect_shapes({{"the first weight of a gated MLP", w1, {channels, 2 * gated}},
                 {"the first bias of a gated MLP", b1, {2 * gated}},
                 {"the LayerNorm weight of a gate", scale, {gated}},
                 {"the LayerNorm bias of a gate", bias, {gated}},
                 {"the spatial weight of a gate", spatial, {tokens, tokens}},
                 {"the spatial bias of a gate", spatial_bias, {tokens}},
                 {"the second weight of a gated MLP", w2, {gated, channels}},
                 {"the second bias of a gated MLP", b2, {channels}}});
  return BY_TYPE(half, run, x, (Weights{w1, b1, scale, bias, spatial, spatial_bias, w2}), b2, epsilon);
}

// d(spatial) [N, N] = sum over the samples of LayerNorm(v) d(gate)^T.
template <typename T>
Tensor spatial_gradient(const T* v, const T* d_gate, const Sizes& n) {
  Tensor parts = empty<float>({n.batch, n.tokens, n.tokens});
  multiply(tokens(v, n), tokens(d_gate, n).transposed(), spatial_map(pointer<float>(parts), n, false));
  const int64_t size = n.tokens * n.tokens;
  Tensor result = empty<float>({n.tokens, n.tokens});
  float *sum = pointer<float>(result), *part = pointer<float>(parts);
  parallel(size, [=](int64_t first, int64_t last) {
    std::fill(sum + first, sum + last, 0.0f);
    for (int64_t sample = 0; sample < n.batch; ++sample) {
#pragma omp simd
      for (int64_t i = first; i < last; ++i) sum[i] += part[sample * size + i];
    }
  });
  return result;
}

// From dz, the gradient of z = u * gate: z in `z`, d(gate) in `d_gate`, LayerNorm(v) in `v`, du in `dz`, and d(spatial_bias).
template <typename T>
Tensor gate_backward(const T* h, const T* gate, const Weights& w, const Sizes& n, float epsilon, T* dz, T* z, T* d_gate,
                     T* v) {
  Tensor sums = empty<float>({n.rows()}), d_shift = empty<float>({n.tokens});
  const float *scale = pointer<float>(w.scale), *bias = pointer<float>(w.bias);
  float* row_sums = pointer<float>(sums);
  parallel(n.rows(), [=](int64_t first, int64_t last) {
    // One loop per array in memory: they start at the same place of a page, so a loop that reads and writes several waits.
    std::vector<float> buffer(4 * n.half);
    float *a = buffer.data(), *second = a + n.half, *g = second + n.half, *d = g + n.half;
    for (int64_t row = first; row < last; ++row) {
      const T* in = h + row * 2 * n.half;
      const int64_t at = row * n.half;
      float sum = 0.0f;
#pragma omp simd
      for (int64_t i = 0; i < 2 * n.half; ++i) a[i] = gelu(load(in[i]));
#pragma omp simd
      for (int64_t i = 0; i < n.half; ++i) g[i] = load(gate[at + i]);
#pragma omp simd
      for (int64_t i = 0; i < n.half; ++i) d[i] = load(dz[at + i]);
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n.half; ++i) sum += d[i] * a[i];
#pragma omp simd
      for (int64_t i = 0; i < n.half; ++i) store(a[i] * g[i], z[at + i]);
#pragma omp simd
      for (int64_t i = 0; i < n.half; ++i) store(d[i] * a[i], d_gate[at + i]);
#pragma omp simd
      for (int64_t i = 0; i < n.half; ++i) store(d[i] * g[i], dz[at + i]);
      const Moments m = moments(second, n.half, epsilon);
#pragma omp simd
      for (int64_t i = 0; i < n.half; ++i) store((second[i] - m.mean) * m.rstd * scale[i] + bias[i], v[at + i]);
      row_sums[row] = sum;
    }
  });
  float* total = pointer<float>(d_shift);
  std::fill(total, total + n.tokens, 0.0f);
  for (int64_t row = 0; row < n.rows(); ++row) total[row % n.tokens] += row_sums[row];
  return d_shift;
}

// From du and the gradient dv of LayerNorm(GELU(v)): the gradient of h, and those of scale, bias and b1.
template <typename T>
std::vector<Tensor> hidden_backward(const T* h, const T* du, const T* dv, const Weights& w, const Sizes& n, float epsilon,
                                    T* dh) {
  ColumnSums d_scale(n.half), d_bias(n.half), d_b1(2 * n.half);
  const float* scale = pointer<float>(w.scale);
  const int64_t hidden = 2 * n.half;
  parallel(n.rows(), [&, h, du, dv, dh](int64_t first, int64_t last) {
    std::vector<float> active(hidden), derivative(hidden), gradient(hidden);
    float *a = active.data(), *slope = derivative.data(), *d = gradient.data();
    float *scale_sum = d_scale.of_this_thread(), *bias_sum = d_bias.of_this_thread(), *b1_sum = d_b1.of_this_thread();
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * n.half;
#pragma omp simd
      for (int64_t i = 0; i < hidden; ++i) gelu(load(h[row * hidden + i]), a[i], slope[i]);
#pragma omp simd
      for (int64_t i = 0; i < n.half; ++i) {
        d[i] = load(du[at + i]);
        d[n.half + i] = load(dv[at + i]);
      }
      const Moments m = moments(a + n.half, n.half, epsilon);
      layer_norm_backward(a + n.half, d + n.half, scale, m, n.half, d + n.half, scale_sum, bias_sum);
#pragma omp simd
      for (int64_t i = 0; i < hidden; ++i) {
        const float value = d[i] * slope[i];
        b1_sum[i] += value;
        store(value, dh[row * hidden + i]);
      }
    }
  });
  return {d_scale.total(), d_bias.total(), d_b1.total()};
}

template <typename T>
std::vector<Tensor> gradients(const Tensor& x, const Weights& w, const Tensor& h, const Tensor& gate,
                              const Tensor& dy_tensor, float epsilon) {
  const Sizes n = sizes_of(x, w);
  const int64_t rows = n.rows(), hidden = 2 * n.half;
  const Tensor from = cast<T>(x), w1 = cast<T>(w.w1), w2 = cast<T>(w.w2), spatial = cast<T>(w.spatial);
  const Tensor dy = cast<T>(dy_tensor);
  Tensor dz = empty<T>({rows, n.half}), z = empty<T>({rows, n.half}), v = empty<T>({rows, n.half});
  Tensor d_gate = empty<T>({rows, n.half}), dh = empty<T>({rows, hidden});
  Tensor dx = empty<float>(x.shape()), dw1 = empty<float>(w.w1.shape()), dw2 = empty<float>(w.w2.shape());
  T *zp = pointer<T>(z), *dzp = pointer<T>(dz), *vp = pointer<T>(v), *dgp = pointer<T>(d_gate), *dhp = pointer<T>(dh);
  const T* hp = pointer<T>(h);
  const View dy_view = matrix(pointer<T>(dy), rows, n.channels), dh_view = matrix(dhp, rows, hidden);
  multiply(dy_view, matrix(pointer<T>(w2), n.half, n.channels).transposed(), matrix(dzp, rows, n.half));
  Tensor d_shift = gate_backward(hp, pointer<T>(gate), w, n, epsilon, dzp, zp, dgp, vp);
  multiply(matrix(zp, rows, n.half).transposed(), dy_view, matrix(pointer<float>(dw2), n.half, n.channels));
  Tensor d_spatial = spatial_gradient<T>(vp, dgp, n);
  multiply(spatial_map(pointer<T>(spatial), n, true), tokens(dgp, n), tokens(zp, n));  // dv takes the place of z
  auto sums = hidden_backward<T>(hp, dzp, zp, w, n, epsilon, dhp);
  multiply(matrix(pointer<T>(from), rows, n.channels).transposed(), dh_view,
           matrix(pointer<float>(dw1), n.channels, hidden));
  multiply(dh_view, matrix(pointer<T>(w1), n.channels, hidden).transposed(),
           matrix(pointer<float>(dx), rows, n.channels));
  Tensor db2 = column_sums(pointer<T>(dy), rows, n.channels);
  return {dx, dw1, sums[2], sums[0], sums[1], d_spatial, d_shift, dw2, db2};
}

std::vector<Tensor> backward(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& scale,
                             const Tensor& bias, const Tensor& spatial, const Tensor& spatial_bias, const Tensor& w2,
                             const Tensor& h, const Tensor& gate, const Tensor& dy, float epsilon, bool half) {
  return BY_TYPE(half, gradients, x, (Weights{w1, b1, scale, bias, spatial, spatial_bias, w2}), h, gate, dy, epsilon);
}

}  // namespace

PD_BUILD_OP(leanvit_gated_mlp)
    .Inputs({"X", "W1", "B1", "Scale", "Bias", "Spatial", "SpatialBias", "W2", "B2"})
    .Outputs({"Y", "Hidden", "Gate"})
    .Attrs({"epsilon: float", "half: bool"})
    .SetKernelFn(PD_KERNEL(forward));

PD_BUILD_GRAD_OP(leanvit_gated_mlp)
    .Inputs({"X", "W1", "B1", "Scale", "Bias", "Spatial", "SpatialBias", "W2", "Hidden", "Gate", paddle::Grad("Y")})
    .Outputs({paddle::Grad("X"), paddle::Grad("W1"), paddle::Grad("B1"), paddle::Grad("Scale"), paddle::Grad("Bias"),
              paddle::Grad("Spatial"), paddle::Grad("SpatialBias"), paddle::Grad("W2"), paddle::Grad("B2")})
    .Attrs({"epsilon: float", "half: bool"})
    .SetKernelFn(PD_KERNEL(backward));

NO_SECOND_DERIVATIVE(leanvit_gated_mlp, "X");
