// Binds the arrays of an engine step: checks shapes and ranges, calls the header-only core.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"
#include "calibration.h"
#include "finish_last.h"
#include "price_rows.h"
#include "step_rows.h"

namespace py = pybind11;
using namespace slipstream;

template <typename T>
static py::array_t<T> as_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

static py::tuple plan_rows(const In<int64_t>& order, In<int32_t>& tokens, const In<int64_t>& length,
                           const In<int64_t>& cached, const In<int32_t>& draft_tokens, const In<int32_t>& draft_count,
                           const In<int8_t>& draft_source, const std::optional<In<int32_t>>& limit, int64_t vocab,
                           int64_t most, int64_t multiple) {
  const int64_t live = order.size(), slots = length.size();
  require(tokens.ndim() == 2 && tokens.shape(0) == slots && cached.size() == slots, "tokens must be [slots, max_len]");
  require(draft_tokens.ndim() == 2 && draft_tokens.shape(0) >= live && draft_count.size() >= live &&
              draft_source.size() >= live && (!limit || limit->size() >= live),
          "drafts need a row for every live request");
  require(multiple >= 1, "multiple must be at least 1");
  const int64_t max_len = tokens.shape(1);
  for (int64_t i = 0; i < live; ++i) {
    const int64_t slot = order.data()[i];
    require(slot >= 0 && slot < slots, "a slot is outside the table");
    const int64_t held = length.data()[slot], wanted = limit ? std::min(limit->data()[i], draft_count.data()[i]) : 0;
    require(cached.data()[slot] >= 0 && cached.data()[slot] < held && held <= max_len, "a slot's lengths are impossible");
    require(wanted <= max_len - held, "a draft reaches beyond its slot");
  }
  const LiveSlots table{order.data(), live, tokens.mutable_data(), max_len, length.data(), cached.data()};
  const StepDrafts drafts{draft_tokens.data(), draft_tokens.shape(1), draft_count.data(), draft_source.data(),
                          limit ? limit->data() : nullptr, vocab};
  StepRows out;
  StepPlanner(table, drafts, most, out).plan(slots, multiple);
  return py::make_tuple(as_array(out.token_ids), as_array(out.slots), as_array(out.positions), as_array(out.widths),
                        as_array(out.chunk_slots), as_array(out.chunk_sizes), as_array(out.sampling_slots),
                        as_array(out.row_offsets), as_array(out.row_drafts), as_array(out.logit_rows),
                        as_array(out.draft_rows), as_array(out.draft_counts), as_array(out.draft_sources), out.cached, out.prefill,
                        out.drafted, out.invalid);
}

static py::tuple commit(const In<int64_t>& slots, const In<int64_t>& row_offsets, const In<int64_t>& draft_counts,
                        const In<int8_t>& sources, const In<int32_t>& new_tokens, const In<float>& new_logprobs,
                        const In<int32_t>& count, In<int32_t>& tokens, In<float>& logprobs, In<int32_t>& versions,
                        In<int64_t>& length, In<int64_t>& cached, In<int64_t>& rounds, In<int64_t>& drafted,
                        In<int64_t>& accepted, int32_t version) {
  const int64_t requests = slots.size(), held = length.size();
  require(row_offsets.size() == requests + 1 && draft_counts.size() == requests && sources.size() == requests &&
              count.size() == requests && new_logprobs.size() == new_tokens.size(),
          "what was sampled needs an entry for every request");
  require(tokens.ndim() == 2 && accepted.ndim() == 2 && tokens.shape(0) == held && logprobs.size() == tokens.size() &&
              versions.size() == tokens.size() && cached.size() == held && rounds.size() == held &&
              drafted.size() == held && accepted.shape(0) == held,
          "the table's arrays must be [slots, max_len] and [slots]");
  for (int64_t i = 0; i < requests; ++i) {
    const int64_t slot = slots.data()[i], from = row_offsets.data()[i], taken = count.data()[i];
    require(slot >= 0 && slot < held, "a slot is outside the table");
    require(from >= 0 && taken >= 0 && from + taken <= new_tokens.size() &&
                length.data()[slot] + taken <= tokens.shape(1),
            "a request has more new tokens than there is room for");
    require(sources.data()[i] >= 0 && sources.data()[i] < accepted.shape(1), "no such source");
  }
  const SampledRows rows{requests, slots.data(), row_offsets.data(), draft_counts.data(), new_tokens.data(),
                         count.data(), new_logprobs.data(), sources.data()};
  const SlotState state{tokens.shape(1), accepted.shape(1), tokens.mutable_data(), versions.mutable_data(),
                        logprobs.mutable_data(), length.mutable_data(), cached.mutable_data(), rounds.mutable_data(),
                        drafted.mutable_data(), accepted.mutable_data()};
  CommittedRows out(accepted.shape(1));
  py::array_t<int64_t> offsets(requests + 1);
  commit_rows(rows, state, version, offsets.mutable_data(), out);
  return py::make_tuple(as_array(out.tokens), offsets, out.rounds, out.draft_rounds, out.drafted, out.accepted);
}

