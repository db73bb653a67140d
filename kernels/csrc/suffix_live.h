// The live tier: the sequences of this step as plain text, open for appending in any order. Plain twin:
// kernels/live_text.py.
//
// Invariants
// - Text never moves. A sequence is a chain of pages; a place is the number of a token's word in the arena. Place 0 is none.
// - By pair (a token and the one before it) and by token the latest place is known, and from every place the one before it
//   of the same pair and token, or of others with the same hash: where a context stands is found latest first. kStart
//   pairs with nothing.
// - Sequence kPromptSequence is the prompt's own text: it is there from the beginning and does not begin with kStart.
// - Not safe to read while another thread appends.
#pragma once
#include <cstddef>
#include <cstring>
#include <vector>

#include "suffix_automaton.h"

namespace slipstream {

constexpr int32_t kPromptSequence = 0;
constexpr int kMaxPlaces = 8;  // earlier places that are looked at
constexpr int kMaxMatch = 32;  // tokens that are compared: calibration does not tell longer matches apart

// Places of one context. next: where each goes on; length: tokens before it that match.
struct Places {
  std::array<uint32_t, kMaxPlaces> next;
  std::array<int32_t, kMaxPlaces> length;
  int count = 0;

  // The longest match below `bound`; 0 where there is none.
  int longest_below(int bound) const {
    int longest = 0;
    for (int i = 0; i < count; ++i)
      if (length[i] < bound) longest = std::max(longest, length[i]);
    return longest;
  }
};

// A sequence is its cursor, the place of its last token, which the caller keeps.
class Live {
  static constexpr uint32_t kWords = sizeof(LivePage) / 4, kFirst = offsetof(LivePage, token) / 4,
                            kEnd = kFirst + LivePage::kTokens;
  using Earlier = LivePage::Earlier;

 public:
  Live(std::shared_ptr<IndexMemory> memory, const int32_t* prompt, size_t length)
      : memory_(std::move(memory)),
        pages_(memory_->pages),
        words_(reinterpret_cast<uint32_t*>(pages_.at(0))),
        pairs_(memory_->pages, size_t{1} << kFirstLog2),
        singles_(memory_->pages, size_t{1} << kSinglesLog2) {
    if (!length) return;
    uint32_t cursor = first_place(kPromptSequence);
    put(cursor, kNoToken, prompt[0]).link();
    num_tokens_ = 1;
    for (size_t i = 1; i < length; ++i) append(cursor, prompt[i]);
  }

  // Opens a sequence; returns its number and sets its cursor.
  int32_t open(uint32_t& cursor) {
    cursor = first_place(num_sequences_);
    put(cursor, kNoToken, kStart).link();
    return num_sequences_++;
  }

  // A place whose text is there and that nothing leads to yet.
  struct Unlinked {
    Earlier* earlier;
    uint32_t *of_pair, *of_single;
    uint32_t at;
    void link() const {
      *earlier = {*of_pair, *of_single};
      *of_pair = *of_single = at;
    }
  };

  void append(uint32_t& cursor, int32_t token) {
    if (is_full()) widen();
    write(cursor, this->token(cursor), token).link();
  }
  // The first half of `append`, behind the token `before`: what the other half touches is being fetched. Where the tier
  // is full it is widened first, and before that all of it is linked.
  Unlinked write(uint32_t& cursor, int32_t before, int32_t token) {
    if (++cursor % kWords == kEnd) cursor = add_page(cursor / kWords);
    ++num_tokens_;
    return put(cursor, before, token);
  }
  bool is_full() const { return num_tokens_ == pairs_.size(); }

  // Doubles the table of pairs: every chain of places falls into two, latest first as before.
  void widen() {
    ArenaTable<uint32_t> wider(memory_->pages, 2 * pairs_.size());
    ++log2_;
    for (size_t i = 0; i < pairs_.size(); ++i) {
      std::array<uint32_t*, 2> last{&wider[2 * i], &wider[2 * i + 1]};
      for (uint32_t at = pairs_[i]; at;) {
        const uint32_t next = earlier(at).pair;
        uint32_t*& end = last[pair_of(at) & 1];
        *end = at;
        end = &earlier(at).pair;
        at = next;
      }
      *last[0] = *last[1] = 0;
    }
    pairs_.swap(wider);
  }

