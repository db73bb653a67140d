// Builds frozen tiers and the shared text on a background thread and swaps them in.
// Invariant: a reader takes the pointer to a built tier or the one before it, never one that is being built; builds of a
// prompt end in the order they were asked for.
#pragma once
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#include "suffix_freeze.h"

namespace slipstream {

class Builder {
 public:
  ~Builder() { stop(); }

  // owner: whom `wait` can wait for; pending counts its jobs and is guarded by the builder.
  void submit(int* pending, std::function<void()> job) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
    ++*pending;
    jobs_.push_back({pending, std::move(job)});
    changed_.notify_all();
  }

  // Waits for one owner's jobs, or for all (nullptr). Rethrows what a job died of.
  void wait(const int* pending) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return stopping_ || (pending ? *pending == 0 : jobs_.empty() && !running_); });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      changed_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
  }

 private:
  struct Job {
    int* pending;
    std::function<void()> work;
  };

  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
      if (stopping_) return;
      Job job = std::move(jobs_.front());
      jobs_.pop_front();
      running_ = true;
      lock.unlock();
      std::exception_ptr error;
      try {
        job.work();
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      running_ = false;
      if (error) error_ = error;
      --*job.pending;
      job.work = nullptr;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  std::exception_ptr error_;
  bool running_ = false, stopping_ = false;
  std::thread thread_;
};

}  // namespace slipstream
