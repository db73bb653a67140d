// Binds the suffix index: checks shapes, releases the GIL, calls the header-only core.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arrays.h"
#include "suffix_set.h"

namespace py = pybind11;
using namespace slipstream;

static Corpus make_corpus(const In<int32_t>& values, const In<int64_t>& offsets, const In<float>& weights,
                          size_t num_plain) {
  require(offsets.size() == weights.size() + 1, "offsets must have one entry more than weights");
  return {{values.data(), values.data() + values.size()},
          {offsets.data(), offsets.data() + offsets.size()},
          {weights.data(), weights.data() + weights.size()},
          num_plain};
}

static void propose(SuffixIndexSet& set, const In<int64_t>& uids, const In<int32_t>& max_draft,
                    const In<float>& min_prob, In<int32_t>& tokens, In<int32_t>& count, In<int8_t>& source,
                    In<int32_t>& match_len, In<float>& probs) {
  const int64_t rows = uids.size();
  require(tokens.ndim() == 2 && tokens.shape(0) >= rows && probs.ndim() == 2 && probs.shape(0) == tokens.shape(0) &&
              probs.shape(1) == tokens.shape(1),
          "tokens and probs must be [rows, width] with a row for every uid");
  require(max_draft.size() >= rows && min_prob.size() >= rows && count.size() >= rows && source.size() >= rows &&
              match_len.size() >= rows,
          "every buffer needs a row for every uid");
  const DraftRows out{rows,
                      tokens.shape(1),
                      max_draft.data(),
                      min_prob.data(),
                      tokens.mutable_data(),
                      count.mutable_data(),
                      source.mutable_data(),
                      match_len.mutable_data(),
                      probs.mutable_data()};
  const int64_t* ids = uids.data();
  py::gil_scoped_release release;
  set.propose(ids, out);
}

static void extend(SuffixIndexSet& set, const In<int64_t>& uids, const In<int32_t>& values,
                   const In<int64_t>& offsets) {
  require(offsets.size() == uids.size() + 1, "offsets must have one entry more than uids");
  py::gil_scoped_release release;
  set.extend(uids.data(), uids.size(), values.data(), offsets.data(), values.size());
}

static py::dict stats(SuffixIndexSet& set) {
  SetStats s;
  {
    py::gil_scoped_release release;
    s = set.stats();
  }
  py::dict out;
  out["prompts"] = s.prompts;
  out["open_requests"] = s.open_requests;
  out["frozen_tokens"] = s.frozen_tokens;
  out["frozen_bytes"] = s.frozen_bytes;
  out["live_tokens"] = s.live_tokens;
  out["live_bytes"] = s.live_bytes;
  return out;
}

// Buffers that are written take no conversion: pybind11 would fill a copy and drop it.
void bind_suffix_index(py::module_& m) {
  py::register_exception<UnknownUid>(m, "UnknownUidError", PyExc_KeyError);
  py::register_exception<ClosedIndex>(m, "ClosedIndexError", PyExc_ValueError);
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<SuffixIndexSet>(m, "SuffixIndexSet")
      .def(py::init([](int min_match, int max_candidates, float escape) {
             return new SuffixIndexSet({min_match, max_candidates, escape});
           }),
           py::arg("min_match") = 2, py::arg("max_candidates") = 2, py::arg("escape") = 0.5f)
      .def("begin", &SuffixIndexSet::begin, no_gil, py::arg("uid"), py::arg("prompt_id"))
      .def("end", &SuffixIndexSet::end, no_gil, py::arg("uid"))
      .def("propose", &propose, py::arg("uids"), py::arg("max_draft"), py::arg("min_prob"),
           py::arg("tokens").noconvert(), py::arg("count").noconvert(), py::arg("source").noconvert(),
           py::arg("match_len").noconvert(), py::arg("probs").noconvert())
      .def("extend", &extend, py::arg("uids"), py::arg("values"), py::arg("offsets"))
      .def(
          "publish",
          [](SuffixIndexSet& set, const std::string& prompt_id, const In<int32_t>& values,
             const In<int64_t>& offsets, const In<float>& weights, size_t num_plain) {
            Corpus corpus = make_corpus(values, offsets, weights, num_plain);
            py::gil_scoped_release release;
            set.publish(prompt_id, std::move(corpus));
          },
          py::arg("prompt_id"), py::arg("values"), py::arg("offsets"), py::arg("weights"), py::arg("num_plain") = 0)
      .def("wait", &SuffixIndexSet::wait, no_gil)
      .def("drop", &SuffixIndexSet::drop, no_gil, py::arg("prompt_id"))
      .def("close", &SuffixIndexSet::close, no_gil)
      .def("follow_weights", &SuffixIndexSet::follow_weights, no_gil, py::arg("prompt_id"), py::arg("context"),
           py::arg("live"))
      .def("stats", &stats);
  m.def(
      "suffix_build_seconds",
      [](const In<int32_t>& values, const In<int64_t>& offsets, const In<float>& weights) {
        const Corpus corpus = make_corpus(values, offsets, weights, 0);
        py::gil_scoped_release release;
        return Frozen::build_seconds(corpus);
      },
      py::arg("values"), py::arg("offsets"), py::arg("weights"));
}
