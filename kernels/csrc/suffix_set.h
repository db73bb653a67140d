// The drafter's index of many prompts: one call per engine step for the whole batch, rebuilt in the background.
//
// Invariants
// - A call checks all its arguments before it changes anything: after an error the set is as it was.
// - A request keeps the tiers it began with. Rebuilding swaps a pointer, so propose and extend never wait for it and never
//   see a half-built tier; begin waits for the pending rebuild of its own prompt, so that what a prompt's own text says
//   does not depend on timing. The shared text may come a step later.
// - publish and attach end the live tier of a prompt: what was sampled is in the records that the next frozen tier is
//   built from. Requests still open keep the old one among themselves.
#pragma once
#include <atomic>
#include <optional>
#include <unordered_map>

#include "step_threads.h"
#include "suffix_builder.h"
#include "suffix_step.h"

namespace slipstream {

struct UnknownUid : std::out_of_range {
  using std::out_of_range::out_of_range;
};
struct ClosedIndex : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct SetStats {
  size_t prompts = 0, open_requests = 0, frozen_tokens = 0, frozen_bytes = 0, live_tokens = 0, live_bytes = 0,
         shared_tokens = 0, shared_bytes = 0, files_failed = 0;
};

class SuffixIndexSet {
 public:
  SuffixIndexSet(const SetOptions& options, size_t num_threads, int64_t threads_from)
      : options_(options), threads_from_(threads_from), num_threads_(num_threads), workers_(1) {
    if (options.min_match < 1 || options.max_candidates < 1 || !(options.escape >= 0.0f) || num_threads < 1)
      throw std::invalid_argument("min_match, max_candidates and threads must be at least 1 and escape at least 0");
  }
  ~SuffixIndexSet() { builder_.stop(); }

  // prompt: the text that opens the prompt's live tier, where it has none yet.
  void begin(int64_t uid, const std::string& prompt_id, const int32_t* prompt, size_t length) {
    std::unique_lock<std::mutex> lock(mutex_);
    check_tokens(prompt, static_cast<int64_t>(length));
    require_closed_uid(uid);
    const std::shared_ptr<Prompt> held = entry(prompt_id);
    lock.unlock();  // other threads go on drafting meanwhile
    builder_.wait(&held->pending);
    lock.lock();
    require_closed_uid(uid);
    if (!held->live) held->live = std::make_shared<Live>(memory_, prompt, length);
    const Tiers tiers{held->live, std::atomic_load(&held->frozen), std::atomic_load(&shared_)};
    OpenRequest request;
    request.live = tiers.live.get();
    request.frozen = tiers.frozen.get();
    request.shared = tiers.shared.get();
    request.sequence = request.live->open(request.cursor);
    request.at = std::max(request.frozen->find(kFrozenRoot, kStart), kFrozenRoot);
    request.matched = request.at != kFrozenRoot;
    slots_[uid] = requests_.size();
    requests_.push_back(request);
    tiers_.push_back(tiers);
    uids_.push_back(uid);
    is_sorted_ = false;
  }

  void end(int64_t uid) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t slot = slot_of(uid);
    slots_[uids_.back()] = slot;
    requests_[slot] = requests_.back();
    std::swap(tiers_[slot], tiers_.back());
    std::swap(uids_[slot], uids_.back());
    requests_.pop_back();
    tiers_.pop_back();
    uids_.pop_back();
    slots_.erase(uid);
    is_sorted_ = false;
  }

  void propose(const int64_t* uids, const DraftRows& out) {
    std::lock_guard<std::mutex> lock(mutex_);
    find_requests(uids, out.rows);
    in_parts(out.rows, [&](StepWorker& worker, size_t first, size_t last) {
      worker.propose(batch_, first, last, out, options_, calibration_);
    });
  }

  void extend(const int64_t* uids, int64_t rows, const int32_t* values, const int64_t* offsets, int64_t num_values) {
    std::lock_guard<std::mutex> lock(mutex_);
    find_requests(uids, rows);
    check_ragged(rows, values, offsets, num_values);
    in_parts(rows, [&](StepWorker& worker, size_t first, size_t last) {
      worker.extend(batch_, first, last, values, offsets);
    });
  }

  // Queues the rebuild of a prompt's frozen tier and ends its live tier. The tier is written to `path` too, if there is
  // one: other processes attach it.
  void publish(const std::string& prompt_id, Corpus corpus, const std::string& path) {
    std::lock_guard<std::mutex> lock(mutex_);
    require_open();
    check_ragged(static_cast<int64_t>(corpus.weights.size()), corpus.tokens.data(), corpus.offsets.data(),
                 static_cast<int64_t>(corpus.tokens.size()));
    for (const float weight : corpus.weights)
      if (!(weight > 0.0f)) throw std::invalid_argument("weights must be above 0");
    const std::shared_ptr<Prompt> held = entry(prompt_id);
    held->live.reset();
    const uint64_t version = ++held->version;
    builder_.submit(&held->pending, [this, held, version, path, corpus = std::move(corpus)] {
      if (held->version != version) return;  // a newer one is queued already
      const std::shared_ptr<const Frozen> built = FrozenBuilder::build(corpus, memory_);
      std::atomic_store(&held->frozen, built);
      write_for_others(*built, path, held->version, version);
    });
  }