  int32_t token(uint32_t at) const { return static_cast<int32_t>(words_[at]); }
  // The places that `find` looks at, latest first and `at` itself among them; 0 is the end.
  uint32_t latest_pair(uint32_t at) const { return pairs_[pair_of(at)]; }
  uint32_t latest_single(uint32_t at) const { return singles_[single(token(at))]; }
  uint32_t earlier_pair(uint32_t at) const { return earlier(at).pair; }
  uint32_t earlier_single(uint32_t at) const { return earlier(at).single; }
  // False where the last token of a sequence stands nowhere else.
  bool may_be_known(uint32_t at) const { return latest_single(at) != at || earlier_single(at); }
  void prefetch_latest(uint32_t at) const {
    prefetch(&pairs_[pair_of(at)]);
    prefetch(&singles_[single(token(at))]);
  }
  int32_t sequence(uint32_t at) const { return page(at).sequence; }
  // What the last tokens of a sequence are read from, and where the next few go. May reach into the next page.
  void prefetch_end(uint32_t at) const {
    constexpr int kBack = 15;
    prefetch(words_ + at - kBack);
    prefetch_next(at);
  }
  // Where the next few go.
  void prefetch_next(uint32_t at) const {
    constexpr int kAhead = 7;
    prefetch(words_ + at);
    prefetch(words_ + at + kAhead);
    prefetch(&earlier(at));
    prefetch(&earlier(at) + kAhead);
  }
  void prefetch_earlier(uint32_t at) const {
    prefetch(words_ + at);
    prefetch(&earlier(at));
  }

  // The place after `at` in its sequence, 0 at its end.
  uint32_t after(uint32_t at) const {
    const uint32_t next = at + 1;
    if (next % kWords == kEnd) return page(at).next ? page(at).next * kWords + kFirst : 0;
    return token(next) == kNoToken ? 0 : next;
  }

  // The tokens up to `at`, kStart where the sequence has not begun.
  template <size_t kCount>
  void copy_last(uint32_t at, std::array<int32_t, kCount>& out) const {
    if (at % kWords >= kFirst + kCount - 1) {
      std::memcpy(out.data(), words_ + at - (kCount - 1), sizeof out);
      return;
    }
    for (size_t i = kCount; i-- > 0; at = at ? before(at) : 0) out[i] = at ? token(at) : kStart;
  }

  // Where the text that ends at `at` stood before and goes on, matches of at least min_match tokens; those of one token
  // only where there is no longer one.
  void find(uint32_t at, int min_match, Places& out) const {
    out.count = 0;
    const int least = token(at) == kStart ? 1 : std::max(min_match, 2);
    collect<&Earlier::pair>(latest_pair(at), at, least, out);
    if (!out.count && min_match <= 1) collect<&Earlier::single>(latest_single(at), at, 1, out);
  }

  // Calls visit(token) for everything that followed a context, by reading all of the text: for inspection.
  template <typename Visit>
  void each_follower(const std::vector<int32_t>& context, Visit visit) const {
    pages_.each_range([&](size_t first, size_t last) {
      for (size_t number = first; number < last; ++number)
        for (uint32_t at = static_cast<uint32_t>(number) * kWords + kFirst; at % kWords != kEnd; ++at) {
          if (token(at) == kNoToken) break;
          if (ends_with(before(at), context)) visit(token(at));
        }
    });
  }

  size_t num_tokens() const { return num_tokens_; }
  size_t bytes() const { return pages_.bytes() + (pairs_.size() + singles_.size()) * sizeof(uint32_t); }

