// What both binding files say about arrays from Python.
#pragma once
#include <pybind11/numpy.h>

#include <stdexcept>

namespace slipstream {

template <typename T>
using In = pybind11::array_t<T, pybind11::array::c_style>;

inline void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

}  // namespace slipstream
