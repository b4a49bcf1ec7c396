// SPDX-License-Identifier: Apache-2.0
// The part of oneDNN's C interface (version 3, https://uxlfoundation.github.io/oneDNN/) that `matmul.cc` calls.
// Paddle ships the library without its headers.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct dnnl_engine;
struct dnnl_stream;
struct dnnl_memory;
struct dnnl_memory_desc;
struct dnnl_primitive;
struct dnnl_primitive_desc;

struct dnnl_exec_arg_t {
  int arg;
  dnnl_memory* memory;
};

struct dnnl_version_t {
  int major, minor, patch;
  const char* hash;
  unsigned cpu_runtime, gpu_runtime;
};

const dnnl_version_t* dnnl_version();
int dnnl_engine_create(dnnl_engine** engine, int kind, size_t index);
int dnnl_stream_create(dnnl_stream** stream, dnnl_engine* engine, unsigned flags);
int dnnl_stream_wait(dnnl_stream* stream);
int dnnl_memory_desc_create_with_strides(dnnl_memory_desc** desc, int dims, const int64_t* sizes, int type,
                                         const int64_t* strides);
int dnnl_memory_desc_destroy(dnnl_memory_desc* desc);
int dnnl_memory_create(dnnl_memory** memory, const dnnl_memory_desc* desc, dnnl_engine* engine, void* data);
int dnnl_memory_set_data_handle(dnnl_memory* memory, void* data);
int dnnl_memory_destroy(dnnl_memory* memory);
int dnnl_matmul_primitive_desc_create(dnnl_primitive_desc** desc, dnnl_engine* engine, const dnnl_memory_desc* source,
                                      const dnnl_memory_desc* weights, const dnnl_memory_desc* bias,
                                      const dnnl_memory_desc* destination, const void* attributes);
int dnnl_primitive_desc_destroy(dnnl_primitive_desc* desc);
int dnnl_primitive_create(dnnl_primitive** primitive, const dnnl_primitive_desc* desc);
int dnnl_primitive_execute(const dnnl_primitive* primitive, dnnl_stream* stream, int count,
                           const dnnl_exec_arg_t* arguments);
int dnnl_primitive_destroy(dnnl_primitive* primitive);

}  // extern "C"

constexpr int kVersion = 3, kSuccess = 0, kCpu = 1, kBf16 = 2, kF32 = 3, kInOrder = 1;
constexpr int kSource = 1, kDestination = 17, kWeights = 33, kBias = 41;
