// Binds checksums and block streams: checks shapes, releases the GIL, calls the header-only cores.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>

#include "arrays.h"
#include "block_stream.h"
#include "checksum.h"
#include "context.h"

namespace py = pybind11;
using namespace slipstream;

namespace {

BlockRange range_of(const In<uint8_t>& data, int64_t block_bytes, const In<uint64_t>& sums, const In<uint32_t>& stamps) {
  require(block_bytes > 0, "block_bytes must be positive");
  const BlockRange range{data.size(), block_bytes};
  require(sums.size() == range.count() && stamps.size() == range.count(), "sums and stamps must have one entry a block");
  return range;
}

}  // namespace

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
  m.def("copy_blocks", [](In<uint8_t> from, int64_t block_bytes, In<uint8_t> to, In<uint64_t> sums, In<uint32_t> stamps,
                          uint32_t stamp, const std::string& isa) {
    const BlockRange range = range_of(from, block_bytes, sums, stamps);
    require(to.size() == from.size(), "the target must be as large as the source");
    const bool aligned = to.size() == 0 || reinterpret_cast<uintptr_t>(to.data()) % 64 == 0;
    require(aligned && block_bytes % 64 == 0, "64 must divide target and blocks");
    const Isa set = isa_by_name(isa);
    const uint8_t* source = from.data();
    uint8_t* target = to.mutable_data();
    uint64_t* sum_out = sums.mutable_data();
    uint32_t* stamp_out = stamps.mutable_data();
    py::gil_scoped_release release;
    copy_blocks(set, range, source, target, sum_out, stamp_out, stamp);
  }, py::arg("source").noconvert(), py::arg("block_bytes"), py::arg("target").noconvert(), py::arg("sums").noconvert(),
     py::arg("stamps").noconvert(), py::arg("stamp"), py::arg("isa") = "auto");
  m.def("seal_blocks", [](In<uint8_t> data, int64_t block_bytes, In<uint64_t> sums, In<uint32_t> stamps, uint32_t stamp,
                          const std::string& isa) {
    const BlockRange range = range_of(data, block_bytes, sums, stamps);
    const Isa set = isa_by_name(isa);
    const uint8_t* bytes = data.data();
    uint64_t* sum_out = sums.mutable_data();
    uint32_t* stamp_out = stamps.mutable_data();
    py::gil_scoped_release release;
    copy_blocks(set, range, bytes, nullptr, sum_out, stamp_out, stamp);
  }, py::arg("data").noconvert(), py::arg("block_bytes"), py::arg("sums").noconvert(), py::arg("stamps").noconvert(),
     py::arg("stamp"), py::arg("isa") = "auto");
  m.def("follow_blocks", [](In<uint8_t> data, int64_t block_bytes, In<uint64_t> sums, In<uint32_t> stamps, uint32_t stamp,
                            bool verify, int64_t first, int64_t stripe, int64_t nth, int64_t of, int64_t block,
                            int64_t wait_us, const std::string& isa) {
    const BlockRange range = range_of(data, block_bytes, sums, stamps);
    require(stripe > 0 && of > 0, "stripe and of must be positive");
    const Isa set = isa_by_name(isa);
    const uint8_t* bytes = data.data();
    const uint64_t* sum_in = sums.data();
    const uint32_t* stamp_in = stamps.data();
    bool wrong = false;
    int64_t reached = 0;
    {
      py::gil_scoped_release release;
      reached = follow_blocks(set, range, {first, stripe, nth, of}, bytes, sum_in, stamp_in, stamp, verify, block, wait_us, wrong);
    }
    return std::make_pair(reached, wrong);
  }, py::arg("data").noconvert(), py::arg("block_bytes"), py::arg("sums").noconvert(), py::arg("stamps").noconvert(),
     py::arg("stamp"), py::arg("verify"), py::arg("first"), py::arg("stripe"), py::arg("nth"), py::arg("of"),
     py::arg("block"), py::arg("wait_us"), py::arg("isa") = "auto");
}
