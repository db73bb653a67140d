// Binds attention and sampling, and opens the module: checks shapes, releases the GIL, calls the header-only core.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>

#include "arrays.h"
#include "attention.h"
#include "context.h"
#include "philox.h"
#include "sampler.h"

namespace py = pybind11;
using namespace slipstream;

static CacheShape cache_shape(const In<float>& keys, const In<float>& values) {
  require(keys.ndim() == 5 && keys.shape(4) == kWide && values.ndim() == 4,
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

static void check_prefixes(const CacheShape& s, const In<int64_t>& slots, const In<int64_t>& places,
                           const In<int64_t>& prefix_slots, const In<int64_t>& prefix_lens) {
  require(prefix_slots.size() == s.slots && prefix_lens.size() == s.slots, "prefixes must have one entry a slot");
  for (int64_t t = 0; t < slots.size(); ++t) {
    const int64_t owner = prefix_slots.data()[slots.data()[t]], length = prefix_lens.data()[slots.data()[t]];
    require(owner >= 0 && owner < s.slots, "a prefix outside the cache");
    require(length >= 0 && length <= places.data()[t], "a token that lies in the prefix of its slot");
  }
}

// Every token whose place is not its position has a token before it in the pass, at the position before.
static void check_tree(const In<int64_t>& slots, const In<int64_t>& places, const In<int64_t>& positions,
                       const In<int64_t>& parents) {
  require(positions.size() == slots.size() && parents.size() == slots.size(),
          "positions and parents must have one entry a token");
  for (int64_t t = 0; t < slots.size(); ++t) {
    const int64_t place = places.data()[t], position = positions.data()[t], parent = parents.data()[t];
    if (place == position) continue;
    require(parent >= 0 && parent < t && slots.data()[parent] == slots.data()[t] &&
                positions.data()[parent] + 1 == position && places.data()[parent] < place && position < place,
            "a token of a tree needs its parent before it in the pass, one position less");
  }
}

// [T, H, D] with the last axis side by side.
static Rows rows_of(const py::array_t<float>& x, int64_t tokens, int64_t heads, int64_t dim, const char* message) {
  require(x.ndim() == 3 && x.shape(0) == tokens && x.shape(1) == heads && x.shape(2) == dim, message);
  require(dim == 1 || x.strides(2) == sizeof(float), "the last axis must lie side by side");
  return {x.data(), x.strides(0) / int64_t{sizeof(float)}, x.strides(1) / int64_t{sizeof(float)}};
}

// Arrays that are written take no conversion: pybind11 would fill a copy and drop it.
static void bind_attention(py::module_& m) {
  m.def("append_kv", [](In<float> keys, In<float> values, py::array_t<float> new_keys, py::array_t<float> new_values,
                        In<int64_t> slots, In<int64_t> positions) {
    const CacheShape s = cache_shape(keys, values);
    const int64_t tokens = slots.size();
    const Rows k_rows = rows_of(new_keys, tokens, s.kv_heads, s.head_dim, "new keys must be [T, Hkv, D]");
    const Rows v_rows = rows_of(new_values, tokens, s.kv_heads, s.head_dim, "new values must be [T, Hkv, D]");
    check_places(s, slots, positions, tokens);
    float *k = keys.mutable_data(), *v = values.mutable_data();
    py::gil_scoped_release release;
    append_kv(s, k, v, k_rows, v_rows, tokens, slots.data(), positions.data());
  }, py::arg("keys").noconvert(), py::arg("values").noconvert(), py::arg("new_keys").noconvert(), py::arg("new_values").noconvert(),
     py::arg("slots"), py::arg("positions"));
  m.def("move_kv", [](In<float> keys, In<float> values, In<int64_t> slots, In<int64_t> from, In<int64_t> to) {
    const CacheShape s = cache_shape(keys, values);
    check_places(s, slots, from, slots.size());
    check_places(s, slots, to, slots.size());
    float *k = keys.mutable_data(), *v = values.mutable_data();
    py::gil_scoped_release release;
    move_kv(s, k, v, slots.size(), slots.data(), from.data(), to.data());
  }, py::arg("keys").noconvert(), py::arg("values").noconvert(), py::arg("slots"), py::arg("source"), py::arg("target"));
  m.def("ragged_attention", [](py::array_t<float> query, In<float> keys, In<float> values, In<int64_t> slots,
                               In<int64_t> places, float scale, int64_t window, float softcap, In<float> out,
                               Context& context, std::optional<In<int64_t>> positions,
                               std::optional<In<int64_t>> parents, std::optional<In<int64_t>> prefix_slots,
                               std::optional<In<int64_t>> prefix_lens) {
    const CacheShape s = cache_shape(keys, values);
    require(query.ndim() == 3 && query.shape(2) == s.head_dim && query.shape(1) % s.kv_heads == 0,
            "query must be [T, H, D] with H a multiple of Hkv");
    require(out.size() == query.size(), "out must have the shape of query");
    check_places(s, slots, places, query.shape(0));
    require(positions.has_value() == parents.has_value(), "positions and parents come together");
    if (positions) check_tree(slots, places, *positions, *parents);
    require(prefix_slots.has_value() == prefix_lens.has_value(), "prefix_slots and prefix_lens come together");
    if (prefix_slots) check_prefixes(s, slots, places, *prefix_slots, *prefix_lens);
    const Rows rows = rows_of(query, query.shape(0), query.shape(1), s.head_dim, "query must be [T, H, D]");
    const AttentionArgs args{s, query.shape(0), query.shape(1), rows, keys.data(), values.data(), slots.data(),
                             places.data(), positions ? positions->data() : nullptr,
                             parents ? parents->data() : nullptr, prefix_slots ? prefix_slots->data() : nullptr,
                             prefix_lens ? prefix_lens->data() : nullptr, scale, softcap, window, out.mutable_data()};
    py::gil_scoped_release release;
    ragged_attention(context.isa, &context.threads, args);
  }, py::arg("query").noconvert(), py::arg("keys").noconvert(), py::arg("values").noconvert(), py::arg("slots"),
     py::arg("places"), py::arg("scale"), py::arg("window"), py::arg("softcap"), py::arg("out").noconvert(),
     py::arg("context"), py::arg("positions") = py::none(), py::arg("parents") = py::none(),
     py::arg("prefix_slots") = py::none(), py::arg("prefix_lens") = py::none());
}

// Numpy has no bfloat16: such arrays come as int16 of the same bits.
template <typename Stored, typename T>
static void bind_sample_verify(py::module_& m, const char* name) {
  m.def(name, [](In<Stored> logits, In<int64_t> offsets, In<int32_t> drafts, In<uint64_t> seed, In<uint64_t> uid,
                 In<int32_t> position, In<float> temperature, In<float> top_p, In<int32_t> top_k, In<int32_t> remaining,
                 In<int32_t> stop_ids, In<int32_t> stop_offsets, In<int32_t> tokens, In<float> logprobs,
                 In<int32_t> count, In<int8_t> finish, Context& context, std::optional<In<int32_t>> parents,
                 std::optional<In<int32_t>> path) {
    require(logits.ndim() == 2 && logits.shape(1) > 0, "logits must be [R, V]");
    const int64_t rows = logits.shape(0), requests = offsets.size() - 1;
    require(requests >= 0 && drafts.size() == rows && tokens.size() == rows && logprobs.size() == rows,
            "drafts, tokens and logprobs must have one entry a row");
    for (int64_t i = 0; i < requests; ++i)
      require(offsets.data()[i] < offsets.data()[i + 1], "every request needs at least one row");
    require(requests == 0 || (offsets.data()[0] == 0 && offsets.data()[requests] == rows), "offsets must cover the rows");
    require(parents.has_value() == path.has_value(), "parents and path come together");
    require(!parents || (parents->size() == rows && path->size() == rows), "parents and path must have one entry a row");
    const auto per_request = [&](py::ssize_t size) { return size == requests; };
    require(per_request(seed.size()) && per_request(uid.size()) && per_request(position.size()) &&
                per_request(temperature.size()) && per_request(top_p.size()) && per_request(top_k.size()) &&
                per_request(remaining.size()) && per_request(count.size()) && per_request(finish.size()) &&
                stop_offsets.size() == requests + 1,
            "sampling parameters must have one entry a request");
    const VerifyArgs<T> args{reinterpret_cast<const T*>(logits.data()), static_cast<int>(logits.shape(1)),
                             static_cast<int>(requests), offsets.data(), drafts.data(),
                             parents ? parents->data() : nullptr, seed.data(), uid.data(), position.data(),
                             temperature.data(), top_p.data(), top_k.data(), remaining.data(),
                             stop_ids.data(), stop_offsets.data(), path ? path->mutable_data() : nullptr,
                             tokens.mutable_data(), logprobs.mutable_data(),
                             count.mutable_data(), finish.mutable_data()};
    py::gil_scoped_release release;
    sample_verify(context.isa, &context.threads, args);
  }, py::arg("logits"), py::arg("offsets"), py::arg("drafts"), py::arg("seed"), py::arg("uid"), py::arg("position"),
     py::arg("temperature"), py::arg("top_p"), py::arg("top_k"), py::arg("remaining"), py::arg("stop_ids"),
     py::arg("stop_offsets"), py::arg("tokens").noconvert(), py::arg("logprobs").noconvert(),
     py::arg("count").noconvert(), py::arg("finish").noconvert(), py::arg("context"),
     py::arg("parents") = py::none(), py::arg("path").noconvert() = py::none());
}

static void bind_context(py::module_& m) {
  py::class_<Context>(m, "Context", "Instruction set and threads that the kernels of one engine share.")
      .def(py::init([](size_t num_threads, int spin_us, const std::string& isa, bool amx) {
        require(num_threads >= 1 && num_threads <= 1024, "num_threads must be 1 to 1024");
        return std::make_unique<Context>(num_threads, spin_us, isa, amx);
      }), py::arg("num_threads"), py::arg("spin_us") = 100, py::arg("isa") = "auto", py::arg("amx") = true)
      .def_property_readonly("num_threads", [](const Context& context) { return context.threads.size(); })
      .def_property_readonly("isa", [](const Context& context) { return isa_name(context.isa); })
      .def_property_readonly("amx", [](const Context& context) { return context.units.tiles == TileUnit::kAmx; });
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
  bind_sample_verify<float, float>(m, "sample_verify");
  bind_sample_verify<int16_t, Bf16>(m, "sample_verify_bf16");
}

void bind_suffix_index(py::module_& m);  // suffix_binding.cpp
void bind_checksum(py::module_& m);      // checksum_binding.cpp
void bind_layers(py::module_& m);        // layers_binding.cpp
void bind_step(py::module_& m);          // step_binding.cpp

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels; each has its plain twin in slipstream.kernels.reference.";
  bind_context(m);
  bind_attention(m);
  bind_sampler(m);
  bind_suffix_index(m);
  bind_checksum(m);
  bind_layers(m);
  bind_step(m);
}
