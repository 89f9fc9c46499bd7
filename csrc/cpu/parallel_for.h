// Threads for the CPU kernels. They are those of the OpenMP runtime that torch has loaded: after torch's kernels these
// still spin, and would keep other threads off the cores. A pool of our own serves if torch has loaded no OpenMP (it
// may have a native thread pool), and in a child that was forked after this module was loaded.
#pragma once

#include <cstdint>
#include <functional>

namespace pyzero {

// Runs task(0) ... task(num_tasks - 1), in any order, on up to num_threads threads including the caller's. Returns when
// all are done. Several threads may call it at a time. A forked child may call it.
void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task);

}  // namespace pyzero
