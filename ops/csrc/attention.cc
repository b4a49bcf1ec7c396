// SPDX-License-Identifier: Apache-2.0
// Multi-head self-attention of packed queries, keys and values: softmax(scale q k^T + bias per key) v.
#include "common.h"

namespace {

struct Sizes {
  int64_t batch, tokens, heads, dim;

  int64_t channels() const { return heads * dim; }
  int64_t scores() const { return heads * tokens * tokens; }  // of one sample
};

Sizes sizes_of(const Tensor& qkv, int heads) {
  auto shape = qkv.shape();
  return {shape[0], shape[1], heads, shape[2] / 3 / heads};
}

// Samples that are computed together: enough work for all threads, scores that stay in the cache.
int64_t chunk_of(const Sizes& n) { return std::min<int64_t>(n.batch, (2 * omp_get_max_threads() + n.heads - 1) / n.heads); }

// Part 0 (queries), 1 (keys) or 2 (values) of some samples, [samples, H, N, d].
template <typename T>
View part(T* qkv, const Sizes& n, int64_t first, int64_t samples, int64_t index) {
  const int64_t token = 3 * n.channels();
  return view(qkv + first * n.tokens * token + index * n.channels(), {samples, n.heads, n.tokens, n.dim},
              {n.tokens * token, n.dim, token, 1});
}

// Some samples of a [B, N, C] tensor, as [samples, H, N, d].
template <typename T>
View heads(T* x, const Sizes& n, int64_t first, int64_t samples) {
  return view(x + first * n.tokens * n.channels(), {samples, n.heads, n.tokens, n.dim},
              {n.tokens * n.channels(), n.dim, n.channels(), 1});
}

// [samples, H, N, N].
template <typename T>
View scores(T* data, const Sizes& n, int64_t samples) {
  return view(data, {samples, n.heads, n.tokens, n.tokens}, {n.scores(), n.tokens * n.tokens, n.tokens, 1});
}

template <typename T>
void softmax_row(const float* logits, const float* bias, float scale, int64_t columns, float* work, T* weights) {
  float largest = -INFINITY, sum = 0.0f;
  if (bias == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) work[i] = logits[i] * scale;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) work[i] = logits[i] * scale + bias[i];
  }
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < columns; ++i) largest = work[i] > largest ? work[i] : largest;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < columns; ++i) sum += work[i] = exp_negative(work[i] - largest);
  const float factor = 1.0f / sum;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) store(work[i] * factor, weights[i]);
}

template <typename T>
std::vector<Tensor> run(const Tensor& qkv_tensor, const Tensor& key_bias, int num_heads, float scale) {
  const Sizes n = sizes_of(qkv_tensor, num_heads);
  const Tensor qkv = cast<T>(qkv_tensor);
  Tensor y = empty<T>({n.batch, n.tokens, n.channels()}), saved = empty<T>({n.batch, n.heads, n.tokens, n.tokens});
  const int64_t chunk = chunk_of(n);
  std::vector<float> logits(chunk * n.scores());
  const T* packed = pointer<T>(qkv);
  const float* bias = key_bias.numel() ? pointer<float>(key_bias) : nullptr;
  for (int64_t start = 0; start < n.batch; start += chunk) {
    const int64_t samples = std::min(chunk, n.batch - start);
    T* weights = pointer<T>(saved) + start * n.scores();
    float* raw = logits.data();
    multiply(part(packed, n, start, samples, 0), part(packed, n, start, samples, 1).transposed(), scores(raw, n, samples));
    parallel(samples * n.heads * n.tokens, [=](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const float* row_bias = bias ? bias + (start + row / (n.heads * n.tokens)) * n.tokens : nullptr;
        float* values = raw + row * n.tokens;
        softmax_row(values, row_bias, scale, n.tokens, values, weights + row * n.tokens);
      }
    });
    multiply(scores(weights, n, samples), part(packed, n, start, samples, 2), heads(pointer<T>(y), n, start, samples));
  }
  return {y, saved};
}

std::vector<Tensor> forward(const Tensor& qkv, const Tensor& key_bias, int num_heads, float scale, bool half) {
  const auto shape = shape_of(qkv, 3);
  if (num_heads < 1 || shape[2] % (3 * num_heads)) {
    PD_THROW("the number of channels is no multiple of 3 times the number of heads");
  }
  if (key_bias.numel()) expect_shapes({{"the bias of the keys", key_bias, {shape[0], shape[1]}}});
  return BY_TYPE(half, run, qkv, key_bias, num_heads, scale);
}

// Gradient of the products q k^T from that of the attention weights; times the scale of the logits.
template <typename T>
void softmax_backward_row(const T* weights, const float* gradient, float scale, int64_t columns, T* result) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < columns; ++i) sum += load(weights[i]) * gradient[i];
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) store(scale * load(weights[i]) * (gradient[i] - sum), result[i]);
}

template <typename T>
std::vector<Tensor> gradients(const Tensor& qkv_tensor, const Tensor& saved, const Tensor& dy_tensor, int num_heads,
                              float scale) {
  const Sizes n = sizes_of(qkv_tensor, num_heads);
  const Tensor qkv = cast<T>(qkv_tensor);
  Tensor d_qkv = empty<T>(qkv.shape());
  const int64_t chunk = chunk_of(n);
  std::vector<float> d_weights(chunk * n.scores());
  std::vector<T> d_logits(chunk * n.scores());
  const T* packed = pointer<T>(qkv);
  T* d_packed = pointer<T>(d_qkv);
  const Tensor dy = cast<T>(dy_tensor);
  for (int64_t start = 0; start < n.batch; start += chunk) {
    const int64_t samples = std::min(chunk, n.batch - start);
    const T* weights = pointer<T>(saved) + start * n.scores();
    float* raw = d_weights.data();
    T* d = d_logits.data();
    const View gradient = heads(pointer<T>(dy), n, start, samples);
    multiply(gradient, part(packed, n, start, samples, 2).transposed(), scores(raw, n, samples));
    parallel(samples * n.heads * n.tokens, [=](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t at = row * n.tokens;
        softmax_backward_row(weights + at, raw + at, scale, n.tokens, d + at);
      }
    });
    multiply(scores(d, n, samples), part(packed, n, start, samples, 1), part(d_packed, n, start, samples, 0));
    multiply(scores(d, n, samples).transposed(), part(packed, n, start, samples, 0), part(d_packed, n, start, samples, 1));
    multiply(scores(weights, n, samples).transposed(), gradient, part(d_packed, n, start, samples, 2));
  }
  return {qkv_tensor.dtype() == DataType::FLOAT32 ? cast<float>(d_qkv) : d_qkv};
}

std::vector<Tensor> backward(const Tensor& qkv, const Tensor& saved, const Tensor& dy, int num_heads, float scale,
                             bool half) {
  return BY_TYPE(half, gradients, qkv, saved, dy, num_heads, scale);
}

}  // namespace

PD_BUILD_OP(leanvit_attention)
    .Inputs({"QKV", "KeyBias"})
    .Outputs({"Y", "Weights"})
    .Attrs({"num_heads: int", "scale: float", "half: bool"})
    .SetKernelFn(PD_KERNEL(forward));

PD_BUILD_GRAD_OP(leanvit_attention)
    .Inputs({"QKV", "Weights", paddle::Grad("Y")})
    .Outputs({paddle::Grad("QKV")})
    .Attrs({"num_heads: int", "scale: float", "half: bool"})
    .SetKernelFn(PD_KERNEL(backward));

NO_SECOND_DERIVATIVE(leanvit_attention, "QKV");
