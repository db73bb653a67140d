// Binds the arrays of an engine step: checks shapes and ranges, calls the header-only core.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"
#include "calibration.h"
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
                        as_array(out.draft_rows), as_array(out.draft_counts), as_array(out.draft_sources), out.prefill,
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
  std::vector<int32_t> taken;
  py::array_t<int64_t> offsets(requests + 1);
  commit_rows(rows, state, version, taken, offsets.mutable_data());
  return py::make_tuple(as_array(taken), offsets);
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
}
