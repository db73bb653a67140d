// Text of all prompts, looked up by its last tokens: what a prompt drafts from where its own text knows nothing.
//
// Invariants
// - One position-independent block that never changes once built: threads and processes read it without a lock.
// - A slot remembers one continuation of a context: the majority of those that met there, by votes (Boyer and Moore).
//   Contexts with the same tag are told apart by comparing the text, so a collision costs a look-up, never a wrong match.
// - A token of the text carries, in its upper bits, the most votes it got in any of its contexts; 0 where the majority is
//   another token. Token ids are below kGap.
#pragma once
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <vector>

#include "block.h"
#include "suffix_draft.h"

namespace slipstream {

constexpr int kRecent = 16;  // tokens a request remembers for comparing
constexpr std::array<int, 2> kOrders{4, 2};
constexpr int kTokenBits = 24;
constexpr uint32_t kGap = (1u << kTokenBits) - 1;  // kStart in the bits of a token: stands before every sequence
constexpr char kSharedMagic[9] = "SLPTXT01";

class SharedText {
 public:
  // next: where the continuation begins; 0: an empty slot, for the text begins with a gap.
  struct Slot {
    uint32_t next;
    uint16_t tag, votes;
  };
  static constexpr size_t kWays = kLine / sizeof(Slot);

  // Raises BadBlock or std::system_error.
  static std::shared_ptr<const SharedText> map(const std::string& path) {
    return std::make_shared<const SharedText>(Block::map(path, kSharedMagic));
  }

  // sizes of the header: buckets of slots, entries of the text, tokens among them (the others are gaps).
  explicit SharedText(std::shared_ptr<const char> block) : block_(std::move(block)) {
    const BlockHeader& h = Block::header(block_.get());
    num_buckets_ = h.sizes[0];
    size_ = h.sizes[1];
    slots_ = reinterpret_cast<const Slot*>(block_.get() + sizeof h);
    text_ = reinterpret_cast<const uint32_t*>(slots_ + num_buckets_ * kWays);
  }

  void write(const std::string& path) const { Block::write(block_.get(), path); }
  size_t num_tokens() const { return Block::header(block_.get()).sizes[2]; }
  size_t bytes() const { return Block::header(block_.get()).bytes; }

  // A request on its way through `begin`, `find` and `draft`, each of which fetches what the next one reads. recent: the
  // last tokens, newest last, kStart where there are none; slots: by order, first the bucket, then the slot or null.
  struct Look {
    alignas(kLine) std::array<int32_t, kRecent> recent;
    std::array<const Slot*, kOrders.size()> slots;
    std::array<uint16_t, kOrders.size()> tags;
  };
  void begin(Look& look) const {
    for (size_t i = 0; i < kOrders.size(); ++i) {
      const Place at = place(kOrders[i], look.recent.data() + kRecent);
      look.slots[i] = slots_ + at.first;
      look.tags[i] = at.tag;
      prefetch(look.slots[i]);
    }
  }
  void find(Look& look) const {
    for (size_t i = 0; i < kOrders.size(); ++i)
      if ((look.slots[i] = find_tag(look.slots[i], look.tags[i]))) prefetch(&text_[look.slots[i]->next]);
  }

  // The best of `best` and the continuations of the known contexts; whether one of these is it.
  bool draft(const Look& look, const Calibration& calibration, const DraftLimits& limits, Draft& best,
             Draft& spare) const {
    bool improved = false;
    for (size_t i = 0; i < kOrders.size() && kOrders[i] >= limits.min_match; ++i) {
      const Slot* slot = look.slots[i];
      const int matched = slot ? match_before(slot->next, look.recent) : 0;
      if (matched < kOrders[i]) continue;
      spare.begin(matched, kShared, 0);
      for (size_t at = slot->next; at < size_ && token(at) != kGap; ++at) {
        const float votes = static_cast<float>(text_[at] >> kTokenBits);
        if (!spare.add(static_cast<int32_t>(token(at)), votes / (votes + 1.0f), matched + spare.count, kShared, 0,
                       calibration, limits))
          break;
      }
      if (spare.score <= best.score) continue;
      std::swap(best, spare);
      improved = true;
    }
    return improved;
  }

