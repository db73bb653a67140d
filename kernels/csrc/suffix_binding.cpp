// Binds the suffix index: checks shapes, releases the GIL, calls the header-only core.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arrays.h"
#include "suffix_set.h"

namespace py = pybind11;
using namespace slipstream;

static Corpus make_corpus(const In<int32_t>& values, const In<int64_t>& offsets, const In<float>& weights,
                          const In<uint8_t>& ages) {
  require(offsets.size() == weights.size() + 1, "offsets must have one entry more than weights");
  require(ages.size() == weights.size(), "ages must have an entry for every weight");
  return {{values.data(), values.data() + values.size()},
          {offsets.data(), offsets.data() + offsets.size()},
          {weights.data(), weights.data() + weights.size()},
          {ages.data(), ages.data() + ages.size()}};
}

static void propose(SuffixIndexSet& set, const In<int64_t>& uids, const In<int32_t>& max_draft,
                    const In<float>& min_prob, const In<int32_t>& branching, In<int32_t>& tokens, In<int32_t>& count,
                    In<int8_t>& source, In<int32_t>& age, In<int32_t>& match_len, In<float>& probs,
                    In<int16_t>& cells, In<int16_t>& parents) {
  const int64_t rows = uids.size();
  const auto fits = [&](const py::array& buffer) {
    return buffer.ndim() == 2 && buffer.shape(0) == tokens.shape(0) && buffer.shape(1) == tokens.shape(1);
  };
  require(tokens.ndim() == 2 && tokens.shape(0) >= rows && fits(probs) && fits(cells) && fits(parents),
          "tokens, probs, cells and parents must be [rows, width] with a row for every uid");
  require(max_draft.size() >= rows && min_prob.size() >= rows && branching.size() >= rows && count.size() >= rows &&
              source.size() >= rows && age.size() >= rows && match_len.size() >= rows,
          "every buffer needs a row for every uid");
  require(tokens.shape(1) <= INT16_MAX, "a draft has at most 32,767 tokens");
  const DraftRows out{rows,
                      tokens.shape(1),
                      max_draft.data(),
                      min_prob.data(),
                      branching.data(),
                      tokens.mutable_data(),
                      count.mutable_data(),
                      source.mutable_data(),
                      age.mutable_data(),
                      match_len.mutable_data(),
                      probs.mutable_data(),
                      cells.mutable_data(),
                      parents.mutable_data()};
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
  out["shared_tokens"] = s.shared_tokens;
  out["shared_bytes"] = s.shared_bytes;
  out["files_failed"] = s.files_failed;
  return out;
}

// Buffers that are written take no conversion: pybind11 would fill a copy and drop it.
void bind_suffix_index(py::module_& m) {
  py::register_exception<UnknownUid>(m, "UnknownUidError", PyExc_KeyError);
  py::register_exception<ClosedIndex>(m, "ClosedIndexError", PyExc_ValueError);
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const std::system_error& error) {
      const py::tuple arguments = py::make_tuple(error.code().value(), error.what());
      PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
  });
  py::register_exception<BadBlock>(m, "BadIndexFileError", PyExc_ValueError);
  m.attr("NUM_CELLS") = kNumCells;
  m.def("calibration_cell", [](int source_class, int match_len, float relative_weight) {
    require(source_class >= 0 && source_class < kSourceClasses, "no such source class");
    return cell_of(source_class, match_len, relative_weight);
  });
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<SuffixIndexSet>(m, "SuffixIndexSet")
      .def(py::init([](int min_match, int max_candidates, float escape, size_t threads, int64_t threads_from) {
             SetOptions options;
             options.min_match = min_match;
             options.max_candidates = max_candidates;
             options.escape = escape;
             return new SuffixIndexSet(options, threads, threads_from);
           }),
           py::arg("min_match") = 1, py::arg("max_candidates") = 2, py::arg("escape") = 0.5f, py::arg("threads") = 1,
           py::arg("threads_from") = 1024)
      .def(
          "begin",
          [](SuffixIndexSet& set, int64_t uid, const std::string& prompt_id, const In<int32_t>& prompt) {
            py::gil_scoped_release release;
            set.begin(uid, prompt_id, prompt.data(), static_cast<size_t>(prompt.size()));
          },
          py::arg("uid"), py::arg("prompt_id"), py::arg("prompt"))
      .def("end", &SuffixIndexSet::end, no_gil, py::arg("uid"))
      .def("propose", &propose, py::arg("uids"), py::arg("max_draft"), py::arg("min_prob"), py::arg("branching"),
           py::arg("tokens").noconvert(), py::arg("count").noconvert(), py::arg("source").noconvert(),
           py::arg("age").noconvert(), py::arg("match_len").noconvert(), py::arg("probs").noconvert(),
           py::arg("cells").noconvert(), py::arg("parents").noconvert())
      .def("extend", &extend, py::arg("uids"), py::arg("values"), py::arg("offsets"))
      .def(
          "publish",
          [](SuffixIndexSet& set, const std::string& prompt_id, const In<int32_t>& values, const In<int64_t>& offsets,
             const In<float>& weights, const In<uint8_t>& ages, const std::string& path) {
            Corpus corpus = make_corpus(values, offsets, weights, ages);
            py::gil_scoped_release release;
            set.publish(prompt_id, std::move(corpus), path);
          },
          py::arg("prompt_id"), py::arg("values"), py::arg("offsets"), py::arg("weights"), py::arg("ages"),
          py::arg("path") = "")
      .def("attach", &SuffixIndexSet::attach, no_gil, py::arg("prompt_id"), py::arg("path"))
      .def(
          "publish_shared",
          [](SuffixIndexSet& set, const In<int32_t>& values, const In<int64_t>& offsets, const std::string& path) {
            require(offsets.size() >= 1, "offsets must have at least one entry");
            std::vector<int32_t> tokens(values.data(), values.data() + values.size());
            std::vector<int64_t> ends(offsets.data(), offsets.data() + offsets.size());
            py::gil_scoped_release release;
            set.publish_shared(std::move(tokens), std::move(ends), path);
          },
          py::arg("values"), py::arg("offsets"), py::arg("path") = "")
      .def("attach_shared", &SuffixIndexSet::attach_shared, no_gil, py::arg("path"))
      .def(
          "calibrate",
          [](SuffixIndexSet& set, const In<float>& q) {
            py::gil_scoped_release release;
            set.calibrate(q.data(), static_cast<size_t>(q.size()));
          },
          py::arg("q"))
      .def("wait", &SuffixIndexSet::wait, no_gil)
      .def("drop", &SuffixIndexSet::drop, no_gil, py::arg("prompt_id"))
      .def("close", &SuffixIndexSet::close, no_gil)
      .def("follow_weights", &SuffixIndexSet::follow_weights, no_gil, py::arg("prompt_id"), py::arg("context"),
           py::arg("live"))
      .def("stats", &stats);
  m.def(
      "suffix_build_seconds",
      [](const In<int32_t>& values, const In<int64_t>& offsets, const In<float>& weights) {
        const std::vector<uint8_t> ages(static_cast<size_t>(weights.size()), 1);
        const Corpus corpus = make_corpus(values, offsets, weights, In<uint8_t>(weights.size(), ages.data()));
        py::gil_scoped_release release;
        // Kept from call to call, as in an index that has built before.
        static const auto memory = std::make_shared<IndexMemory>();
        return FrozenBuilder::seconds(corpus, memory);
      },
      py::arg("values"), py::arg("offsets"), py::arg("weights"));
}
