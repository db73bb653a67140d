// Binds the checksums: checks shapes, releases the GIL, calls the header-only core.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "arrays.h"
#include "checksum.h"
#include "context.h"

namespace py = pybind11;
using namespace slipstream;

void bind_checksum(py::module_& m) {
  m.def("block_checksums", [](In<uint8_t> data, int64_t block_bytes, In<uint64_t> out, const std::string& isa) {
    require(block_bytes > 0, "block_bytes must be positive");
    require(out.size() == (data.size() + block_bytes - 1) / block_bytes, "out must have one entry a block");
    const Isa set = isa_by_name(isa);
    const uint8_t* bytes = data.data();
    const int64_t size = data.size();
    uint64_t* sums = out.mutable_data();
    py::gil_scoped_release release;
    for (int64_t at = 0, block = 0; at < size; at += block_bytes, ++block)
      sums[block] = block_checksum(set, bytes + at, std::min(block_bytes, size - at));
  }, py::arg("data").noconvert(), py::arg("block_bytes"), py::arg("out").noconvert(), py::arg("isa") = "auto");
}
