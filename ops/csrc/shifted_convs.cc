// SPDX-License-Identifier: Apache-2.0
// Mixing of MS-MLP (https://arxiv.org/abs/2202.06510): each channel group is rolled along either axis and convolved depthwise.
#include <type_traits>

#include "common.h"

namespace {

// A group of channels with its kernel size, and the sources of its rolled rows and columns.
struct Group {
  int64_t first, channels, kernel, weights;  // the first channel and weight
  std::vector<int64_t> rows, columns;

  int64_t taps() const { return 2 * kernel * kernel; }  // of both branches
};

struct Sizes {
  int64_t batch, height, width, channels, weights;
  std::vector<Group> groups;

  int64_t pixels() const { return height * width; }
};

// Positions after a roll -> positions before.
std::vector<int64_t> rolled(int64_t size, int64_t shift) {
  std::vector<int64_t> sources(size);
  for (int64_t i = 0; i < size; ++i) sources[i] = ((i - shift) % size + size) % size;
  return sources;
}

Sizes sizes_of(const Tensor& x, const std::vector<int>& dims, const std::vector<int>& kernels, const std::vector<int>& shifts) {
  const auto shape = shape_of(x, 4);
  Sizes n{shape[0], shape[1], shape[2], 0, 0, {}};
  for (size_t i = 0; i < dims.size(); ++i) {
    n.groups.push_back({n.channels, dims[i], kernels[i], n.weights, rolled(n.height, shifts[i]), rolled(n.width, shifts[i])});
    n.channels += dims[i];
    n.weights += n.groups.back().taps() * dims[i];
  }
  return n;
}

// Weights [branch, channel, tap] of each group <-> [branch, tap, channel], whose channels are contiguous.
template <typename Move>
void for_each_weight(const Sizes& n, const Move& move) {
  for (const Group& g : n.groups) {
    const int64_t taps = g.kernel * g.kernel;
    for (int64_t branch = 0; branch < 2; ++branch) {
      const int64_t start = g.weights + branch * taps * g.channels;
      for (int64_t c = 0; c < g.channels; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) move(start + c * taps + tap, start + tap * g.channels + c);
      }
    }
  }
}

std::vector<float> channels_last(const Tensor& weight, const Sizes& n) {
  std::vector<float> result(n.weights);
  const float* from = pointer<float>(weight);
  for_each_weight(n, [&](int64_t stored, int64_t moved) { result[moved] = from[stored]; });
  return result;
}

// Call `work(source, tap)` for all taps of an output pixel that lie in the rolled map: branch 0 is rolled along the columns, 1
// along the rows.
template <typename Work>
inline void for_each_tap(const Sizes& n, const Group& g, int64_t row, int64_t column, const Work& work) {
  const int64_t k = g.kernel, half = k / 2;
  for (int64_t u = 0; u < k; ++u) {
    const int64_t r = row + u - half;
    if (r < 0 || r >= n.height) continue;
    const int64_t here = r * n.width, moved = g.rows[r] * n.width;
    for (int64_t v = 0; v < k; ++v) {
      const int64_t c = column + v - half;
      if (c < 0 || c >= n.width) continue;
      work(here + g.columns[c], u * k + v);
      work(moved + c, (k + u) * k + v);
    }
  }
}

// Call `work(lanes, channel)` with the number of channels that are computed together as a constant.
template <typename Work>
inline void by_lanes(int64_t channels, const Work& work) {
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) work(std::integral_constant<int, 16>(), c);
  for (; c + 4 <= channels; c += 4) work(std::integral_constant<int, 4>(), c);
  for (; c < channels; ++c) work(std::integral_constant<int, 1>(), c);
}

template <int N>
inline void multiply_add(const float* a, const float* b, float* sum) {
#pragma omp simd
  for (int i = 0; i < N; ++i) sum[i] += a[i] * b[i];
}

// Throw if a group lacks a size, or has one that the loops cannot run over.
void check_groups(const std::vector<int>& dims, const std::vector<int>& kernels, const std::vector<int>& shifts) {
  if (kernels.size() != dims.size() || shifts.size() != dims.size()) PD_THROW("dims, kernels and shifts differ in length");
  for (size_t i = 0; i < dims.size(); ++i) {
    if (dims[i] < 1 || kernels[i] < 1 || kernels[i] % 2 == 0) PD_THROW("a group needs channels and an odd kernel size");
  }
}