static double observe(const In<int16_t>& cells, const In<float>& probs, const In<int64_t>& rows,
                      const In<int64_t>& drafted, const In<int32_t>& count, const In<int8_t>& finish, In<double>& seen,
                      In<double>& accepted, In<double>& curve) {
  const int64_t requests = rows.size();
  require(cells.ndim() == 2 && probs.size() == cells.size() && drafted.size() == requests &&
              count.size() == requests && finish.size() == requests,
          "a verified step needs an entry for every request");
  require(seen.size() == kNumCells && accepted.size() == kNumCells && curve.ndim() == 2 && curve.shape(0) == 3,
          "the sums of another geometry");
  const int64_t width = cells.shape(1);
  for (int64_t i = 0; i < requests; ++i) {
    const int64_t row = rows.data()[i];
    require(row >= 0 && row < cells.shape(0) && drafted.data()[i] >= 0 && drafted.data()[i] <= width &&
                count.data()[i] <= drafted.data()[i] + 1,
            "a draft is outside its buffers");
    for (int64_t j = 0; j < drafted.data()[i]; ++j) require(cells.data()[row * width + j] < kNumCells, "no such cell");
  }
  const VerifiedChains step{requests, width, rows.data(), drafted.data(), count.data(), finish.data(), cells.data(),
                            probs.data()};
  return observe_chains(step, seen.mutable_data(), accepted.mutable_data(), curve.mutable_data(), curve.shape(1));
}

// Every slot lies in the table, and every array has an entry for each of its slots.
template <typename... Arrays>
static void check_slots(const In<int64_t>& slots, int64_t held, const Arrays&... arrays) {
  require(((arrays.size() == held) && ...), "the table's arrays must be [slots]");
  for (int64_t i = 0; i < slots.size(); ++i)
    require(slots.data()[i] >= 0 && slots.data()[i] < held, "a slot is outside the table");
}

template <typename T>
static py::array_t<T> gather(const In<int64_t>& slots, const In<T>& values) {
  py::array_t<T> out(slots.size());
  for (int64_t i = 0; i < slots.size(); ++i) out.mutable_data()[i] = values.data()[slots.data()[i]];
  return out;
}

// left - right of each slot.
static py::array_t<int32_t> differences(const In<int64_t>& slots, const In<int64_t>& left, const In<int64_t>& right) {
  py::array_t<int32_t> out(slots.size());
  for (int64_t i = 0; i < slots.size(); ++i) {
    const int64_t slot = slots.data()[i];
    out.mutable_data()[i] = static_cast<int32_t>(left.data()[slot] - right.data()[slot]);
  }
  return out;
}

static py::tuple live_rows(const In<int64_t>& slots, const In<int64_t>& uid, const In<int64_t>& prompt_len,
                           const In<int64_t>& length, const In<int64_t>& end) {
  check_slots(slots, length.size(), uid, prompt_len, end);
  py::array_t<int32_t> context(slots.size());
  for (int64_t i = 0; i < slots.size(); ++i)
    context.mutable_data()[i] = static_cast<int32_t>(length.data()[slots.data()[i]]);
  return py::make_tuple(gather(slots, uid), differences(slots, length, prompt_len), differences(slots, end, length),
                        context);
}

static py::tuple draft_limits(const In<int64_t>& slots, const In<int64_t>& length, const In<int64_t>& cached,
                              const In<int64_t>& end, const In<int32_t>& wanted, int32_t most) {
  check_slots(slots, length.size(), cached, end);
  require(wanted.size() == slots.size(), "a limit for every row");
  py::array_t<int32_t> out(slots.size());
  bool any = false;
  for (int64_t i = 0; i < slots.size(); ++i) {
    const int64_t slot = slots.data()[i], held = length.data()[slot];
    const int64_t left = held - cached.data()[slot] == 1 ? end.data()[slot] - held - 1 : 0;
    const int64_t limit = std::clamp<int64_t>(std::min<int64_t>(wanted.data()[i], left), 0, most);
    out.mutable_data()[i] = static_cast<int32_t>(limit);
    any = any || limit > 0;
  }
  return py::make_tuple(out, any);
}

