// The arrays of one engine step: which tokens a pass takes, and what becomes of those it sampled.
// Twins: rollout/packing.py (plan), rollout/bookkeeping.py (commit), rollout/acceptance.py (observe).
// Invariants: array work only, in the order of the rows; a slot's tokens are touched from its length on, nowhere else.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace slipstream {

// Live requests in order of admission. tokens [slots, max_len]: text, and from length on scratch; length, cached [slots].
struct LiveSlots {
  const int64_t* order;
  int64_t live;
  int32_t* tokens;
  int64_t max_len;
  const int64_t *length, *cached;
};

// Drafts by row of the live requests. tokens [rows, width]; count, source, limit [rows]; limit null: nothing was drafted.
struct StepDrafts {
  const int32_t* tokens;
  int64_t width;
  const int32_t* count;
  const int8_t* source;
  const int32_t* limit;
  int64_t vocab;
};

// See StepPlan in rollout/packing.py.
struct StepRows {
  std::vector<int64_t> token_ids, slots, positions, widths, chunk_slots, chunk_sizes, sampling_slots, row_offsets{0},
      logit_rows, draft_rows, draft_counts;
  std::vector<int32_t> row_drafts;
  std::vector<int8_t> draft_sources;
  int64_t cached = 0, prefill = 0, drafted = 0, invalid = 0;
};

class StepPlanner {
 public:
  StepPlanner(const LiveSlots& slots, const StepDrafts& drafts, int64_t most, StepRows& out)
      : slots_(slots), drafts_(drafts), most_(most), out_(out) {}

  // spare: the slot of padding tokens; multiple: what the pass is padded to.
  void plan(int64_t spare, int64_t multiple) {
    take_pending();
    take_drafts();
    for (int64_t i = 0; i < slots_.live; ++i) pack(i);
    out_.logit_rows.resize((out_.logit_rows.size() + multiple - 1) / multiple * multiple, 0);
    for (int64_t pad = 0; out_.token_ids.size() % multiple; ++pad) add_token(0, spare, pad);
  }

 private:
  // A token of every request, then prompt chunks in order, as far as they fit.
  void take_pending() {
    int64_t room = most_ - slots_.live;
    for (int64_t i = 0; i < slots_.live; ++i) {
      const int64_t slot = slots_.order[i], pending = slots_.length[slot] - slots_.cached[slot];
      const int64_t more = std::clamp<int64_t>(pending - 1, 0, std::max<int64_t>(room, 0));
      room -= std::max<int64_t>(pending - 1, 0);
      out_.widths.push_back(std::min<int64_t>(pending, 1) + more);
      out_.cached += slots_.cached[slot];
      used_ += out_.widths.back();
    }
  }

  // Drafts of requests whose text ends in this pass, in order, as far as they fit.
  void take_drafts() {
    counts_.assign(static_cast<size_t>(slots_.live), 0);
    if (drafts_.limit == nullptr) return;
    int64_t room = most_ - used_;
    for (int64_t i = 0; i < slots_.live; ++i) {
      const int64_t valid = valid_tokens(i);
      if (!is_complete(i)) continue;
      const int64_t wanted = std::min<int64_t>(valid, drafts_.limit[i]);
      counts_[i] = std::clamp<int64_t>(room, 0, wanted);
      room -= wanted;
    }
  }

  // A draft ends before its first token outside the vocabulary: a drafter may be wrong, never harmful.
  int64_t valid_tokens(int64_t row) {
    const int32_t* tokens = drafts_.tokens + row * drafts_.width;
    const int64_t count = std::min<int64_t>(drafts_.count[row], drafts_.width);
    for (int64_t i = 0; i < count; ++i)
      if (tokens[i] < 0 || tokens[i] >= drafts_.vocab) {
        ++out_.invalid;
        return i;
      }
    return count;
  }

  bool is_complete(int64_t row) const {
    const int64_t slot = slots_.order[row];
    return out_.widths[row] == slots_.length[slot] - slots_.cached[slot];
  }

  void pack(int64_t row) {
    const int64_t slot = slots_.order[row], from = slots_.cached[slot], taken = out_.widths[row], count = counts_[row];
    const int64_t first = static_cast<int64_t>(out_.token_ids.size());
    int32_t* text = slots_.tokens + slot * slots_.max_len;
    std::copy_n(drafts_.tokens + row * drafts_.width, count, text + slots_.length[slot]);
    for (int64_t i = 0; i < taken + count; ++i) add_token(text[from + i], slot, from + i);
    if (slots_.length[slot] - from != 1) out_.prefill += taken;
    if (!is_complete(row)) {
      out_.chunk_slots.push_back(slot);
      out_.chunk_sizes.push_back(taken);
      return;
    }
    out_.widths[row] += count;
    out_.drafted += count;
    for (int64_t i = 0; i <= count; ++i) {
      out_.logit_rows.push_back(first + taken - 1 + i);
      out_.row_drafts.push_back(i < count ? text[slots_.length[slot] + i] : -1);
    }
    out_.sampling_slots.push_back(slot);
    out_.row_offsets.push_back(static_cast<int64_t>(out_.row_drafts.size()));
    out_.draft_rows.push_back(row);
    out_.draft_counts.push_back(count);
    out_.draft_sources.push_back(drafts_.source[row]);
  }

