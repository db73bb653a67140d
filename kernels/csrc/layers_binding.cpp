// Binds linear layers, norms and gates. Addresses, not arrays: a step makes hundreds of these calls, and their Python
// callers have checked what they point to.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"
#include "context.h"
#include "layers.h"
#include "linear.h"
#include "tiled_linear.h"

namespace py = pybind11;
using namespace slipstream;

// Stored: how numpy keeps T; it has no bfloat16, such arrays come as int16 of the same bits.
template <typename Layer, typename Stored, typename T>
static void bind_linear(py::module_& m, const char* name) {
  py::class_<Layer>(m, name)
      .def(py::init<int64_t, int64_t>(), py::arg("n"), py::arg("k"))
      .def("pack", [](Layer& layer, In<Stored> weight, std::optional<In<Stored>> bias) {
        require(weight.ndim() == 2 && weight.shape(0) == layer.n() && weight.shape(1) == layer.k(), "weight must be [n, k]");
        require(!bias || bias->size() == layer.n(), "bias must be [n]");
        const T* given = bias ? reinterpret_cast<const T*>(bias->data()) : nullptr;
        const T* weights = reinterpret_cast<const T*>(weight.data());
        py::gil_scoped_release release;
        layer.pack(weights, given);
      }, py::arg("weight").noconvert(), py::arg("bias").noconvert())
      .def("forward", [](const Layer& layer, uintptr_t x, int64_t rows, uintptr_t out, Context& context) {
        py::gil_scoped_release release;
        layer.forward(context.units, &context.threads, reinterpret_cast<const T*>(x), rows, reinterpret_cast<T*>(out));
      }, py::arg("x"), py::arg("rows"), py::arg("out"), py::arg("context"));
}

template <typename Layer>
static void bind_gate(py::module_& m) {
  m.def("gated_linear", [](const Layer& gate, const Layer& up, uintptr_t x, int64_t rows, uintptr_t scratch,
                           uintptr_t out, Context& context) {
    require(gate.n() == up.n() && gate.k() == up.k(), "gate and up must have one size");
    py::gil_scoped_release release;
    gated_linear(context.units, &context.threads, gate, up, reinterpret_cast<const float*>(x), rows,
                 reinterpret_cast<float*>(scratch), reinterpret_cast<float*>(out));
  }, py::arg("gate"), py::arg("up"), py::arg("x"), py::arg("rows"), py::arg("scratch"), py::arg("out"),
     py::arg("context"));
}

void bind_layers(py::module_& m) {
  bind_linear<PackedLinear<float>, float, float>(m, "PackedLinear");
  bind_linear<PackedLinear<Bf16>, int16_t, Bf16>(m, "PackedLinearBf16");
  bind_linear<TiledLinear<float>, float, float>(m, "TiledLinear");
  bind_linear<TiledLinear<Bf16>, int16_t, Bf16>(m, "TiledLinearBf16");
  bind_gate<PackedLinear<float>>(m);
  bind_gate<TiledLinear<float>>(m);
  m.def("rms_norm", [](uintptr_t x, uintptr_t weight, int64_t rows, int64_t dim, float epsilon, uintptr_t out,
                       Context& context) {
    const NormArgs args{reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(weight), rows, dim, epsilon,
                        reinterpret_cast<float*>(out)};
    py::gil_scoped_release release;
    rms_norm(context.isa, &context.threads, args);
  }, py::arg("x"), py::arg("weight"), py::arg("rows"), py::arg("dim"), py::arg("epsilon"), py::arg("out"),
     py::arg("context"));
  m.def("silu_mul", [](uintptr_t gate, uintptr_t up, uintptr_t out, int64_t size, Context& context) {
    py::gil_scoped_release release;
    silu_mul(context.isa, &context.threads, reinterpret_cast<const float*>(gate), reinterpret_cast<const float*>(up),
             reinterpret_cast<float*>(out), size);
  }, py::arg("gate"), py::arg("up"), py::arg("out"), py::arg("size"), py::arg("context"));
}