static py::tuple sampling_rows(const In<int64_t>& slots, const In<int64_t>& prompt_len, const In<int64_t>& length,
                               const In<int64_t>& end, const In<uint64_t>& seed, const In<int64_t>& uid,
                               const In<float>& temperature, const In<float>& top_p, const In<int32_t>& top_k,
                               const In<int64_t>& num_stops, const In<int32_t>& stop_ids) {
  check_slots(slots, length.size(), prompt_len, end, seed, uid, temperature, top_p, top_k, num_stops);
  require(stop_ids.ndim() == 2 && stop_ids.shape(0) == length.size(), "stop_ids must be [slots, ids]");
  const int64_t width = stop_ids.shape(1);
  std::vector<int32_t> stops;
  py::array_t<int32_t> offsets(slots.size() + 1);
  py::array_t<uint64_t> uids(slots.size());
  offsets.mutable_data()[0] = 0;
  for (int64_t i = 0; i < slots.size(); ++i) {
    const int64_t slot = slots.data()[i], count = num_stops.data()[slot];
    require(count >= 0 && count <= width, "a slot has more stop ids than there is room for");
    stops.insert(stops.end(), stop_ids.data() + slot * width, stop_ids.data() + slot * width + count);
    offsets.mutable_data()[i + 1] = static_cast<int32_t>(stops.size());
    uids.mutable_data()[i] = static_cast<uint64_t>(uid.data()[slot]);
  }
  return py::make_tuple(gather(slots, seed), uids, differences(slots, length, prompt_len), gather(slots, temperature),
                        gather(slots, top_p), gather(slots, top_k), differences(slots, end, length), as_array(stops),
                        offsets);
}

static py::tuple rates(const In<int64_t>& slots, const In<int64_t>& rounds, const In<int64_t>& drafted,
                       const In<int64_t>& accepted, double prior_rounds, double prior_drafted, double prior_accepted) {
  check_slots(slots, rounds.size(), drafted);
  require(accepted.ndim() == 2 && accepted.shape(0) == rounds.size(), "accepted must be [slots, sources]");
  require(prior_rounds > 0.0, "the prior needs rounds");
  const SlotCounts counts{rounds.data(), drafted.data(), accepted.data(), accepted.shape(1)};
  py::array_t<float> speed(slots.size());
  py::array_t<double> width(slots.size());
  for (int64_t i = 0; i < slots.size(); ++i)
    round_rates(counts, {prior_rounds, prior_drafted, prior_accepted}, slots.data()[i], speed.mutable_data()[i],
                width.mutable_data()[i]);
  return py::make_tuple(speed, width);
}

static py::array_t<float> least_probabilities(const In<double>& chances, const In<float>& speed, const In<double>& width,
                                              double base, double tok, double num_queued, double hedge, double margin) {
  require(speed.size() == chances.size() && width.size() == chances.size(), "an entry for every row");
  const RowPrice price{base, tok, static_cast<double>(chances.size()), num_queued, hedge, margin};
  py::array_t<float> out(chances.size());
  for (int64_t i = 0; i < chances.size(); ++i)
    out.mutable_data()[i] = least_probability(price, chances.data()[i], speed.data()[i], width.data()[i]);
  return out;
}

// Which of `before` are among `after`; none unless `after` is some of them in their order.
static std::optional<py::array_t<bool>> still_there(const In<int64_t>& before, const In<int64_t>& after) {
  py::array_t<bool> out(before.size());
  int64_t found = 0;
  for (int64_t i = 0; i < before.size(); ++i) {
    const bool stayed = found < after.size() && before.data()[i] == after.data()[found];
    out.mutable_data()[i] = stayed;
    found += stayed;
  }
  return found == after.size() ? std::make_optional(out) : std::nullopt;
}

static py::array_t<float> estimates_for(const In<double>& curve, const In<float>& probabilities, double prior_tokens) {
  require(curve.ndim() == 2 && curve.shape(0) == 3 && curve.shape(1) >= 1 &&
              curve.shape(1) <= InverseCurve::kMostBuckets && prior_tokens > 0.0,
          "the curve of another geometry");
  const InverseCurve inverse(curve.data(), curve.shape(1), prior_tokens);
  py::array_t<float> out(probabilities.size());
  for (int64_t i = 0; i < probabilities.size(); ++i) out.mutable_data()[i] = inverse.at(probabilities.data()[i]);
  return out;
}

