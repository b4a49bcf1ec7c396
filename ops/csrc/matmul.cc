// SPDX-License-Identifier: Apache-2.0
#include "matmul.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <list>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "onednn.h"

namespace {

// Products of different shapes that a thread keeps. oneDNN's own cache of 1024 for all threads (ONEDNN_PRIMITIVE_CACHE_CAPACITY)
// returns others within 5 microseconds; a new one takes 0.3 ms.
constexpr size_t kMaxProducts = 256;

std::atomic<int64_t> created_products{0};

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

// The products of this thread, least recently used last.
class Products {
 public:
  Product& get(const View& a, const View& b, const View& c, bool with_bias) {
    std::string key = key_of(a, b, c, with_bias);
    auto found = places_.find(key);
    if (found == places_.end()) return add(std::move(key), a, b, c, with_bias);
    entries_.splice(entries_.begin(), entries_, found->second);
    return found->second->product;
  }

 private:
  struct Entry {
    Entry(std::string name, const View& a, const View& b, const View& c, bool with_bias)
        : key(std::move(name)), product(a, b, c, with_bias) {}

    std::string key;
    Product product;
  };

  Product& add(std::string key, const View& a, const View& b, const View& c, bool with_bias) {
    if (entries_.size() >= kMaxProducts) {
      places_.erase(entries_.back().key);
      entries_.pop_back();
    }
    entries_.emplace_front(std::move(key), a, b, c, with_bias);
    places_.emplace(entries_.front().key, entries_.begin());
    ++created_products;
    return entries_.front().product;
  }

  std::list<Entry> entries_;
  std::unordered_map<std::string, std::list<Entry>::iterator> places_;
};

bool is_empty(const View& view) { return std::count(view.sizes.begin(), view.sizes.end(), 0) > 0; }

// The product over an empty dimension: the bias, or 0. `c` is contiguous.
void fill(const View& c, const float* bias) {
  const int64_t columns = c.sizes.back();
  int64_t count = 1;
  for (int64_t size : c.sizes) count *= size;
  for (int64_t i = 0; i < count; ++i) {
    const float value = bias ? bias[i % columns] : 0.0f;
    c.type == Type::f32 ? store(value, static_cast<float*>(c.data)[i]) : store(value, static_cast<bf16*>(c.data)[i]);
  }
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
  if (is_empty(a)) return fill(c, bias);
  thread_local Products products;
  thread_local dnnl_stream* stream = [] {
    dnnl_stream* created = nullptr;
    check(dnnl_stream_create(&created, cpu(), kInOrder));
    return created;
  }();
  products.get(a, b, c, bias != nullptr).run(stream, {a.data, b.data, c.data, const_cast<float*>(bias)});
}

int64_t leanvit_created_products() { return created_products; }
