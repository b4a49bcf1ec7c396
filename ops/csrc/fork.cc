// SPDX-License-Identifier: Apache-2.0
// Forked processes compute in one thread with GNU's OpenMP runtime. It would wait without end for the threads of the parent,
// which fork() does not copy. Intel's runtime, which the launchers load, starts new threads.
#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>

#include <cstring>

namespace {

void use_one_thread() { omp_set_num_threads(1); }

bool is_gnu() {
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(&omp_set_num_threads), &info) && std::strstr(info.dli_fname, "libgomp");
}

[[maybe_unused]] const int registered = is_gnu() ? pthread_atfork(nullptr, nullptr, use_one_thread) : 0;

}  // namespace
