// Memory of the indexes: one stretch of addresses for all of a kind, handed out in chunks.
//
// Invariants
// - An index is valid for the whole arena and never moves: growth copies nothing, and reading takes one addition.
// - A stretch is mapped in large pages where the system has them: the indexes of many prompts take more small pages than a
//   processor remembers, and what looks all over them waits for the page table too.
// - Chunks that an automaton gives back are used again without a page fault, which costs more than inserting the tokens
//   that fit on a page.
// - Addresses are reserved, not memory: only chunks that were used once take up pages.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

namespace slipstream {

constexpr size_t kLine = 64;

// Not __builtin_prefetch: gcc takes a function of nothing else for pure and drops the call.
inline void prefetch(const void* at) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" ::"m"(*static_cast<const char*>(at)));
#elif defined(__aarch64__)
  asm volatile("prfm pldl1keep, %0" ::"Q"(*static_cast<const char*>(at)));
#else
  __builtin_prefetch(at);
#endif
}

// Any thread may call it.
class Arena {
 public:
  static constexpr size_t kChunkBytes = size_t{1} << 15;

  explicit Arena(size_t bytes) : bytes_(bytes) {
    // A limit on addresses (ulimit -v, a container) may refuse the whole stretch; a part of it holds smaller indexes.
    for (; bytes_ >= (size_t{1} << 28); bytes_ /= 2) {
      void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (at == MAP_FAILED) continue;
      base_ = static_cast<char*>(at);
#ifdef MADV_HUGEPAGE
      madvise(base_, bytes_, MADV_HUGEPAGE);  // advice only
#endif
      return;
    }
    throw std::bad_alloc();
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { munmap(base_, bytes_); }

  char* base() const { return base_; }

  struct Run {
    size_t first, count;
  };

  // `count` chunks side by side, at the lowest place that is free; their number is never 0.
  Run take(size_t count) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto free = free_.begin(); free != free_.end(); ++free) {
      const Run run{free->first, free->second};
      if (run.count < count) continue;
      free_.erase(free);
      if (run.count > count) free_[run.first + count] = run.count - count;
      return {run.first, count};
    }
    if ((next_ + count) * kChunkBytes > bytes_) throw std::length_error("the suffix index has no addresses left");
    next_ += count;
    return {next_ - count, count};
  }

  void give(const std::vector<Run>& runs) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const Run& run : runs) {
      const auto at = free_.emplace(run.first, run.count).first;
      join(at);
      if (at != free_.begin()) join(std::prev(at));
    }
  }

 private:
  using Free = std::map<size_t, size_t>;
  // With what follows right after.
  void join(Free::iterator at) {
    const auto next = std::next(at);
    if (next == free_.end() || at->first + at->second != next->first) return;
    at->second += next->second;
    free_.erase(next);
  }

  size_t bytes_;
  char* base_ = nullptr;
  std::mutex mutex_;
  size_t next_ = 1;
  Free free_;  // first chunk: how many
};

// A table of a fixed size in an arena, zero at first; gives its chunks back at the end.
template <typename T>
class ArenaTable {
 public:
  ArenaTable(Arena& arena, size_t size)
      : arena_(&arena),
        run_(arena.take((size * sizeof(T) + Arena::kChunkBytes - 1) / Arena::kChunkBytes)),
        base_(reinterpret_cast<T*>(arena.base() + run_.first * Arena::kChunkBytes)),
        size_(size) {
    std::fill(base_, base_ + size, T{});
  }
  ArenaTable(const ArenaTable&) = delete;
  ArenaTable& operator=(const ArenaTable&) = delete;
  ~ArenaTable() { arena_->give({run_}); }

  T& operator[](size_t i) const { return base_[i]; }
  size_t size() const { return size_; }
  void swap(ArenaTable& other) {
    std::swap(run_, other.run_);
    std::swap(base_, other.base_);
    std::swap(size_, other.size_);
  }

 private:
  Arena* arena_;
  Arena::Run run_;
  T* base_;
  size_t size_;
};

// One owner's share of an arena, as values of one plain type; gives it back at the end.
template <typename T>
class ArenaArray {
  static_assert(Arena::kChunkBytes % sizeof(T) == 0, "values must not straddle chunks");

 public:
  static constexpr size_t kPerChunk = Arena::kChunkBytes / sizeof(T);

  explicit ArenaArray(Arena& arena) : arena_(&arena), base_(reinterpret_cast<T*>(arena.base())) {}
  ArenaArray(const ArenaArray&) = delete;
  ArenaArray& operator=(const ArenaArray&) = delete;
  ~ArenaArray() { arena_->give(runs_); }

  T* at(size_t i) const { return base_ + i; }
  T& operator[](size_t i) const { return base_[i]; }
  size_t bytes() const { return num_chunks_ * Arena::kChunkBytes; }

  // Appends a copy; returns its index.
  size_t push(const T& value) {
    if (next_ == end_) add(1);
    base_[next_] = value;
    return next_++;
  }

  // The index of the first of `count` uninitialised values side by side.
  size_t extend(size_t count) {
    if (end_ - next_ < count) {
      const size_t chunks = (count + kPerChunk - 1) / kPerChunk;
      if (chunks > 1) return reserve(chunks);
      add(1);
    }
    next_ += count;
    return next_ - count;
  }

  // Visits the indices pushed so far in order, as ranges [first, last).
  template <typename Visit>
  void each_range(Visit visit) const {
    for (const Arena::Run& run : runs_) {
      const size_t first = run.first * kPerChunk, last = first + run.count * kPerChunk;
      visit(first, next_ > first && next_ <= last ? next_ : last);
    }
  }

 private:
  size_t reserve(size_t chunks) {
    runs_.reserve(runs_.size() + 1);
    runs_.push_back(arena_->take(chunks));
    num_chunks_ += chunks;
    return runs_.back().first * kPerChunk;
  }
  void add(size_t chunks) {
    next_ = reserve(chunks);
    end_ = next_ + chunks * kPerChunk;
  }

  Arena* arena_;
  T* base_;
  size_t next_ = 0, end_ = 0, num_chunks_ = 0;
  std::vector<Arena::Run> runs_;
};

}  // namespace slipstream
