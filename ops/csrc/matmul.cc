// SPDX-License-Identifier: Apache-2.0
#include "matmul.h"

#include <omp.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "onednn.h"

namespace {

constexpr size_t kMaxProducts = 1024;  // of different shapes; token merging has many

void check(int status) {
  if (status != kSuccess) throw std::runtime_error("oneDNN: error " + std::to_string(status) + " in a matrix product");
}

dnnl_engine* cpu() {
  static dnnl_engine* engine = [] {
    if (dnnl_version()->major != kVersion) throw std::runtime_error("oneDNN: another version than 3");
    dnnl_engine* created = nullptr;
    check(dnnl_engine_create(&created, kCpu, 0));
    return created;
  }();
  return engine;
}

// A matrix of one row with the stride that it would have in a larger one. oneDNN computes nothing for shorter strides.
View with_row_stride(View view) {
  size_t last = view.sizes.size() - 1;
  if (view.sizes[last - 1] == 1) {
    view.strides[last - 1] = std::max(view.strides[last - 1], view.sizes[last] * view.strides[last]);
  }
  return view;
}

// The memory objects and the primitive of products of one shape; the data is set before each product.
class Product {
 public:
  Product(const View& a, const View& b, const View& c, bool with_bias) {
    View bias{nullptr, Type::f32, std::vector<int64_t>(c.sizes.size(), 1), std::vector<int64_t>(c.sizes.size(), 1)};
    bias.sizes.back() = c.sizes.back();
    dnnl_memory_desc* descs[4] = {};
    const View* views[4] = {&a, &b, &c, with_bias ? &bias : nullptr};
    const int names[4] = {kSource, kWeights, kDestination, kBias};
    for (int i = 0; i < 3 + with_bias; ++i) {
      const View view = with_row_stride(*views[i]);
      check(dnnl_memory_desc_create_with_strides(&descs[i], view.sizes.size(), view.sizes.data(),
                                                 view.type == Type::f32 ? kF32 : kBf16, view.strides.data()));
      arguments_.push_back({names[i], nullptr});
      check(dnnl_memory_create(&arguments_.back().memory, descs[i], cpu(), nullptr));
    }
    dnnl_primitive_desc* desc = nullptr;
    check(dnnl_matmul_primitive_desc_create(&desc, cpu(), descs[0], descs[1], descs[3], descs[2], nullptr));
    check(dnnl_primitive_create(&primitive_, desc));
    dnnl_primitive_desc_destroy(desc);
    for (int i = 0; i < 3 + with_bias; ++i) dnnl_memory_desc_destroy(descs[i]);
  }

  ~Product() {
    dnnl_primitive_destroy(primitive_);
    for (auto& argument : arguments_) dnnl_memory_destroy(argument.memory);
  }

  Product(const Product&) = delete;

  void run(dnnl_stream* stream, std::initializer_list<void*> data) {
    auto place = data.begin();
    for (auto& argument : arguments_) check(dnnl_memory_set_data_handle(argument.memory, *place++));
    check(dnnl_primitive_execute(primitive_, stream, arguments_.size(), arguments_.data()));
    check(dnnl_stream_wait(stream));
  }

 private:
  dnnl_primitive* primitive_ = nullptr;
  std::vector<dnnl_exec_arg_t> arguments_;
};

// The bytes of all numbers that a primitive depends on.
std::string key_of(const View& a, const View& b, const View& c, bool with_bias) {
  std::string key;
  auto add = [&key](int64_t number) { key.append(reinterpret_cast<const char*>(&number), sizeof number); };
  add(omp_get_max_threads());
  add(with_bias);
  for (const View* view : {&a, &b, &c}) {
    add(static_cast<int64_t>(view->type));
    for (size_t i = 0; i < view->sizes.size(); ++i) {
      add(view->sizes[i]);
      add(view->strides[i]);
    }
  }
  return key;
}

bool is_empty(const View& view) { return std::count(view.sizes.begin(), view.sizes.end(), 0) > 0; }

// The product over an empty dimension: 0. `c` is contiguous.
void clear(const View& c) {
  int64_t bytes = c.type == Type::f32 ? sizeof(float) : sizeof(bf16);
  for (int64_t size : c.sizes) bytes *= size;
  std::memset(c.data, 0, bytes);
}

}  // namespace

View View::transposed() const {
  View result = *this;
  size_t last = sizes.size() - 1;
  std::swap(result.sizes[last], result.sizes[last - 1]);
  std::swap(result.strides[last], result.strides[last - 1]);
  return result;
}

void multiply(const View& a, const View& b, const View& c, const float* bias) {
  if (is_empty(c)) return;
  if (is_empty(a)) return clear(c);
  thread_local std::unordered_map<std::string, std::unique_ptr<Product>> products;
  thread_local dnnl_stream* stream = [] {
    dnnl_stream* created = nullptr;
    check(dnnl_stream_create(&created, cpu(), kInOrder));
    return created;
  }();
  std::string key = key_of(a, b, c, bias != nullptr);
  auto found = products.find(key);
  if (found == products.end()) {
    if (products.size() >= kMaxProducts) products.clear();
    found = products.emplace(key, std::make_unique<Product>(a, b, c, bias != nullptr)).first;
  }
  found->second->run(stream, {a.data, b.data, c.data, const_cast<float*>(bias)});
}
