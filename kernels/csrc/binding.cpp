// Binds attention and sampling, and opens the module: checks shapes, releases the GIL, calls the header-only core.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "arrays.h"
#include "attention.h"
#include "philox.h"
#include "sampler.h"

namespace py = pybind11;
using namespace slipstream;

static CacheShape cache_shape(const In<float>& keys, const In<float>& values) {
  require(keys.ndim() == 5 && keys.shape(4) == kLanes && values.ndim() == 4,
          "keys must be [S, Hkv, blocks, D, 16] and values [S, Hkv, blocks * 16, D]");
  const CacheShape s{keys.shape(0), keys.shape(1), keys.shape(2), keys.shape(3)};
  require(values.shape(0) == s.slots && values.shape(1) == s.kv_heads && values.shape(2) == s.length() &&
              values.shape(3) == s.head_dim,
          "keys must be [S, Hkv, blocks, D, 16] and values [S, Hkv, blocks * 16, D]");
  return s;
}

static void check_places(const CacheShape& s, const In<int64_t>& slots, const In<int64_t>& positions, int64_t tokens) {
  require(slots.size() == tokens && positions.size() == tokens, "slots and positions must have one entry a token");
  for (int64_t t = 0; t < tokens; ++t)
    require(slots.data()[t] >= 0 && slots.data()[t] < s.slots && positions.data()[t] >= 0 &&
                positions.data()[t] < s.length(),
            "a slot or position is outside the cache");
}

// Arrays that are written take no conversion: pybind11 would fill a copy and drop it.
static void bind_attention(py::module_& m) {
  m.def("append_kv", [](In<float> keys, In<float> values, In<float> new_keys, In<float> new_values, In<int64_t> slots,
                        In<int64_t> positions) {
    const CacheShape s = cache_shape(keys, values);
    const int64_t tokens = slots.size();
    require(new_keys.size() == tokens * s.kv_heads * s.head_dim && new_values.size() == new_keys.size(),
            "new keys and values must be [T, Hkv, D]");
    check_places(s, slots, positions, tokens);
    float *k = keys.mutable_data(), *v = values.mutable_data();
    py::gil_scoped_release release;
    append_kv(s, k, v, new_keys.data(), new_values.data(), tokens, slots.data(), positions.data());
  }, py::arg("keys").noconvert(), py::arg("values").noconvert(), py::arg("new_keys"), py::arg("new_values"),
     py::arg("slots"), py::arg("positions"));
  m.def("ragged_attention", [](In<float> query, In<float> keys, In<float> values, In<int64_t> slots,
                               In<int64_t> positions, float scale, int64_t window, float softcap, In<float> out) {
    const CacheShape s = cache_shape(keys, values);
    require(query.ndim() == 3 && query.shape(2) == s.head_dim && query.shape(1) % s.kv_heads == 0,
            "query must be [T, H, D] with H a multiple of Hkv");
    require(out.size() == query.size(), "out must have the shape of query");
    check_places(s, slots, positions, query.shape(0));
    const AttentionArgs args{s,           query.shape(0),   query.shape(1), query.data(), keys.data(), values.data(),
                             slots.data(), positions.data(), scale,          softcap,      window,      out.mutable_data()};
    py::gil_scoped_release release;
    ragged_attention(args);
  }, py::arg("query"), py::arg("keys").noconvert(), py::arg("values").noconvert(), py::arg("slots"),
     py::arg("positions"), py::arg("scale"), py::arg("window"), py::arg("softcap"), py::arg("out").noconvert());
}

static void bind_sampler(py::module_& m) {
  m.def("gumbel", [](uint64_t seed, uint64_t uid, uint32_t position, int vocab) {
    py::array_t<float> out(vocab);
    for (int v = 0; v < vocab; ++v) {
      const Word4 bits = philox4x32({static_cast<uint32_t>(v / 4), position, static_cast<uint32_t>(uid),
                                     static_cast<uint32_t>(uid >> 32)},
                                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
      out.mutable_data()[v] = gumbel_from_bits(bits[v % 4]);
    }
    return out;
  });
  m.def("philox4x32", [](std::array<uint32_t, 4> counter, uint32_t k0, uint32_t k1) { return philox4x32(counter, k0, k1); });
  m.def("sample_verify", [](In<float> logits, In<int64_t> offsets, In<int32_t> drafts, In<uint64_t> seed,
                            In<uint64_t> uid, In<int32_t> position, In<float> temperature, In<float> top_p,
                            In<int32_t> top_k, In<int32_t> remaining, In<int32_t> stop_ids, In<int32_t> stop_offsets,
                            In<int32_t> tokens, In<float> logprobs, In<int32_t> count, In<int8_t> finish) {
    require(logits.ndim() == 2 && logits.shape(1) > 0, "logits must be [R, V]");
    const int64_t rows = logits.shape(0), requests = offsets.size() - 1;
    require(requests >= 0 && drafts.size() == rows && tokens.size() == rows && logprobs.size() == rows,
            "drafts, tokens and logprobs must have one entry a row");
    for (int64_t i = 0; i < requests; ++i)
      require(offsets.data()[i] < offsets.data()[i + 1], "every request needs at least one row");
    require(requests == 0 || (offsets.data()[0] == 0 && offsets.data()[requests] == rows), "offsets must cover the rows");
    const auto per_request = [&](py::ssize_t size) { return size == requests; };
    require(per_request(seed.size()) && per_request(uid.size()) && per_request(position.size()) &&
                per_request(temperature.size()) && per_request(top_p.size()) && per_request(top_k.size()) &&
                per_request(remaining.size()) && per_request(count.size()) && per_request(finish.size()) &&
                stop_offsets.size() == requests + 1,
            "sampling parameters must have one entry a request");
    const VerifyArgs args{logits.data(),       static_cast<int>(logits.shape(1)), static_cast<int>(requests),
                          offsets.data(),      drafts.data(),                     seed.data(),
                          uid.data(),          position.data(),                   temperature.data(),
                          top_p.data(),        top_k.data(),                      remaining.data(),
                          stop_ids.data(),     stop_offsets.data(),               tokens.mutable_data(),
                          logprobs.mutable_data(), count.mutable_data(),          finish.mutable_data()};
    py::gil_scoped_release release;
    sample_verify(args);
  }, py::arg("logits"), py::arg("offsets"), py::arg("drafts"), py::arg("seed"), py::arg("uid"), py::arg("position"),
     py::arg("temperature"), py::arg("top_p"), py::arg("top_k"), py::arg("remaining"), py::arg("stop_ids"),
     py::arg("stop_offsets"), py::arg("tokens").noconvert(), py::arg("logprobs").noconvert(),
     py::arg("count").noconvert(), py::arg("finish").noconvert());
}

void bind_suffix_index(py::module_& m);  // suffix_binding.cpp

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels; each has its plain twin in slipstream.kernels.reference.";
  bind_attention(m);
  bind_sampler(m);
  bind_suffix_index(m);
}
