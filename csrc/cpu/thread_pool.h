// Worker threads for the CPU kernels. Not OpenMP: a second OpenMP runtime beside torch's would spin against it.
#pragma once

#include <cstdint>
#include <functional>

namespace pyzero {

// Runs task(0) ... task(num_tasks - 1), in any order, on up to num_threads threads, the caller's among them. Returns
// when all are done. Callable from several threads at a time (one waits for the other) and after a fork.
void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task);

}  // namespace pyzero
