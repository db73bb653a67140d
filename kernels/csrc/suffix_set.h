// The drafter's index of many prompts: one call per engine step for the whole batch, rebuilt in the background.
//
// Invariants
// - A call checks all its arguments before it changes anything: after an error the set is as it was.
// - A request keeps the frozen tier it began with. Rebuilding swaps a pointer, so propose and extend never wait for it
//   and never see a half-built tier; begin waits for the pending rebuild of its own prompt, so that drafts do not
//   depend on timing.
// - publish ends the live tier of a prompt: what was sampled is in the records that the next frozen tier is built
//   from. Requests still open keep the old one among themselves.
#pragma once
#include <numeric>
#include <string>
#include <unordered_map>

#include "suffix_builder.h"

namespace slipstream {

// Twin: SOURCE_NAMES in drafter/base.py.
enum Source : int8_t { kSourceNone = 0, kSelf = 1, kSibling = 2, kHistory = 3, kPrompt = 4 };

struct UnknownUid : std::out_of_range {
  using std::out_of_range::out_of_range;
};
struct ClosedIndex : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct SetOptions {
  int min_match = 2, max_candidates = 2;
  float escape = 0.5f;
};

// How far ahead of a batch's walks memory is fetched, and for how many rows at a time.
constexpr int kWarmDraft = 8, kWarmLinks = 5;
constexpr int64_t kBlockRows = 64;

// Buffers of one propose call, rows in batch order. tokens and probs are [rows, width].
struct DraftRows {
  int64_t rows, width;
  const int32_t* max_draft;
  const float* min_prob;
  int32_t* tokens;
  int32_t* count;
  int8_t* source;
  int32_t* match_len;
  float* probs;
};

struct SetStats {
  size_t prompts = 0, open_requests = 0, frozen_tokens = 0, frozen_bytes = 0, live_tokens = 0, live_bytes = 0;
};

class SuffixIndexSet {
 public:
  explicit SuffixIndexSet(const SetOptions& options) : options_(options) {
    if (options.min_match < 1 || options.max_candidates < 1 || !(options.escape >= 0.0f))
      throw std::invalid_argument("min_match and max_candidates must be at least 1 and escape at least 0");
  }

  void begin(int64_t uid, const std::string& prompt_id) {
    std::unique_lock<std::mutex> lock(mutex_);
    require_closed_uid(uid);
    const std::shared_ptr<PromptEntry> held = entry(prompt_id);
    lock.unlock();  // other threads go on drafting meanwhile
    builder_.wait(held.get());
    lock.lock();
    require_closed_uid(uid);
    if (!held->live) held->live = std::make_shared<Live>();
    Request request{held->live, std::atomic_load(&held->frozen), 0, 0, kRoot, 0, 0};
    request.sequence = held->live->open(request.cursor);
    request.at = std::max(request.frozen->find(kRoot, kStart), kRoot);
    request.matched = request.at == kRoot ? 0 : 1;
    slots_[uid] = requests_.size();
    requests_.push_back(std::move(request));
    uids_.push_back(uid);
  }

  void end(int64_t uid) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t slot = slot_of(uid);
    slots_[uids_.back()] = slot;
    std::swap(requests_[slot], requests_.back());
    std::swap(uids_[slot], uids_.back());
    requests_.pop_back();
    uids_.pop_back();
    slots_.erase(uid);
  }

  void propose(const int64_t* uids, const DraftRows& out) {
    std::lock_guard<std::mutex> lock(mutex_);
    find_slots(uids, out.rows);
    scratch_tokens_.resize(static_cast<size_t>(out.width) * 2);
    scratch_probs_.resize(static_cast<size_t>(out.width) * 2);
    each_block(out.rows, [&] {
      warm_frozen();
      warm_live();
      for (int64_t row = first_; row < end_; ++row) propose_row(requests_[found_[row]], out, row);
    });
  }

  void extend(const int64_t* uids, int64_t rows, const int32_t* values, const int64_t* offsets, int64_t num_values) {
    std::lock_guard<std::mutex> lock(mutex_);
    find_slots(uids, rows);
    check_ragged(rows, values, offsets, num_values);
    each_block(rows, [&] {
      advance_frozen(values, offsets);
      append_live(values, offsets);
    });
  }

