// Builds frozen tiers on a background thread and swaps them in.
// Invariant: a reader takes the pointer to a frozen tier or the one before it, never one that is being built; rebuilds
// of a prompt end in the order they were asked for.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "suffix_index.h"

namespace slipstream {

struct PromptEntry {
  std::shared_ptr<const Frozen> frozen = std::make_shared<const Frozen>();
  std::shared_ptr<Live> live;
  int pending = 0;  // rebuilds queued or running; guarded by the builder's mutex
};

// One background thread that builds frozen tiers in the order they were asked for.
class Builder {
 public:
  ~Builder() { stop(); }

  void submit(std::shared_ptr<PromptEntry> prompt, Corpus corpus) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
    ++prompt->pending;
    jobs_.push_back({std::move(prompt), std::move(corpus)});
    changed_.notify_all();
  }

  // Waits for the rebuilds of one prompt, or of all (nullptr). Rethrows what a rebuild died of.
  void wait(const PromptEntry* prompt) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return stopping_ || (prompt ? prompt->pending == 0 : num_open() == 0); });
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
    std::shared_ptr<PromptEntry> prompt;
    Corpus corpus;
  };

  size_t num_open() const { return jobs_.size() + (running_ ? 1 : 0); }

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
        std::atomic_store(&job.prompt->frozen, std::shared_ptr<const Frozen>(new Frozen(job.corpus)));
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      running_ = false;
      if (error) error_ = error;
      --job.prompt->pending;
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
