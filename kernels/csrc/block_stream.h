// One process copies blocks into shared memory, or sums up what lies there, and others read them behind it. Twin: kernels/block_stream.py.
// Invariants: a block's stamp is stored after its bytes and its sum are, and read before they are; nobody reads a block
// whose stamp is another one; waiting sleeps, so that the writer has the core.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>

#include "checksum.h"

namespace slipstream {

constexpr int64_t kPollMicroseconds = 100;

// The blocks of one tensor: their bytes, and what the writer says about each.
struct BlockRange {
  int64_t size, block_bytes;
  int64_t count() const { return (size + block_bytes - 1) / block_bytes; }
  int64_t begin(int64_t block) const { return block * block_bytes; }
  int64_t length(int64_t block) const { return std::min(block_bytes, size - begin(block)); }
};

// to null: the bytes are where they belong, and only the sums are missing.
inline void copy_blocks(Isa isa, const BlockRange& range, const uint8_t* from, uint8_t* to, uint64_t* sums,
                        uint32_t* stamps, uint32_t stamp) {
  for (int64_t block = 0; block < range.count(); ++block) {
    const int64_t at = range.begin(block), length = range.length(block);
    sums[block] = to ? copy_block(isa, from + at, to + at, length) : block_checksum(isa, from + at, length);
    __atomic_store_n(stamps + block, stamp, __ATOMIC_RELEASE);
  }
}

// Which blocks are looked at: of every `of` stripes of `stripe` blocks the nth, counted from the first of all tensors.
struct Stripes {
  int64_t first, stripe, nth, of;
  bool hold(int64_t block) const { return (first + block) / stripe % of == nth; }
};

// Reads blocks from `block` on until the end, the first that differs, or `wait_us` without the next one. Returns the
// block it came to; wrong: whether that one differs.
inline int64_t follow_blocks(Isa isa, const BlockRange& range, const Stripes& stripes, const uint8_t* data,
                             const uint64_t* sums, const uint32_t* stamps, uint32_t stamp, bool verify, int64_t block,
                             int64_t wait_us, bool& wrong) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(wait_us);
  wrong = false;
  for (; block < range.count(); ++block) {
    if (!stripes.hold(block)) continue;
    while (__atomic_load_n(stamps + block, __ATOMIC_ACQUIRE) != stamp) {
      if (std::chrono::steady_clock::now() >= until) return block;
      std::this_thread::sleep_for(std::chrono::microseconds(kPollMicroseconds));
    }
    if (verify && block_checksum(isa, data + range.begin(block), range.length(block)) != sums[block]) {
      wrong = true;
      return block;
    }
  }
  return block;
}

}  // namespace slipstream