  // Queues the rebuild of a prompt's frozen tier and ends its live tier.
  void publish(const std::string& prompt_id, Corpus corpus) {
    std::lock_guard<std::mutex> lock(mutex_);
    require_open();
    check_ragged(static_cast<int64_t>(corpus.weights.size()), corpus.tokens.data(), corpus.offsets.data(),
                 static_cast<int64_t>(corpus.tokens.size()));
    if (corpus.num_plain > corpus.weights.size()) throw std::invalid_argument("more prompts than sequences");
    for (const float weight : corpus.weights)
      if (!(weight > 0.0f)) throw std::invalid_argument("weights must be above 0");
    const std::shared_ptr<PromptEntry> held = entry(prompt_id);
    held->live.reset();
    builder_.submit(held, std::move(corpus));
  }

  // Forgets a prompt; requests that are open keep what they hold.
  void drop(const std::string& prompt_id) {
    std::lock_guard<std::mutex> lock(mutex_);
    prompts_.erase(prompt_id);
  }

  void wait() { builder_.wait(nullptr); }

  void close() {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    builder_.stop();
  }

  // (token, weight) of all that followed `context`, in the frozen tier or in the live one.
  std::vector<std::pair<int32_t, float>> follow_weights(const std::string& prompt_id,
                                                        const std::vector<int32_t>& context, bool live) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::pair<int32_t, float>> out;
    const auto held = prompts_.find(prompt_id);
    if (held == prompts_.end()) return out;
    if (!live) collect(*std::atomic_load(&held->second->frozen), context, out);
    else if (held->second->live) collect(*held->second->live, context, out);
    return out;
  }

  SetStats stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    SetStats out;
    out.prompts = prompts_.size();
    out.open_requests = requests_.size();
    for (const auto& [name, prompt] : prompts_) {
      const auto frozen = std::atomic_load(&prompt->frozen);
      out.frozen_tokens += frozen->num_tokens();
      out.frozen_bytes += frozen->bytes();
      if (!prompt->live) continue;
      out.live_tokens += prompt->live->num_tokens();
      out.live_bytes += prompt->live->bytes();
    }
    return out;
  }

 private:
  // cursor: what the request's own text has reached in the live tier; at, matched: its longest match in the frozen one.
  struct Request {
    std::shared_ptr<Live> live;
    std::shared_ptr<const Frozen> frozen;
    int32_t sequence, cursor, at, matched;
    uint64_t last_call;
  };

  void require_open() const {
    if (closed_) throw ClosedIndex("the suffix index is closed");
  }

  void require_closed_uid(int64_t uid) const {
    require_open();
    if (slots_.count(uid)) throw std::invalid_argument("uid " + std::to_string(uid) + " is open already");
  }

  std::shared_ptr<PromptEntry> entry(const std::string& prompt_id) {
    std::shared_ptr<PromptEntry>& held = prompts_[prompt_id];
    if (!held) held = std::make_shared<PromptEntry>();
    return held;
  }

  size_t slot_of(int64_t uid) const {
    require_open();
    const auto found = slots_.find(uid);
    if (found == slots_.end()) throw UnknownUid("uid " + std::to_string(uid) + " is not open");
    return found->second;
  }

  void find_slots(const int64_t* uids, int64_t rows) {
    require_open();
    ++num_calls_;
    found_.resize(static_cast<size_t>(rows), 0);
    warm_.resize(static_cast<size_t>(rows));
    for (int64_t row = 0; row < rows; ++row) {
      // From one engine step to the next most rows stay where they are.
      const size_t guess = found_[row];
      if (guess >= uids_.size() || uids_[guess] != uids[row]) found_[row] = slot_of(uids[row]);
      Request& request = requests_[found_[row]];
      if (request.last_call == num_calls_)
        throw std::invalid_argument("uid " + std::to_string(uids[row]) + " is in the batch twice");
      request.last_call = num_calls_;
    }
  }

  static void check_ragged(int64_t rows, const int32_t* values, const int64_t* offsets, int64_t num_values) {
    if (offsets[0] != 0 || offsets[rows] != num_values)
      throw std::invalid_argument("offsets must run from 0 to the number of tokens");
    for (int64_t row = 0; row < rows; ++row)
      if (offsets[row] > offsets[row + 1]) throw std::invalid_argument("offsets must not decrease");
    for (int64_t i = 0; i < num_values; ++i)
      if (values[i] < 0)
        throw std::invalid_argument("token " + std::to_string(values[i]) + " is negative; allowed: 0 or more");
  }

  // Few enough rows for what is fetched ahead to be in the cache still when it is used.
  template <typename Work>
  void each_block(int64_t rows, Work work) {
    for (first_ = 0; first_ < rows; first_ = end_) {
      end_ = std::min(rows, first_ + kBlockRows);
      work();
    }
  }

  // The tiers of many requests do not fit into the caches together, and each walk is a chain of loads. These passes
  // take every request's chain one link further at a time, so that the loads of different requests overlap.
  void warm_frozen() {
    for (int64_t row = first_; row < end_; ++row) {
      const Request& request = requests_[found_[row]];
      warm_[row] = request.at;
      prefetch(&request.frozen->state(request.at));
    }
    follow_frozen();
    for (int64_t row = first_; row < end_; ++row) {
      const Request& request = requests_[found_[row]];
      warm_[row] = std::max(request.frozen->state(request.at).link, kRoot);
      prefetch(&request.frozen->state(warm_[row]));
    }
    follow_frozen();
  }

  void follow_frozen() {
    for (int i = 0; i < kWarmDraft; ++i)
      for (int64_t row = first_; row < end_; ++row) {
        const Frozen& frozen = *requests_[found_[row]].frozen;
        const State& s = frozen.state(warm_[row]);
        if (s.token != kNoToken) warm_[row] = s.target;
        prefetch(&frozen.state(warm_[row]));
      }
  }

  // Takes turns between the walks of all rows until each has passed its tokens.
  void advance_frozen(const int32_t* values, const int64_t* offsets) {
    walks_.resize(found_.size());
    active_.clear();
    for (int64_t row = first_; row < end_; ++row) {
      const Request& request = requests_[found_[row]];
      walks_[row] = {values + offsets[row], values + offsets[row + 1], request.at, request.matched, false};
      prefetch(&request.frozen->state(request.at));
      if (!walks_[row].done()) active_.push_back(row);
    }
    while (!active_.empty()) {
      size_t kept = 0;
      for (const int64_t row : active_) {
        requests_[found_[row]].frozen->advance(walks_[row]);
        active_[kept] = row;
        kept += !walks_[row].done();
      }
      active_.resize(kept);
    }
    for (int64_t row = first_; row < end_; ++row) {
      requests_[found_[row]].at = walks_[row].at;
      requests_[found_[row]].matched = walks_[row].matched;
    }
  }

  // Appends the first token of every row, then the second, and so on; chains are counted in turns as well.
  void append_live(const int32_t* values, const int64_t* offsets) {
    warm_live();
    warm_roots(values, offsets);
    active_.resize(static_cast<size_t>(end_ - first_));
    std::iota(active_.begin(), active_.end(), first_);
    for (int64_t column = 0; !active_.empty(); ++column) {
      size_t kept = 0;
      for (const int64_t row : active_) {
        if (offsets[row] + column == offsets[row + 1]) continue;
        Request& request = requests_[found_[row]];
        request.live->step(request.cursor, values[offsets[row] + column]);
        warm_[row] = request.cursor;
        active_[kept++] = row;
      }
      active_.resize(kept);
      count_chains();
    }
  }

  // A token in a new context is looked up at the root, whose table is the largest of all.
  void warm_roots(const int32_t* values, const int64_t* offsets) {
    for (int64_t row = first_; row < end_; ++row) {
      const Live& live = *requests_[found_[row]].live;
      for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) live.prefetch_search(kRoot, values[i]);
    }
    for (int64_t row = first_; row < end_; ++row) {
      const Live& live = *requests_[found_[row]].live;
      for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) {
        const int32_t target = live.find(kRoot, values[i]);
        if (target >= 0) prefetch(&live.state(target));
      }
    }
  }

  void count_chains() {
    counting_.assign(active_.begin(), active_.end());
    for (int i = 0; i < kMaxChain && !counting_.empty(); ++i) {
      size_t kept = 0;
      for (const int64_t row : counting_) {
        const Request& request = requests_[found_[row]];
        warm_[row] = request.live->count(warm_[row], request.sequence);
        counting_[kept] = row;
        kept += warm_[row] != kRoot;
      }
      counting_.resize(kept);
    }
  }

  void warm_live() {
    for (int64_t row = first_; row < end_; ++row) {
      const Request& request = requests_[found_[row]];
      warm_[row] = request.cursor;
      prefetch(&request.live->state(request.cursor));
    }
    for (int i = 0; i < kWarmLinks; ++i)
      for (int64_t row = first_; row < end_; ++row) {
        if (warm_[row] < 0) continue;
        const Live& live = *requests_[found_[row]].live;
        live.prefetch_edges(warm_[row]);
        warm_[row] = live.state(warm_[row]).link;
        if (warm_[row] >= 0) prefetch(&live.state(warm_[row]));
      }
  }

  void propose_row(const Request& request, const DraftRows& out, int64_t row) {
    out.count[row] = out.match_len[row] = 0;
    out.source[row] = kSourceNone;
    const int limit = static_cast<int>(std::min<int64_t>(out.max_draft[row], out.width));
    if (limit <= 0) return;
    const int32_t length = request.live->state(request.cursor).length;
    // kStart counts as context: a response that has matched from its first token on needs no minimum.
    const DraftLimits limits{limit, std::min<int>(options_.min_match, length), options_.min_match, out.min_prob[row],
                             options_.escape};
    Draft best{scratch_tokens_.data(), scratch_probs_.data()};
    Draft spare{scratch_tokens_.data() + out.width, scratch_probs_.data() + out.width};
    draft_from(*request.live, request.cursor, length, request.cursor, options_.max_candidates, limits, best, spare);
    const float live_score = best.score;
    const int32_t live_mark = best.mark;
    draft_from(*request.frozen, request.at, request.matched, kRoot, options_.max_candidates, limits, best, spare);
    if (best.count == 0) return;
    if (best.score > live_score)
      out.source[row] = request.frozen->is_prompt(best.mark) ? kPrompt : kHistory;
    else
      out.source[row] = live_mark == request.sequence ? kSelf : kSibling;
    out.count[row] = best.count;
    out.match_len[row] = best.match_len;
    std::copy(best.tokens, best.tokens + best.count, out.tokens + row * out.width);
    std::copy(best.probs, best.probs + best.count, out.probs + row * out.width);
  }

  template <typename Tier>
  static void collect(const Tier& tier, const std::vector<int32_t>& context,
                      std::vector<std::pair<int32_t, float>>& out) {
    int32_t at = kRoot;
    for (const int32_t token : context)
      if ((at = tier.find(at, token)) < 0) return;
    tier.each_edge(at, [&](int32_t token, int32_t target) { out.push_back({token, tier.state(target).weight}); });
  }

  const SetOptions options_;
  std::mutex mutex_;
  bool closed_ = false;
  std::unordered_map<std::string, std::shared_ptr<PromptEntry>> prompts_;
  std::unordered_map<int64_t, size_t> slots_;
  std::vector<Request> requests_;
  std::vector<int64_t> uids_;
  uint64_t num_calls_ = 0;
  std::vector<size_t> found_;
  std::vector<int32_t> warm_;
  std::vector<Frozen::Walk> walks_;
  std::vector<int64_t> active_, counting_;
  int64_t first_ = 0, end_ = 0;  // the rows of the block in work
  std::vector<int32_t> scratch_tokens_;
  std::vector<float> scratch_probs_;
  Builder builder_;
};

}  // namespace slipstream
