#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace pyzero {
namespace {

class ThreadPool {
 public:
  void run(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task) {
    const std::lock_guard<std::mutex> one_caller(caller_mutex_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < num_threads - 1) {
        workers_.emplace_back(
            [this, index = static_cast<int>(workers_.size()), seen = generation_] { work(index, seen); });
      }
      task_ = &task;
      num_tasks_ = num_tasks;
      next_task_.store(0, std::memory_order_relaxed);
      num_helpers_ = num_threads - 1;
      num_running_ = num_helpers_;
      ++generation_;
    }
    wake_.notify_all();
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return num_running_ == 0; });
  }

 private:
  void drain() {
    for (int64_t i; (i = next_task_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) (*task_)(i);
  }

  void work(int index, uint64_t seen) {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (index >= num_helpers_) continue;
      }
      drain();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--num_running_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t num_tasks_ = 0;
  std::atomic<int64_t> next_task_{0};
  int num_helpers_ = 0;
  int num_running_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: at exit the workers may still wait, and after a fork the child's copy has no threads behind it.
ThreadPool* g_pool = nullptr;

ThreadPool& pool() {
  static const bool once = [] {
    g_pool = new ThreadPool;
    pthread_atfork(nullptr, nullptr, [] { g_pool = new ThreadPool; });
    return true;
  }();
  (void)once;
  return *g_pool;
}

}  // namespace

void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task) {
  if (num_tasks < num_threads) num_threads = static_cast<int>(num_tasks);
  if (num_threads <= 1) {
    for (int64_t i = 0; i < num_tasks; ++i) task(i);
    return;
  }
  pool().run(num_tasks, num_threads, task);
}

}  // namespace pyzero
