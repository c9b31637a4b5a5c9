// How Python describes a sparse feed-forward part to the native side; for sparse_ffn and the decoder.
#pragma once

#include <nanobind/stl/tuple.h>

#include <optional>
#include <tuple>

#include "module.hpp"
#include "sparse_ffn.hpp"

namespace lilliput {

// (format, address of the values (0: there is no such matrix), address of the grid, rows, columns, group)
using Rows = std::tuple<int, uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;
// up, address of its bias, down, address of its bias, whether there is a rectifier, its shift
using SparseRow = std::tuple<Rows, uintptr_t, Rows, uintptr_t, bool, float>;

inline RowMatrix row_matrix(const Rows& row) {
  const auto& [format, values, grid, rows, columns, group] = row;
  return {static_cast<RowFormat>(format), at<const void>(values), at<const uint16_t>(grid), rows, columns, group};
}

inline SparseFfn sparse_part(const SparseRow& row) {
  const auto& [up, up_bias, down, down_bias, rectified, shift] = row;
  std::optional<RowMatrix> above;
  if (std::get<1>(up)) above = row_matrix(up);
  return {above, at<const float>(up_bias), row_matrix(down), at<const float>(down_bias), rectified, shift};
}

}  // namespace lilliput
