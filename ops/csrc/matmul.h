// SPDX-License-Identifier: Apache-2.0
// Matrix products by oneDNN, on strided views, so that no operand is transposed or packed beforehand.
#pragma once

#include <cstdint>
#include <vector>

#include "numbers.h"

enum class Type { f32, bf16 };

template <typename T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr Type value = Type::f32;
};
template <>
struct TypeOf<bf16> {
  static constexpr Type value = Type::bf16;
};

// A batch of matrices: the last two dimensions are rows and columns. A view without data is only a shape.
struct View {
  void* data;
  Type type;
  std::vector<int64_t> sizes, strides;

  View transposed() const;
};

template <typename T>
View view(T* data, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
  return {const_cast<std::remove_const_t<T>*>(data), TypeOf<std::remove_const_t<T>>::value, std::move(sizes), std::move(strides)};
}

// A contiguous [rows, columns] matrix.
template <typename T>
View matrix(T* data, int64_t rows, int64_t columns) {
  return view(data, {rows, columns}, {columns, 1});
}

// c = a b (+ bias per column, float32). Sums are in float32 for every type.
void multiply(const View& a, const View& b, const View& c, const float* bias = nullptr);

// Number of products that were set up in this process, for tests: other calls reused one.
extern "C" int64_t leanvit_created_products();