  // Takes the frozen tier of a prompt from a file that `publish` wrote, here or in another process.
  void attach(const std::string& prompt_id, const std::string& path) {
    const std::shared_ptr<const Frozen> mapped = Frozen::map(path);
    std::lock_guard<std::mutex> lock(mutex_);
    require_open();
    const std::shared_ptr<Prompt> held = entry(prompt_id);
    held->live.reset();
    ++held->version;
    std::atomic_store(&held->frozen, mapped);
  }

  // Queues the rebuild of the text that all prompts share.
  void publish_shared(std::vector<int32_t> tokens, std::vector<int64_t> offsets, const std::string& path) {
    std::lock_guard<std::mutex> lock(mutex_);
    require_open();
    check_ragged(static_cast<int64_t>(offsets.size()) - 1, tokens.data(), offsets.data(),
                 static_cast<int64_t>(tokens.size()));
    for (const int32_t token : tokens)
      if (static_cast<uint32_t>(token) >= kGap)
        throw std::invalid_argument("token " + std::to_string(token) + " is too large for the shared text; allowed: below " +
                                    std::to_string(kGap));
    const uint64_t version = ++shared_version_;
    builder_.submit(&shared_pending_, [this, version, path, tokens = std::move(tokens), offsets = std::move(offsets)] {
      if (shared_version_ != version) return;
      const std::shared_ptr<const SharedText> built = SharedTextBuilder::build(tokens, offsets);
      std::atomic_store(&shared_, built);
      write_for_others(*built, path, shared_version_, version);
    });
  }

  void attach_shared(const std::string& path) {
    const std::shared_ptr<const SharedText> mapped = SharedText::map(path);
    std::lock_guard<std::mutex> lock(mutex_);
    require_open();
    std::atomic_store(&shared_, mapped);
  }

  void calibrate(const float* q, size_t count) {
    std::lock_guard<std::mutex> lock(mutex_);
    require_open();
    if (count != calibration_.q.size())
      throw std::invalid_argument("a calibration has " + std::to_string(calibration_.q.size()) + " cells");
    for (size_t i = 0; i < count; ++i)
      if (!(q[i] >= 0.0f && q[i] <= 1.0f)) throw std::invalid_argument("probabilities must lie between 0 and 1");
    std::copy(q, q + count, calibration_.q.begin());
    calibration_.is_measured = true;
  }

