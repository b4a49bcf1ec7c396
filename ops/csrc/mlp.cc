// SPDX-License-Identifier: Apache-2.0
// MLP of a Transformer block: Linear, exact GELU, Linear.
#include "common.h"

namespace {

struct Sizes {
  int64_t rows, channels, hidden, outputs;
};

Sizes sizes_of(const Tensor& x, const Tensor& w1, const Tensor& w2) {
  return {rows_of(x), w1.shape()[0], w1.shape()[1], w2.shape()[1]};
}

template <typename T>
std::vector<Tensor> run(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  const Sizes n = sizes_of(x, w1, w2);
  const Tensor from = cast<T>(x), first = cast<T>(w1), second = cast<T>(w2);
  Tensor hidden = empty<T>({n.rows, n.hidden}), active = empty<T>({n.rows, n.hidden});
  auto shape = x.shape();
  shape.back() = n.outputs;
  Tensor y = empty<float>(shape);
  T *h = pointer<T>(hidden), *a = pointer<T>(active);
  multiply(matrix(pointer<T>(from), n.rows, n.channels), matrix(pointer<T>(first), n.channels, n.hidden),
           matrix(h, n.rows, n.hidden), pointer<float>(b1));
  parallel(n.rows * n.hidden, [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) store(gelu(load(h[i])), a[i]);
  });
  multiply(matrix(a, n.rows, n.hidden), matrix(pointer<T>(second), n.hidden, n.outputs),
           matrix(pointer<float>(y), n.rows, n.outputs), pointer<float>(b2));
  return {y, hidden};
}

std::vector<Tensor> forward(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                            bool half) {
  const int64_t channels = shape_of(x, 1).back(), hidden = shape_of(w1, 2)[1], outputs = shape_of(w2, 2)[1];
  expect_shapes({{"the first weight of an MLP", w1, {channels, hidden}},
                 {"the first bias of an MLP", b1, {hidden}},
                 {"the second weight of an MLP", w2, {hidden, outputs}},
                 {"the second bias of an MLP", b2, {outputs}}});
  return BY_TYPE(half, run, x, w1, b1, w2, b2);
}

// From h and the gradient of GELU(h) in `d`: GELU(h) in `active`, the gradient of h in `d`. Returns the latter's column sums.
template <typename T>
Tensor gelu_backward(const T* h, int64_t rows, int64_t columns, T* active, T* d) {
  ColumnSums sums(columns);
  parallel(rows, [&, h, active, d](int64_t first, int64_t last) {
    float* sum = sums.of_this_thread();
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * columns;
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) {
        float value, derivative;
        gelu(load(h[at + i]), value, derivative);
        const float gradient = load(d[at + i]) * derivative;
        store(value, active[at + i]);
        store(gradient, d[at + i]);
        sum[i] += gradient;
      }
    }
  });
  return sums.total();
}

template <typename T>
std::vector<Tensor> gradients(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& hidden,
                              const Tensor& dy) {
  const Sizes n = sizes_of(x, w1, w2);
  const Tensor from = cast<T>(x), first = cast<T>(w1), second = cast<T>(w2), gradient = cast<T>(dy);
  Tensor active = same_shape(hidden), d_hidden = same_shape(hidden);
  Tensor dx = empty<float>(x.shape()), dw1 = empty<float>(w1.shape()), dw2 = empty<float>(w2.shape());
  const View dy_view = matrix(pointer<T>(gradient), n.rows, n.outputs);
  const View dh_view = matrix(pointer<T>(d_hidden), n.rows, n.hidden);
  multiply(dy_view, matrix(pointer<T>(second), n.hidden, n.outputs).transposed(), dh_view);
  Tensor db1 = gelu_backward(pointer<T>(hidden), n.rows, n.hidden, pointer<T>(active), pointer<T>(d_hidden));
  multiply(matrix(pointer<T>(active), n.rows, n.hidden).transposed(), dy_view,
           matrix(pointer<float>(dw2), n.hidden, n.outputs));
  multiply(matrix(pointer<T>(from), n.rows, n.channels).transposed(), dh_view,
           matrix(pointer<float>(dw1), n.channels, n.hidden));
  multiply(dh_view, matrix(pointer<T>(first), n.channels, n.hidden).transposed(),
           matrix(pointer<float>(dx), n.rows, n.channels));
  return {dx, dw1, db1, dw2, column_sums(pointer<T>(gradient), n.rows, n.outputs)};
}

std::vector<Tensor> backward(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& hidden,
                             const Tensor& dy, bool half) {
  return BY_TYPE(half, gradients, x, w1, w2, hidden, dy);
}

}  // namespace

PD_BUILD_OP(leanvit_mlp)
    .Inputs({"X", "W1", "B1", "W2", "B2"})
    .Outputs({"Y", "Hidden"})
    .Attrs({"half: bool"})
    .SetKernelFn(PD_KERNEL(forward));

PD_BUILD_GRAD_OP(leanvit_mlp)
    .Inputs({"X", "W1", "W2", "Hidden", paddle::Grad("Y")})
    .Outputs({paddle::Grad("X"), paddle::Grad("W1"), paddle::Grad("B1"), paddle::Grad("W2"), paddle::Grad("B2")})
    .Attrs({"half: bool"})
    .SetKernelFn(PD_KERNEL(backward));

NO_SECOND_DERIVATIVE(leanvit_mlp, "X");
