// The two ways to threads of parallel_for.h: torch's OpenMP runtime, found in the process, and a pool of our own.
#include "parallel_for.h"

#include <dlfcn.h>
#include <fenv.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace pyzero {
namespace {

struct Tasks {
  int64_t num;
  int num_threads;
  const std::function<void(int64_t)>& run;
  std::atomic<int64_t> next{0};
  std::atomic<int> num_joined{0};
  fenv_t caller_env{};

  // Each thread of a team calls this. Those after the first num_threads do nothing.
  void drain() {
    if (num_joined.fetch_add(1, std::memory_order_relaxed) >= num_threads) return;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num;) run(i);
  }

  // drain() with the floating-point environment of parallel_for's caller: torch.set_flush_denormal() affects only the
  // thread that calls it, and any thread may take any task.
  void drain_as_caller() {
    fenv_t own_env;
    fegetenv(&own_env);
    fesetenv(&caller_env);
    drain();
    fesetenv(&own_env);
  }
};

class ThreadPool {
 public:
  void run(Tasks& tasks) {
    const std::lock_guard<std::mutex> one_caller(caller_mutex_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < tasks.num_threads - 1) {
        workers_.emplace_back([this, index = static_cast<int>(workers_.size())] { work(index); });
      }
      tasks_ = &tasks;
      num_wanted_ = tasks.num_threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    tasks.drain();
    std::unique_lock<std::mutex> lock(mutex_);
    num_wanted_ = 0;  // workers that have not woken yet do not join in
    done_.wait(lock, [this] { return num_running_ == 0; });
  }

 private:
  void work(int index) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (uint64_t seen = 0;;) {
      wake_.wait(lock, [&] { return index < num_wanted_ && generation_ != seen; });
      seen = generation_;
      ++num_running_;
      lock.unlock();
      tasks_->drain_as_caller();
      lock.lock();
      if (--num_running_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> workers_;
  Tasks* tasks_ = nullptr;
  int num_wanted_ = 0;  // workers that may join in
  int num_running_ = 0;
  uint64_t generation_ = 0;
};

// The OpenMP runtime that torch has loaded, by the functions that compilers call: GNU's, LLVM's and Intel's have them.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
  int (*max_threads)();

  explicit operator bool() const { return parallel != nullptr && max_threads != nullptr; }

  // The team is as large as torch's. In a smaller one the runtime would end the surplus threads, and create them again.
  void run(Tasks& tasks) const {
    const int num_threads = std::max(max_threads(), tasks.num_threads);
    parallel([](void* data) { static_cast<Tasks*>(data)->drain_as_caller(); }, &tasks,
             static_cast<unsigned>(num_threads), 0);
  }
};

template <typename Function>
void find(const char* name, Function*& out) {
  out = reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

const OpenMp& open_mp() {
  static const OpenMp found = [] {
    OpenMp runtime{};
    find("GOMP_parallel", runtime.parallel);
    find("omp_get_max_threads", runtime.max_threads);
    return runtime;
  }();
  return found;
}

// A forked child has neither OpenMP's threads nor the pool's.
ThreadPool* g_pool = new ThreadPool;  // never destroyed, because workers may still wait at exit
bool g_is_forked = false;
[[maybe_unused]] const int g_registered = pthread_atfork(nullptr, nullptr, [] {
  g_pool = new ThreadPool;
  g_is_forked = true;
});

}  // namespace

void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task) {
  if (num_tasks < num_threads) num_threads = static_cast<int>(num_tasks);
  Tasks tasks{num_tasks, std::max(num_threads, 1), task};
  if (num_threads <= 1) {
    tasks.drain();
    return;
  }
  fegetenv(&tasks.caller_env);
  if (!g_is_forked && open_mp()) {
    open_mp().run(tasks);
  } else {
    g_pool->run(tasks);
  }
}

}  // namespace pyzero
