// A growing array of plain values, in one block without pointers into itself.
// Invariants: the values are trivially copyable; the block begins at a cache line, so that values whose size divides 64
// never straddle two lines.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

namespace slipstream {

template <typename T>
class FlatBuffer {
  static_assert(std::is_trivially_copyable_v<T>, "a flat buffer holds plain values");

 public:
  FlatBuffer() = default;
  FlatBuffer(FlatBuffer&& other) noexcept { swap(other); }
  FlatBuffer& operator=(FlatBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  FlatBuffer(const FlatBuffer&) = delete;
  FlatBuffer& operator=(const FlatBuffer&) = delete;
  ~FlatBuffer() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return size_; }
  size_t bytes() const { return capacity_ * sizeof(T); }

  // Appends `count` uninitialised values; returns the index of the first. A quarter of slack keeps memory tight.
  size_t extend(size_t count) {
    const size_t first = size_;
    if (size_ + count > capacity_) reserve((size_ + count) + (size_ + count) / 4 + 16);
    size_ += count;
    return first;
  }
  size_t push(const T& value) {
    const T held = value;  // `value` may lie inside this buffer
    const size_t at = extend(1);
    data_[at] = held;
    return at;
  }
  void reserve(size_t capacity) {
    const size_t bytes = (capacity * sizeof(T) + kLine) / kLine * kLine;
    T* moved = static_cast<T*>(std::aligned_alloc(kLine, bytes));
    if (!moved) throw std::bad_alloc();
    if (size_) std::memcpy(static_cast<void*>(moved), data_, size_ * sizeof(T));
    std::free(data_);
    data_ = moved;
    capacity_ = capacity;
  }
  void shrink() { reserve(size_); }

 private:
  static constexpr size_t kLine = 64;

  void swap(FlatBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

  T* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace slipstream