 protected:
  struct Place {
    size_t first;
    uint16_t tag;
  };
  template <typename Token>
  Place place(int order, const Token* end) const {
    uint64_t hash = static_cast<uint64_t>(order);
    for (int i = -order; i < 0; ++i) {
      hash = (hash ^ (static_cast<uint32_t>(end[i]) & kGap)) * 0x9E3779B97F4A7C15ull;
      hash ^= hash >> 32;
    }
    return {(hash & (num_buckets_ - 1)) * kWays, static_cast<uint16_t>(hash >> 48)};
  }

  // The slot of a context, or null. A tag may belong to two contexts: the caller compares the text.
  template <typename Token>
  const Slot* find(int order, const Token* end) const {
    const Place at = place(order, end);
    return find_tag(slots_ + at.first, at.tag);
  }
  static const Slot* find_tag(const Slot* bucket, uint16_t tag) {
    // Without a branch for each slot: where it stands cannot be predicted. An empty slot's tag is 0, and those behind it
    // are empty too.
    const uint32_t same = which_bear(bucket, tag);
    if (!same) return nullptr;
    const Slot* slot = bucket + __builtin_ctz(same);
    return slot->next ? slot : nullptr;
  }

  // Bit k: whether slot k of a bucket bears the tag.
  static uint32_t which_bear(const Slot* bucket, uint16_t tag) {
#ifdef __SSE2__
    const __m128i wanted = _mm_set1_epi32(tag), low = _mm_set1_epi32(0xFFFF);
    const auto four = [&](const Slot* slots) {
      const auto* pairs = reinterpret_cast<const float*>(slots);
      const __m128 upper = _mm_shuffle_ps(_mm_loadu_ps(pairs), _mm_loadu_ps(pairs + 4), _MM_SHUFFLE(3, 1, 3, 1));
      return _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(_mm_and_si128(_mm_castps_si128(upper), low), wanted)));
    };
    return static_cast<uint32_t>(four(bucket) | four(bucket + 4) << 4);
#else
    uint32_t same = 0;
    for (uint32_t k = 0; k < kWays; ++k) same |= static_cast<uint32_t>(bucket[k].tag == tag) << k;
    return same;
#endif
  }

  uint32_t token(size_t at) const { return text_[at] & kGap; }

  std::shared_ptr<const char> block_;
  size_t num_buckets_, size_;
  const Slot* slots_;
  const uint32_t* text_;

 private:
  int match_before(size_t next, const std::array<int32_t, kRecent>& recent) const {
    int matched = 0;
    while (matched < kRecent && token(next - 1 - static_cast<size_t>(matched)) != kGap &&
           static_cast<int32_t>(token(next - 1 - static_cast<size_t>(matched))) == recent.data()[kRecent - 1 - matched])
      ++matched;
    return matched;
  }
};

// Fills a block that nobody else has seen yet.
class SharedTextBuilder : private SharedText {
 public:
  // Sequences oldest first. Rollouts repeat themselves: mostly a slot for every token is enough for all contexts; where
  // more than one token in kCrowded meets a full bucket, the table is doubled.
  static std::shared_ptr<const SharedText> build(const std::vector<int32_t>& tokens,
                                                 const std::vector<int64_t>& offsets) {
    size_t buckets = 1;
    while (buckets * kWays < tokens.size()) buckets *= 2;
    for (;; buckets *= 2)
      if (auto built = try_build(tokens, offsets, buckets)) return built;
  }

 private:
  static constexpr size_t kCrowded = 20;

