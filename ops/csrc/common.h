// SPDX-License-Identifier: Apache-2.0
// What the operators share: Paddle tensors as typed pointers, casts, sums over rows, and threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <initializer_list>
#include <new>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "matmul.h"
#include "numbers.h"
#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/ext/tensor_compat.h"
#include "paddle/phi/common/data_type.h"

using paddle::DataType;
using paddle::Tensor;

template <typename T>
constexpr DataType paddle_type() {
  return std::is_same<T, bf16>::value ? DataType::BFLOAT16 : DataType::FLOAT32;
}

template <typename T>
void expect_type(const Tensor& tensor) {
  if (tensor.dtype() != paddle_type<T>()) PD_THROW("a tensor has another type than the operator reads");
}

template <typename T>
T* pointer(Tensor& tensor) {
  expect_type<T>(tensor);
  return static_cast<T*>(tensor.data());
}

template <typename T>
const T* pointer(const Tensor& tensor) {
  expect_type<T>(tensor);
  return static_cast<const T*>(tensor.data());
}

struct Expected {
  const char* name;
  const Tensor& tensor;
  std::vector<int64_t> shape;
};

// Check the shapes of an operator's inputs: a kernel would read beyond the end of smaller ones.
inline void expect_shapes(std::initializer_list<Expected> inputs) {
  for (const Expected& input : inputs) {
    if (input.tensor.shape() == input.shape) continue;
    std::ostringstream text;
    auto add = [&text](const std::vector<int64_t>& shape) {
      for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "[") << shape[i];
      text << "]";
    };
    text << input.name << " has the shape ";
    add(input.tensor.shape());
    text << " and needs ";
    add(input.shape);
    PD_THROW(text.str());
  }
}

// The sizes of a tensor of at least `least` dimensions.
inline std::vector<int64_t> shape_of(const Tensor& tensor, size_t least) {
  auto shape = tensor.shape();
  if (shape.size() < least) PD_THROW("a tensor has too few dimensions");
  return shape;
}

template <typename T>
Tensor empty(std::vector<int64_t> shape) {
  return paddle::empty(shape, paddle_type<T>(), paddle::CPUPlace());
}

inline Tensor same_shape(const Tensor& tensor) { return paddle::empty(tensor.shape(), tensor.dtype(), tensor.place()); }

// Number of rows of a tensor whose last dimension is the row.
inline int64_t rows_of(const Tensor& tensor) {
  const auto shape = tensor.shape();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  return rows;
}

// Call `work(first, last)` in all threads, each with its part of 0 ... count.
template <typename Work>
void parallel(int64_t count, const Work& work) {
#pragma omp parallel
  {
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    int64_t first = count * thread / threads, last = count * (thread + 1) / threads;
    if (first < last) work(first, last);
  }
}

// A tensor in type T: itself, or a copy.
template <typename T>
Tensor cast(const Tensor& tensor) {
  if (tensor.dtype() == paddle_type<T>()) return tensor;
  Tensor result = empty<T>(tensor.shape());
  T* to = pointer<T>(result);
  auto copy = [&](auto* from) {
    parallel(tensor.numel(), [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) store(load(from[i]), to[i]);
    });
  };
  if (tensor.dtype() == DataType::FLOAT32) {
    copy(pointer<float>(tensor));
  } else {
    copy(pointer<bf16>(tensor));
  }
  return result;
}

// Sums of a column each, accumulated by every thread alone and added in the order of the threads.
class ColumnSums {
 public:
  explicit ColumnSums(int64_t columns) : columns_(columns), parts_(omp_get_max_threads() * columns, 0.0f) {}

  float* of_this_thread() { return parts_.data() + omp_get_thread_num() * columns_; }

  Tensor total() const {
    Tensor result = empty<float>({columns_});
    float* sums = pointer<float>(result);
    std::fill(sums, sums + columns_, 0.0f);
    for (size_t part = 0; part < parts_.size(); part += columns_) {
      for (int64_t i = 0; i < columns_; ++i) sums[i] += parts_[part + i];
    }
    return result;
  }

 private:
  int64_t columns_;
  std::vector<float> parts_;
};

// Sums over the rows of a [rows, columns] matrix: the gradient of a bias.
template <typename T>
Tensor column_sums(const T* x, int64_t rows, int64_t columns) {
  ColumnSums sums(columns);
  parallel(rows, [&](int64_t first, int64_t last) {
    float* sum = sums.of_this_thread();
    for (int64_t row = first; row < last; ++row) {
      const T* values = x + row * columns;
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) sum[i] += load(values[i]);
    }
  });
  return sums.total();
}

// Call a function and pass its errors on as Paddle's: others would end the process.
template <typename Work>
auto guarded(const Work& work) {
  try {
    return work();
  } catch (const std::runtime_error& error) {
    PD_THROW(error.what());
  } catch (const std::bad_alloc&) {
    PD_THROW("there is not enough memory");
  }
}

// Compile `Kernel<T>` for both types and call that of bfloat16 or float32.
#define BY_TYPE(half, kernel, ...) guarded([&] { return (half) ? kernel<bf16>(__VA_ARGS__) : kernel<float>(__VA_ARGS__); })

// A second derivative (`create_graph=True`) is an error; without this operator Paddle takes it as zero.
inline std::vector<Tensor> no_second_derivative(const Tensor&) {
  PD_THROW("the operators for the CPU have no second derivative; set LEANVIT_OPS=0");
}

#define NO_SECOND_DERIVATIVE(name, input)                 \
  PD_BUILD_DOUBLE_GRAD_OP(name)                           \
      .Inputs({input})                                    \
      .Outputs({paddle::Grad(input)})                     \
      .SetKernelFn(PD_KERNEL(no_second_derivative))
