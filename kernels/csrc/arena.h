// Memory of the growing automata: one stretch of addresses for all of them, handed out in chunks.
//
// Invariants
// - An index is valid for the whole arena and never moves: growth copies nothing, and reading takes one addition.
// - Chunks that an automaton gives back are used again without a page fault, which costs more than inserting the tokens
//   that fit on a page.
// - Addresses are reserved, not memory: only chunks that were used once take up pages.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

namespace slipstream {

constexpr size_t kLine = 64;

inline void* allocate_lines(size_t bytes) {
  void* block = std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine);
  if (!block) throw std::bad_alloc();
  return block;
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

  // The number of the first of `count` chunks side by side; never 0.
  size_t take(size_t count) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = free_.size(); i-- > 0;)
      if (free_[i].count == count) {
        const size_t first = free_[i].first;
        free_[i] = free_.back();
        free_.pop_back();
        return first;
      }
    if ((next_ + count) * kChunkBytes > bytes_) throw std::length_error("the suffix index has no addresses left");
    next_ += count;
    return next_ - count;
  }

  struct Run {
    size_t first, count;
  };
  void give(const std::vector<Run>& runs) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.insert(free_.end(), runs.begin(), runs.end());
  }

 private:
  size_t bytes_;
  char* base_ = nullptr;
  std::mutex mutex_;
  size_t next_ = 1;
  std::vector<Run> free_;
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
    runs_.push_back({arena_->take(chunks), chunks});
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