  static std::shared_ptr<const SharedText> try_build(const std::vector<int32_t>& tokens,
                                                     const std::vector<int64_t>& offsets, size_t buckets) {
    const size_t size = tokens.size() + offsets.size() - 1;
    if (size > UINT32_MAX) throw std::length_error("the shared text holds at most 2^32 tokens");
    const size_t bytes = (sizeof(BlockHeader) + buckets * kLine + size * sizeof(uint32_t) + 7) / 8 * 8;
    const std::shared_ptr<char> block = Block::allocate(bytes);
    const uint64_t sizes[5] = {buckets, size, tokens.size(), 0, 0};
    std::memcpy(block.get() + offsetof(BlockHeader, sizes), sizes, sizeof sizes);
    std::memset(block.get() + sizeof(BlockHeader), 0, buckets * kLine);
    SharedTextBuilder builder(block, tokens, offsets);
    if (builder.num_crowded_ > tokens.size() / kCrowded) return nullptr;
    builder.prefer_long_agreement();
    builder.mark_votes();
    Block::seal(block.get(), kSharedMagic, bytes);
    return std::make_shared<const SharedText>(block);
  }

  SharedTextBuilder(const std::shared_ptr<char>& block, const std::vector<int32_t>& tokens,
                    const std::vector<int64_t>& offsets)
      : SharedText(block), slots_out_(const_cast<Slot*>(slots_)), text_out_(const_cast<uint32_t*>(text_)) {
    size_t at = 0;
    for (size_t i = 0; i + 1 < offsets.size(); ++i) {
      text_out_[at++] = kGap;
      for (int64_t j = offsets[i]; j < offsets[i + 1]; ++j) text_out_[at++] = static_cast<uint32_t>(tokens[j]);
    }
    each_place([&](int order, size_t place) { vote(order, place); });
  }

  // Every token with `order` tokens of its sequence before it.
  template <typename Visit>
  void each_place(Visit visit) const {
    for (const int order : kOrders) {
      size_t since_gap = 0;
      for (size_t at = 0; at < size_; ++at) {
        since_gap = token(at) == kGap ? 0 : since_gap + 1;
        if (since_gap > static_cast<size_t>(order)) visit(order, at);
      }
    }
  }

  void vote(int order, size_t at) {
    const Place to = place(order, text_ + at);
    Slot* weakest = slots_out_ + to.first;
    for (Slot* slot = weakest; slot < slots_out_ + to.first + kWays; ++slot) {
      if (!slot->next) {
        *slot = {static_cast<uint32_t>(at), to.tag, 0};
        return;
      }
      if (slot->tag == to.tag) {
        if (text_[slot->next] == text_[at]) slot->votes += slot->votes < UINT16_MAX;
        else if (slot->votes > 0) --slot->votes;
        else slot->next = static_cast<uint32_t>(at);
        return;
      }
      if (slot->votes < weakest->votes) weakest = slot;
    }
    ++num_crowded_;
    if (weakest->votes > 0) --weakest->votes;
    else *weakest = {static_cast<uint32_t>(at), to.tag, 0};
  }

  // Of the places a slot may point to, the one whose text agrees with the majority for longest (the newest of equals): an
  // odd token there would end every draft.
  void prefer_long_agreement() {
    std::vector<uint8_t> agrees(size_ + 1, 0);
    for (size_t at = size_; at-- > 0;) {
      if (token(at) == kGap || at < static_cast<size_t>(kOrders.back())) continue;
      const Slot* slot = find(kOrders.back(), text_ + at);
      if (slot && text_[slot->next] == text_[at]) agrees[at] = static_cast<uint8_t>(std::min(255, agrees[at + 1] + 1));
    }
    each_place([&](int order, size_t at) {
      Slot* slot = const_cast<Slot*>(find(order, text_ + at));
      if (slot && text_[at] == text_[slot->next] && agrees[at] >= agrees[slot->next]) slot->next = static_cast<uint32_t>(at);
    });
  }

  void mark_votes() {
    std::vector<uint8_t> votes(size_, 0);
    each_place([&](int order, size_t at) {
      const Slot* slot = find(order, text_ + at);
      if (slot && text_[slot->next] == text_[at])
        votes[at] = std::max(votes[at], static_cast<uint8_t>(std::min(255, slot->votes + 1)));
    });
    for (size_t at = 0; at < size_; ++at) text_out_[at] |= static_cast<uint32_t>(votes[at]) << kTokenBits;
  }

  Slot* slots_out_;
  uint32_t* text_out_;
  size_t num_crowded_ = 0;
};

}  // namespace slipstream
