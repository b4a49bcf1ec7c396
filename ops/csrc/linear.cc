// SPDX-License-Identifier: Apache-2.0
// Linear layer y = x W + b, with W of [inputs, outputs].
#include "common.h"

namespace {

std::vector<int64_t> output_shape(const Tensor& x, const Tensor& weight) {
  auto shape = x.shape();
  shape.back() = weight.shape()[1];
  return shape;
}

template <typename T, typename Output>
Tensor product(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const int64_t rows = rows_of(x), inputs = weight.shape()[0], outputs = weight.shape()[1];
  const Tensor from = cast<T>(x), w = cast<T>(weight);
  Tensor y = empty<Output>(output_shape(x, weight));
  multiply(matrix(pointer<T>(from), rows, inputs), matrix(pointer<T>(w), inputs, outputs),
           matrix(pointer<Output>(y), rows, outputs), pointer<float>(bias));
  return y;
}

std::vector<Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& bias, bool half, bool half_output,
                            bool input_gradient) {
  const int64_t inputs = shape_of(x, 1).back(), outputs = shape_of(weight, 2)[1];
  expect_shapes({{"the weight of a linear layer", weight, {inputs, outputs}}, {"the bias of a linear layer", bias, {outputs}}});
  return guarded([&]() -> std::vector<Tensor> {
    if (half_output) return {product<bf16, bf16>(x, weight, bias)};
    return {half ? product<bf16, float>(x, weight, bias) : product<float, float>(x, weight, bias)};
  });
}

template <typename T>
std::vector<Tensor> gradients(const Tensor& x, const Tensor& weight, const Tensor& dy, bool input_gradient) {
  const int64_t rows = rows_of(x), inputs = weight.shape()[0], outputs = weight.shape()[1];
  const Tensor from = cast<T>(x), w = cast<T>(weight), gradient = cast<T>(dy);
  const View dy_view = matrix(pointer<T>(gradient), rows, outputs);
  Tensor dx, dw = empty<float>(weight.shape());
  multiply(matrix(pointer<T>(from), rows, inputs).transposed(), dy_view, matrix(pointer<float>(dw), inputs, outputs));
  auto with_input = [&](auto* place) {
    multiply(dy_view, matrix(pointer<T>(w), inputs, outputs).transposed(), matrix(place, rows, inputs));
  };
  dx = same_shape(x);
  if (!input_gradient) {
    std::memset(dx.data(), 0, dx.numel() * phi::SizeOf(dx.dtype()));
  } else if (x.dtype() == DataType::BFLOAT16) {
    with_input(pointer<bf16>(dx));
  } else {
    with_input(pointer<float>(dx));
  }
  return {dx, dw, column_sums(pointer<T>(gradient), rows, outputs)};
}

std::vector<Tensor> backward(const Tensor& x, const Tensor& weight, const Tensor& dy, bool half, bool half_output,
                             bool input_gradient) {
  return BY_TYPE(half, gradients, x, weight, dy, input_gradient);
}

}  // namespace

PD_BUILD_OP(leanvit_linear)
    .Inputs({"X", "Weight", "Bias"})
    .Outputs({"Y"})
    .Attrs({"half: bool", "half_output: bool", "input_gradient: bool"})
    .SetKernelFn(PD_KERNEL(forward));

PD_BUILD_GRAD_OP(leanvit_linear)
    .Inputs({"X", "Weight", paddle::Grad("Y")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Weight"), paddle::Grad("Bias")})
    .Attrs({"half: bool", "half_output: bool", "input_gradient: bool"})
    .SetKernelFn(PD_KERNEL(backward));

NO_SECOND_DERIVATIVE(leanvit_linear, "X");
