// Threads for the CPU kernels: those of the OpenMP runtime that torch has loaded, which are awake behind torch's own
// kernels, and would hold the cores against any others. Where it has none, as with torch's native thread pool, or in a
// child that was forked since this module was loaded, a pool of our own.
#pragma once

#include <cstdint>
#include <functional>

namespace pyzero {

// Runs task(0) ... task(num_tasks - 1), in any order, on up to num_threads threads, the caller's among them. Returns
// when all are done. Callable from several threads at a time, and in such a child.
void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task);

}  // namespace pyzero
