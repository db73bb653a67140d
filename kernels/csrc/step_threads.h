// A few threads that share one engine step's rows.
// Invariants
// - `run` returns after every task has ended; a task that throws is rethrown there, the first one if several do.
// - Nobody waits for a thread that has not begun: the caller works through the tasks itself, and a helper that the
//   system wakes late finds the gate closed and sleeps again. On a machine that is busy this is what costs nothing.
// - A helper spins for a moment before it sleeps: between two kernels of one forward pass lie some tens of
//   microseconds, which is less than waking a sleeper takes.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace slipstream {

class StepThreads {
 public:
  // count: threads besides the caller's. spin: how long a helper looks for the next round before it sleeps.
  explicit StepThreads(size_t count, std::chrono::microseconds spin = std::chrono::microseconds(0)) : spin_(spin) {
    for (size_t i = 0; i < count; ++i) helpers_.emplace_back([this] { help(); });
  }
  StepThreads(const StepThreads&) = delete;
  StepThreads& operator=(const StepThreads&) = delete;
  ~StepThreads() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      round_.fetch_add(1);
    }
    start_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  size_t size() const { return helpers_.size() + 1; }

  // task(i) runs once for every i below `count`, each on whichever thread takes it first.
  void run(size_t count, const std::function<void(size_t)>& task) {
    if (helpers_.empty() || count <= 1) {
      for (size_t i = 0; i < count; ++i) task(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      gate_.store(0, std::memory_order_release);  // open, nobody inside
      round_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) start_.notify_all();
    take_tasks();
    gate_.fetch_or(kClosed, std::memory_order_acq_rel);
    // Whoever is inside has a task in hand: a few microseconds, or what the system's scheduler takes.
    for (int looks = 0; gate_.load(std::memory_order_acquire) != kClosed; ++looks)
      if (looks > 1000) std::this_thread::yield();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  static constexpr uint32_t kClosed = 1u << 31;

  void take_tasks() {
    for (size_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) {
      try {
        (*task_)(i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
    }
  }

  bool enter() {
    uint32_t gate = gate_.load(std::memory_order_acquire);
    while (!(gate & kClosed))
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) return true;
    return false;
  }

  void wait_for_round(size_t seen) {
    const auto next = [&] { return round_.load(std::memory_order_acquire) != seen; };
    if (spin_.count() > 0) {
      const auto deadline = std::chrono::steady_clock::now() + spin_;
      do {
        for (int i = 0; i < 32; ++i) {
          if (next()) return;
#if defined(__x86_64__)
          __builtin_ia32_pause();
#endif
        }
      } while (std::chrono::steady_clock::now() < deadline);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1);
    start_.wait(lock, next);
    sleeping_.fetch_sub(1);
  }

  void help() {
    size_t seen = 0;
    for (;;) {
      wait_for_round(seen);
      seen = round_.load(std::memory_order_acquire);
      if (stopping_) return;
      if (!enter()) continue;
      take_tasks();
      gate_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  const std::chrono::microseconds spin_;
  std::mutex mutex_;
  std::condition_variable start_;
  const std::function<void(size_t)>* task_ = nullptr;
  size_t count_ = 0;
  std::exception_ptr error_;
  std::atomic<uint32_t> gate_{kClosed};
  std::atomic<size_t> next_{0}, round_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> helpers_;
};

// Operations that are worth a task of their own, about 2.5 us.
constexpr int64_t kTaskWork = 1 << 19;

// Into how many tasks, `least` to `most`, so many operations are dealt: as many for every thread, so that all end
// together; one where a second would not pay.
inline int64_t task_count(const StepThreads* threads, int64_t work, int64_t least, int64_t most) {
  const int64_t wanted = std::max(least, work / kTaskWork), each = threads == nullptr ? 1 : int64_t(threads->size());
  return std::clamp<int64_t>(wanted > 1 ? (wanted + each - 1) / each * each : wanted, 1, std::max<int64_t>(most, 1));
}

// task(i) for every i below `count`, on the caller's thread alone if `threads` is null.
template <typename Task>
void for_each_task(StepThreads* threads, int64_t count, const Task& task) {
  if (threads != nullptr && count > 1) return threads->run(static_cast<size_t>(count), [&](size_t i) { task(int64_t(i)); });
  for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace slipstream