static py::array_t<double> finish_last_alone(const In<float>& tables, double per_bin, const In<int64_t>& rows,
                                             const In<int64_t>& generated, const In<int64_t>& remaining,
                                             const In<float>& speed, const In<float>& coarse, const In<double>& levels) {
  require(tables.ndim() == 2 && tables.shape(1) > 1, "tables must be [slots, bins + 1]");
  const int64_t count = rows.size();
  require(generated.size() == count && remaining.size() == count && speed.size() == count, "an entry for every row");
  require(coarse.size() > 0 && levels.size() > 0, "times to look at");
  const HazardTables hazards{tables.data(), tables.shape(1) - 1, static_cast<float>(per_bin)};
  std::vector<LiveRow> live;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows.data()[i];
    require(row >= 0 && row < tables.shape(0), "a row outside the tables");
    const float so_far = static_cast<float>(std::max<int64_t>(generated.data()[i], 1));
    live.push_back({row, so_far, hazards.at(row, so_far), static_cast<float>(remaining.data()[i]), speed.data()[i]});
  }
  py::array_t<double> out(count);
  finish_last(hazards, live, {coarse.data(), coarse.data() + coarse.size()},
              {levels.data(), levels.data() + levels.size()}, out.mutable_data());
  return out;
}

// Arrays that are written take no conversion: pybind11 would fill a copy and drop it.
void bind_step(py::module_& m) {
  m.def("plan_rows", &plan_rows, py::arg("order"), py::arg("tokens").noconvert(), py::arg("length"), py::arg("cached"),
        py::arg("draft_tokens"), py::arg("draft_count"), py::arg("draft_source"), py::arg("limit"), py::arg("vocab"),
        py::arg("most"), py::arg("multiple"));
  m.def("commit_rows", &commit, py::arg("slots"), py::arg("row_offsets"), py::arg("draft_counts"), py::arg("sources"),
        py::arg("new_tokens"), py::arg("new_logprobs"), py::arg("count"), py::arg("tokens").noconvert(),
        py::arg("logprobs").noconvert(), py::arg("versions").noconvert(), py::arg("length").noconvert(),
        py::arg("cached").noconvert(), py::arg("rounds").noconvert(), py::arg("drafted").noconvert(),
        py::arg("accepted").noconvert(), py::arg("version"));
  m.def("observe_chains", &observe, py::arg("cells"), py::arg("probs"), py::arg("rows"), py::arg("drafted"),
        py::arg("count"), py::arg("finish"), py::arg("seen").noconvert(), py::arg("accepted").noconvert(),
        py::arg("curve").noconvert());
  m.def("live_rows", &live_rows, py::arg("slots"), py::arg("uid"), py::arg("prompt_len"), py::arg("length"),
        py::arg("end"));
  m.def("draft_limits", &draft_limits, py::arg("slots"), py::arg("length"), py::arg("cached"), py::arg("end"),
        py::arg("wanted"), py::arg("most"));
  m.def("sampling_rows", &sampling_rows, py::arg("slots"), py::arg("prompt_len"), py::arg("length"), py::arg("end"),
        py::arg("seed"), py::arg("uid"), py::arg("temperature"), py::arg("top_p"), py::arg("top_k"),
        py::arg("num_stops"), py::arg("stop_ids"));
  m.def("rates", &rates, py::arg("slots"), py::arg("rounds"), py::arg("drafted"), py::arg("accepted"),
        py::arg("prior_rounds"), py::arg("prior_drafted"), py::arg("prior_accepted"));
  m.def("least_probabilities", &least_probabilities, py::arg("chances"), py::arg("speed"), py::arg("width"),
        py::arg("base"), py::arg("tok"), py::arg("num_queued"), py::arg("hedge"), py::arg("margin"));
  m.def("finish_last", &finish_last_alone, py::arg("tables"), py::arg("per_bin"), py::arg("rows"), py::arg("generated"),
        py::arg("remaining"), py::arg("speed"), py::arg("coarse"), py::arg("levels"));
  m.def("still_there", &still_there, py::arg("before"), py::arg("after"));
  m.def("estimates_for", &estimates_for, py::arg("curve"), py::arg("probabilities"), py::arg("prior_tokens"));
}
