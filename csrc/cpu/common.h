// What the CPU ops share: rows of a tensor, allocation, errors. Stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace dynexec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

// Below this many bytes a second thread costs more than it brings.
constexpr int64_t kBytesPerThread = 64 * 1024;

// Uninitialised, on the CPU.
inline Tensor empty_strided(const Shape& sizes, const Shape& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const auto status = aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &handle);
  if (status != AOTI_TORCH_SUCCESS) throw std::bad_alloc();  // the sizes are those of a tensor: only memory can be short
  return Tensor(handle);
}

inline Shape shape_of(const Tensor& x) { return Shape(x.sizes().begin(), x.sizes().end()); }
inline Shape strides_of(const Tensor& x) { return Shape(x.strides().begin(), x.strides().end()); }

// Elements of one row, x[n].
inline int64_t row_numel(const Tensor& x) {
  int64_t numel = 1;
  for (int64_t d = 1; d < x.dim(); ++d) numel *= x.size(d);
  return numel;
}

// Whether each row is one gap-free stretch of memory, in whatever order of dimensions.
inline bool has_dense_rows(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 1; d < x.dim(); ++d) {
    if (x.size(d) != 1) dims.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether rows of a and b, of one shape, lie in memory alike.
inline bool same_row_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 1; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// [count, ...] for rows of x: strides of dense rows are kept, others become contiguous.
inline Tensor empty_rows(const Tensor& x, int64_t count, ScalarType dtype) {
  Shape sizes = shape_of(x), strides = strides_of(x);
  const bool dense = has_dense_rows(x);
  int64_t step = 1;
  for (size_t d = sizes.size() - 1; d > 0; --d) {
    if (!dense) strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  sizes[0] = count;
  strides[0] = dense ? std::max<int64_t>(row_numel(x), 1) : step;
  return empty_strided(sizes, strides, dtype);
}

inline Tensor empty_rows(const Tensor& x, int64_t count) { return empty_rows(x, count, x.scalar_type()); }

// dynexec/ops.py says what is wrong, by name; here it is only seen to that nothing is read or written out of bounds.
inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// Throws unless `rows` are `count` rows like those of x, of the same numbers.
inline void require_rows(const Tensor& x, const Tensor& rows, int64_t count, ScalarType dtype) {
  bool alike = rows.dim() == x.dim() && rows.size(0) == count && rows.scalar_type() == dtype;
  for (int64_t d = 1; alike && d < x.dim(); ++d) alike = rows.size(d) == x.size(d);
  require(alike, "rows must be as many as there are row numbers, of the other tensor's shape and dtype");
}

}  // namespace dynexec