  // Forgets a prompt; requests that are open keep what they hold.
  void drop(const std::string& prompt_id) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto found = prompts_.find(prompt_id);
    if (found == prompts_.end()) return;
    ++found->second->version;
    prompts_.erase(found);
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
    out.files_failed = files_failed_;
    if (const auto shared = std::atomic_load(&shared_)) {
      out.shared_tokens = shared->num_tokens();
      out.shared_bytes = shared->bytes();
    }
    return out;
  }

 private:
  // What an open request reads; it keeps them, whatever is published meanwhile.
  struct Tiers {
    std::shared_ptr<Live> live;
    std::shared_ptr<const Frozen> frozen;
    std::shared_ptr<const SharedText> shared;
  };
  struct Prompt {
    std::atomic<uint64_t> version{0};  // of the newest frozen tier asked for
    int pending = 0;  // rebuilds queued or running; guarded by the builder
    std::shared_ptr<const Frozen> frozen;
    std::shared_ptr<Live> live;
  };

  // A file that cannot be written (memory full) costs the other processes a build of their own, nothing else: they are
  // told by the promise that goes away (drafter/shared_folder.py).
  template <typename Tier>
  void write_for_others(const Tier& tier, const std::string& path, const std::atomic<uint64_t>& newest,
                        uint64_t version) {
    if (path.empty() || newest != version) return;
    try {
      tier.write(path);
      // Who replaced or dropped it meanwhile has looked for the file already.
      if (newest != version) unlink(path.c_str());
    } catch (const std::system_error&) {
      ++files_failed_;
      unlink((path + ".promised").c_str());
    }
  }

  void require_open() const {
    if (closed_) throw ClosedIndex("the suffix index is closed");
  }

  void require_closed_uid(int64_t uid) const {
    require_open();
    if (slots_.count(uid)) throw std::invalid_argument("uid " + std::to_string(uid) + " is open already");
  }

  std::shared_ptr<Prompt> entry(const std::string& prompt_id) {
    std::shared_ptr<Prompt>& held = prompts_[prompt_id];
    if (!held) {
      held = std::make_shared<Prompt>();
      if (!empty_) empty_ = FrozenBuilder::build({{}, {0}, {}, {}}, memory_);
      held->frozen = empty_;
    }
    return held;
  }

  size_t slot_of(int64_t uid) const {
    require_open();
    const auto found = slots_.find(uid);
    if (found == slots_.end()) throw UnknownUid("uid " + std::to_string(uid) + " is not open");
    return found->second;
  }

  // Fills batch_, the rows of a prompt side by side: they share a live tier.
  void find_requests(const int64_t* uids, int64_t rows) {
    require_open();
    const auto count = static_cast<size_t>(rows);
    // From one call to the next the batch mostly stays the same.
    if (is_sorted_ && count == last_uids_.size() && std::equal(uids, uids + rows, last_uids_.begin())) return;
    is_sorted_ = false;
    ++num_calls_;
    batch_.resize(count);
    found_.resize(count, 0);
    for (size_t row = 0; row < count; ++row) {
      const size_t guess = found_[row];
      if (guess >= uids_.size() || uids_[guess] != uids[row]) found_[row] = slot_of(uids[row]);
      OpenRequest& request = requests_[found_[row]];
      if (request.last_call == num_calls_)
        throw std::invalid_argument("uid " + std::to_string(uids[row]) + " is in the batch twice");
      request.last_call = num_calls_;
      batch_[row] = {&request, static_cast<int32_t>(row)};
    }
    std::stable_sort(batch_.begin(), batch_.end(),
                     [](const BatchRow& a, const BatchRow& b) { return a.request->live < b.request->live; });
    last_uids_.assign(uids, uids + rows);
    is_sorted_ = true;
  }

  // Deals the rows to workers, never two with the same live tier. More parts than threads: a thread that the system wakes
  // late, which takes as long as drafting for some hundred rows, still finds work.
  template <typename Work>
  void in_parts(int64_t rows, Work work) {
    const size_t count = static_cast<size_t>(rows);
    if (num_threads_ == 1 || rows < threads_from_) return work(workers_[0], 0, count);
    if (!threads_) threads_.emplace(num_threads_ - 1);
    const size_t parts = std::max(num_threads_, count / kPartRows);
    if (workers_.size() < parts) workers_.resize(parts);
    cuts_.assign(1, 0);
    for (size_t part = 1; part <= parts; ++part) {
      size_t cut = std::max(cuts_.back(), count * part / parts);
      while (cut > 0 && cut < count && batch_[cut].request->live == batch_[cut - 1].request->live) ++cut;
      cuts_.push_back(cut);
    }
    threads_->run(parts, [&](size_t part) {
      if (cuts_[part] < cuts_[part + 1]) work(workers_[part], cuts_[part], cuts_[part + 1]);
    });
  }

  static void check_ragged(int64_t rows, const int32_t* values, const int64_t* offsets, int64_t num_values) {
    if (offsets[0] != 0 || offsets[rows] != num_values)
      throw std::invalid_argument("offsets must run from 0 to the number of tokens");
    for (int64_t row = 0; row < rows; ++row)
      if (offsets[row] > offsets[row + 1]) throw std::invalid_argument("offsets must not decrease");
    check_tokens(values, num_values);
  }

  static void check_tokens(const int32_t* values, int64_t num_values) {
    int32_t any = 0;
    for (int64_t i = 0; i < num_values; ++i) any |= values[i];
    if (any >= 0) return;
    const int32_t* bad = std::find_if(values, values + num_values, [](int32_t token) { return token < 0; });
    throw std::invalid_argument("token " + std::to_string(*bad) + " is negative; allowed: 0 or more");
  }

  static void collect(const Frozen& tier, const std::vector<int32_t>& context,
                      std::vector<std::pair<int32_t, float>>& out) {
    int32_t at = kFrozenRoot;
    for (const int32_t token : context)
      if ((at = tier.find(at, token)) < 0) return;
    tier.each_edge(at, [&](int32_t token, int32_t target) { out.push_back({token, tier.state(target).weight}); });
  }
  static void collect(const Live& tier, const std::vector<int32_t>& context,
                      std::vector<std::pair<int32_t, float>>& out) {
    std::unordered_map<int32_t, float> weights;
    tier.each_follower(context, [&](int32_t token) { weights[token] += 1.0f; });
    out.assign(weights.begin(), weights.end());
  }

  const SetOptions options_;
  static constexpr size_t kPartRows = 128;
  const int64_t threads_from_;
  const size_t num_threads_;
  std::mutex mutex_;
  bool closed_ = false;
  std::shared_ptr<IndexMemory> memory_ = std::make_shared<IndexMemory>();
  std::shared_ptr<const Frozen> empty_;
  std::shared_ptr<const SharedText> shared_;
  int shared_pending_ = 0;
  std::atomic<uint64_t> shared_version_{0};
  std::atomic<size_t> files_failed_{0};
  Calibration calibration_;
  std::unordered_map<std::string, std::shared_ptr<Prompt>> prompts_;
  std::unordered_map<int64_t, size_t> slots_;
  std::vector<OpenRequest> requests_;
  std::vector<Tiers> tiers_;  // of each request
  std::vector<int64_t> uids_, last_uids_;
  bool is_sorted_ = false;
  uint64_t num_calls_ = 0;
  Batch batch_;
  std::vector<size_t> found_, cuts_;
  std::vector<StepWorker> workers_;  // by part
  std::optional<StepThreads> threads_;
  Builder builder_;
};

}  // namespace slipstream
