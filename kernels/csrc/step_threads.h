// A few threads that share one engine step's rows.
// Invariant: `run` returns after every part has ended; a part that throws is rethrown there, the first one if several do.
#pragma once
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace slipstream {

class StepThreads {
 public:
  // count: threads besides the caller's.
  explicit StepThreads(size_t count) : errors_(count + 1) {
    for (size_t i = 0; i < count; ++i) threads_.emplace_back([this, i] { work(i + 1); });
  }
  StepThreads(const StepThreads&) = delete;
  StepThreads& operator=(const StepThreads&) = delete;
  ~StepThreads() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    start_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  size_t size() const { return threads_.size() + 1; }

  // part(i) runs for every i below size(), part(0) on the caller's thread.
  void run(const std::function<void(size_t)>& part) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      part_ = &part;
      running_ = threads_.size();
      ++round_;
    }
    start_.notify_all();
    call(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
    for (std::exception_ptr& error : errors_)
      if (error) {
        const std::exception_ptr raised = error;
        for (std::exception_ptr& each : errors_) each = nullptr;
        std::rethrow_exception(raised);
      }
  }

 private:
  void call(size_t i) {
    try {
      (*part_)(i);
    } catch (...) {
      errors_[i] = std::current_exception();
    }
  }

  void work(size_t i) {
    size_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return stopping_ || round_ != seen; });
      if (stopping_) return;
      seen = round_;
      lock.unlock();
      call(i);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(size_t)>* part_ = nullptr;
  size_t running_ = 0, round_ = 0;
  bool stopping_ = false;
  std::vector<std::exception_ptr> errors_;
  std::vector<std::thread> threads_;
};

}  // namespace slipstream