  void add_token(int64_t token, int64_t slot, int64_t position) {
    out_.token_ids.push_back(token);
    out_.slots.push_back(slot);
    out_.positions.push_back(position);
  }

  const LiveSlots& slots_;
  const StepDrafts& drafts_;
  const int64_t most_;
  StepRows& out_;
  int64_t used_ = 0;
  std::vector<int64_t> counts_;
};

// What a pass sampled: `requests` rows of slots; count tokens of each are new, from row_offsets on.
struct SampledRows {
  int64_t requests;
  const int64_t *slots, *row_offsets, *draft_counts;
  const int32_t *tokens, *count;
  const float* logprobs;
  const int8_t* sources;
};

// The slots' state: tokens, logprobs, versions [slots, max_len]; accepted [slots, sources]; the rest [slots].
struct SlotState {
  int64_t max_len, num_sources;
  int32_t *tokens, *versions;
  float* logprobs;
  int64_t *length, *cached, *rounds, *drafted, *accepted;
};

// What a pass brought: its tokens one request behind the other; requests that gained a token and that had a draft; and
// draft tokens verified and kept, by source.
struct CommittedRows {
  explicit CommittedRows(int64_t num_sources) : drafted(num_sources), accepted(num_sources) {}
  std::vector<int32_t> tokens;
  int64_t rounds = 0, draft_rounds = 0;
  std::vector<int64_t> drafted, accepted;
};

// Writes the new tokens. offsets [requests + 1]: of each request's in `out.tokens`.
inline void commit_rows(const SampledRows& rows, const SlotState& state, int32_t version, int64_t* offsets,
                        CommittedRows& out) {
  offsets[0] = 0;
  for (int64_t i = 0; i < rows.requests; ++i) {
    const int64_t slot = rows.slots[i], count = rows.count[i], length = state.length[slot];
    const int64_t to = slot * state.max_len + length, from = rows.row_offsets[i];
    std::copy_n(rows.tokens + from, count, state.tokens + to);
    std::copy_n(rows.logprobs + from, count, state.logprobs + to);
    std::fill_n(state.versions + to, count, version);
    out.tokens.insert(out.tokens.end(), rows.tokens + from, rows.tokens + from + count);
    offsets[i + 1] = offsets[i] + count;
    state.length[slot] = length + count;
    state.cached[slot] = length + count - 1;
    state.rounds[slot] += count > 0;
    state.drafted[slot] += rows.draft_counts[i];
    const int64_t kept = std::max<int64_t>(count - 1, 0);
    state.accepted[slot * state.num_sources + rows.sources[i]] += kept;
    out.rounds += count > 0;
    out.draft_rounds += rows.draft_counts[i] > 0;
    out.drafted[rows.sources[i]] += rows.draft_counts[i];
    out.accepted[rows.sources[i]] += kept;
  }
}

// One verified step of chains, as AcceptanceModel.observe takes it in. cells, probs: [rows of the drafts, width].
struct VerifiedChains {
  int64_t requests, width;
  const int64_t *rows, *drafted;
  const int32_t* count;
  const int8_t* finish;
  const int16_t* cells;
  const float* probs;
};

// seen, accepted [cells]; curve [3, buckets]. Returns the squared error of the estimates.
inline double observe_chains(const VerifiedChains& step, double* seen, double* accepted, double* curve, int64_t buckets) {
  double squared = 0.0;
  for (int64_t i = 0; i < step.requests; ++i) {
    const int64_t kept = std::max<int64_t>(step.count[i] - 1, 0), drafted = step.drafted[i];
    const bool ended = step.finish[i] != 0;
    const int16_t* cells = step.cells + step.rows[i] * step.width;
    const float* probs = step.probs + step.rows[i] * step.width;
    const int64_t reached = ended ? kept : std::min(drafted, kept + 1), judged = ended ? std::min(kept, drafted) : drafted;
    for (int64_t j = 0; j < reached; ++j) {
      if (cells[j] < 0) continue;
      seen[cells[j]] += 1.0;
      if (j < kept) accepted[cells[j]] += 1.0;
    }
    for (int64_t j = 0; j < judged; ++j) {
      if (probs[j] != probs[j]) continue;
      const double estimate = std::clamp(static_cast<double>(probs[j]), 0.0, 1.0), outcome = j < kept ? 1.0 : 0.0;
      const int64_t bucket = std::min(static_cast<int64_t>(estimate * static_cast<double>(buckets)), buckets - 1);
      curve[bucket] += 1.0;
      curve[buckets + bucket] += estimate;
      curve[2 * buckets + bucket] += outcome;
      squared += (estimate - outcome) * (estimate - outcome);
    }
  }
  return squared;
}

}  // namespace slipstream