std::vector<Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::vector<int>& dims,
                            const std::vector<int>& kernels, const std::vector<int>& shifts) {
  check_groups(dims, kernels, shifts);
  const Sizes n = sizes_of(x, dims, kernels, shifts);
  expect_shapes({{"the input of shifted convolutions", x, {n.batch, n.height, n.width, n.channels}},
                 {"the weight of shifted convolutions", weight, {n.weights}},
                 {"the bias of shifted convolutions", bias, {n.channels}}});
  Tensor y = same_shape(x);
  const std::vector<float> weights = channels_last(weight, n);
  const float *from = pointer<float>(x), *b = pointer<float>(bias);
  float* to = pointer<float>(y);
  parallel(n.batch * n.height, [&](int64_t first, int64_t last) {
    for (int64_t line = first; line < last; ++line) {
      const int64_t row = line % n.height;
      const float* image = from + line / n.height * n.pixels() * n.channels;
      for (const Group& g : n.groups) {
        const float* w = weights.data() + g.weights;
        for (int64_t column = 0; column < n.width; ++column) {
          float* out = to + (line * n.width + column) * n.channels + g.first;
          by_lanes(g.channels, [&](auto lanes, int64_t c) {
            constexpr int N = decltype(lanes)::value;
            float sum[N];
            std::copy(b + g.first + c, b + g.first + c + N, sum);
            for_each_tap(n, g, row, column, [&](int64_t source, int64_t tap) {
              multiply_add<N>(image + source * n.channels + g.first + c, w + tap * g.channels + c, sum);
            });
            std::copy(sum, sum + N, out + c);
          });
        }
      }
    }
  });
  return {y};
}

std::vector<Tensor> backward(const Tensor& x, const Tensor& weight, const Tensor& dy, const std::vector<int>& dims,
                             const std::vector<int>& kernels, const std::vector<int>& shifts) {
  const Sizes n = sizes_of(x, dims, kernels, shifts);
  Tensor dx = same_shape(x), d_weight = empty<float>({n.weights});
  std::memset(dx.data(), 0, dx.numel() * sizeof(float));
  ColumnSums sums(n.weights);
  const std::vector<float> weights = channels_last(weight, n);
  const float *from = pointer<float>(x), *gradient = pointer<float>(dy);
  float* to = pointer<float>(dx);
  const int64_t groups = n.groups.size();
  parallel(n.batch * groups, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const Group& g = n.groups[part % groups];
      const int64_t start = part / groups * n.pixels() * n.channels + g.first;
      const float* w = weights.data() + g.weights;
      float* d_w = sums.of_this_thread() + g.weights;
      for (int64_t pixel = 0; pixel < n.pixels(); ++pixel) {
        const float* d = gradient + start + pixel * n.channels;
        by_lanes(g.channels, [&](auto lanes, int64_t c) {
          constexpr int N = decltype(lanes)::value;
          float own[N];
          std::copy(d + c, d + c + N, own);
          for_each_tap(n, g, pixel / n.width, pixel % n.width, [&](int64_t source, int64_t tap) {
            const int64_t at = start + source * n.channels + c;
            multiply_add<N>(w + tap * g.channels + c, own, to + at);
            multiply_add<N>(from + at, own, d_w + tap * g.channels + c);
          });
        });
      }
    }
  });
  const Tensor total = sums.total();
  const float* moved_sums = pointer<float>(total);
  float* stored_sums = pointer<float>(d_weight);
  for_each_weight(n, [&](int64_t stored, int64_t moved) { stored_sums[stored] = moved_sums[moved]; });
  return {dx, d_weight, column_sums(gradient, n.batch * n.pixels(), n.channels)};
}

}  // namespace

PD_BUILD_OP(leanvit_shifted_convs)
    .Inputs({"X", "Weight", "Bias"})
    .Outputs({"Y"})
    .Attrs({"dims: std::vector<int>", "kernels: std::vector<int>", "shifts: std::vector<int>"})
    .SetKernelFn(PD_KERNEL(forward));

PD_BUILD_GRAD_OP(leanvit_shifted_convs)
    .Inputs({"X", "Weight", paddle::Grad("Y")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Weight"), paddle::Grad("Bias")})
    .Attrs({"dims: std::vector<int>", "kernels: std::vector<int>", "shifts: std::vector<int>"})
    .SetKernelFn(PD_KERNEL(backward));

NO_SECOND_DERIVATIVE(leanvit_shifted_convs, "X");