 private:
  LivePage& page(uint32_t at) const { return pages_[at / kWords]; }
  // Two words for each token of a page, behind its tokens.
  Earlier& earlier(uint32_t at) const {
    return reinterpret_cast<Earlier&>(words_[at + (at % kWords - kFirst) + LivePage::kTokens]);
  }

  uint32_t before(uint32_t at) const {
    if (at % kWords > kFirst) return at - 1;
    return page(at).previous ? page(at).previous * kWords + kEnd - 1 : 0;
  }

  template <uint32_t Earlier::*kChain>
  void collect(uint32_t place, uint32_t at, int least, Places& out) const {
    const int32_t token = this->token(at);
    for (int hops = 0; place && hops < kMaxPlaces; hops += place != at, place = earlier(place).*kChain) {
      if (this->token(place) != token || place == at) continue;  // others have the same hash
      const int length = match(place, at);
      if (length < least) continue;
      const uint32_t next = after(place);
      if (!next) continue;
      out.next[out.count] = next;
      out.length[out.count++] = length;
    }
  }

  // The number of equal tokens up to two places, which are not none. Mostly they lie on one page each.
  int match(uint32_t a, uint32_t b) const {
    for (int length = 0;;) {
      const auto run = static_cast<int>(std::min({a % kWords - kFirst, b % kWords - kFirst, kMaxMatch - length - 1u}));
      const uint32_t *x = words_ + a, *y = words_ + b;
      for (int i = 0; i <= run; ++i)
        if (x[-i] != y[-i]) return length + i;
      length += run + 1;
      if (length == kMaxMatch) return length;
      a = before(a - static_cast<uint32_t>(run));
      b = before(b - static_cast<uint32_t>(run));
      if (!a || !b) return length;
    }
  }

  bool ends_with(uint32_t at, const std::vector<int32_t>& context) const {
    for (size_t i = context.size(); i-- > 0; at = before(at))
      if (!at || token(at) != context[i]) return false;
    return true;
  }

  uint32_t pair(int32_t before, int32_t token) const {
    const uint32_t mixed = static_cast<uint32_t>(before) * 0x9E3779B1u + static_cast<uint32_t>(token);
    return mixed * 0x85EBCA6Bu >> (32 - log2_);
  }
  uint32_t pair_of(uint32_t at) const {
    const uint32_t previous = before(at);
    return pair(previous ? token(previous) : kNoToken, token(at));
  }
  static uint32_t single(int32_t token) { return static_cast<uint32_t>(token) * 0x9E3779B1u >> (32 - kSinglesLog2); }

  Unlinked put(uint32_t at, int32_t before, int32_t token) {
    words_[at] = static_cast<uint32_t>(token);
    const Unlinked out{&earlier(at), &pairs_[pair(before, token)], &singles_[single(token)], at};
    prefetch(out.of_pair);
    prefetch(out.of_single);
    return out;
  }

  uint32_t first_place(int32_t sequence) {
    const auto number = static_cast<uint32_t>(pages_.extend(1));
    LivePage& fresh = pages_[number];
    fresh.sequence = sequence;
    fresh.next = fresh.previous = 0;
    std::fill(fresh.token, fresh.token + LivePage::kTokens, kNoToken);
    return number * kWords + kFirst;
  }
  uint32_t add_page(uint32_t previous) {
    const uint32_t at = first_place(pages_[previous].sequence);
    pages_[previous].next = at / kWords;
    page(at).previous = previous;
    return at;
  }

  static constexpr uint32_t kFirstLog2 = 13, kSinglesLog2 = 13;  // a chunk of the arena each

  std::shared_ptr<IndexMemory> memory_;
  ArenaArray<LivePage> pages_;
  uint32_t* words_;  // of the arena
  ArenaTable<uint32_t> pairs_, singles_;  // the latest places, by hash
  uint32_t log2_ = kFirstLog2;
  int32_t num_sequences_ = 1;
  size_t num_tokens_ = 0;
};

}  // namespace slipstream
