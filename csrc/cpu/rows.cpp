// Moving rows: gather_rows, gather_rows_out, scatter_rows_. Meaning: dynexec/reference.py.
//
// Rows that are gap-free in memory move as flat stretches of elements, so channels_last costs nothing; anything else
// goes through a copy that is. Shapes and dtypes were checked in dynexec/ops.py; row numbers are checked here, because
// the values are read here.

#include "common.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

namespace dynexec {
namespace {

// One portable binary with a version of the loop per instruction set, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define DYNEXEC_CLONES __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define DYNEXEC_CLONES
#endif

template <class T>
struct Arithmetic {
  using type = T;
};
template <>
struct Arithmetic<torch::headeronly::Half> {
  using type = float;
};
template <>
struct Arithmetic<torch::headeronly::BFloat16> {
  using type = float;
};

// destination = relu(rows + destination), less what is not asked for. NaN passes the ReLU, as in torch.
template <class T>
__attribute__((always_inline)) inline void update_span(T* destination, const T* rows, int64_t count, bool add,
                                                       bool relu) {
  using Value = typename Arithmetic<T>::type;
  const auto rectify = [](Value v) { return v < Value(0) ? Value(0) : v; };
  if (add && relu) {
    for (int64_t i = 0; i < count; ++i) destination[i] = T(rectify(Value(rows[i]) + Value(destination[i])));
  } else if (add) {
    for (int64_t i = 0; i < count; ++i) destination[i] = T(Value(rows[i]) + Value(destination[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) destination[i] = T(rectify(Value(rows[i])));
  }
}

DYNEXEC_CLONES void update(float* d, const float* r, int64_t n, bool add, bool relu) { update_span(d, r, n, add, relu); }
DYNEXEC_CLONES void update(double* d, const double* r, int64_t n, bool add, bool relu) {
  update_span(d, r, n, add, relu);
}
DYNEXEC_CLONES void update(torch::headeronly::Half* d, const torch::headeronly::Half* r, int64_t n, bool add,
                           bool relu) {
  update_span(d, r, n, add, relu);
}
DYNEXEC_CLONES void update(torch::headeronly::BFloat16* d, const torch::headeronly::BFloat16* r, int64_t n, bool add,
                           bool relu) {
  update_span(d, r, n, add, relu);
}

// Row numbers of either integer type, contiguous.
struct Index {
  const void* data;
  bool wide;
  int64_t count;

  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }

  // Throws before anything is written.
  void check(int64_t num_rows) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = (*this)[i];
      if (row < 0 || row >= num_rows) {
        throw std::out_of_range("index must be in 0.." + std::to_string(num_rows - 1) + ", got " +
                                std::to_string(row) + " at [" + std::to_string(i) + "]");
      }
    }
  }
};

Index read_index(const Tensor& index) {
  return {index.const_data_ptr(), index.scalar_type() == ScalarType::Long, index.size(0)};
}

// Call move(position in the indexed tensor, position in the packed rows, length), in elements, until each of
// index.count rows of `numel` elements is covered. Threads share the elements evenly, even within one row; neighbouring
// rows move as one stretch.
template <class Move>
void for_each_span(const Index& index, int64_t numel, int64_t indexed_stride, int64_t packed_stride,
                   int64_t element_size, const Move& move) {
  const bool gap_free = indexed_stride == numel && packed_stride == numel;
  torch::stable::parallel_for(
      0, index.count * numel, kBytesPerThread / element_size, [&](int64_t position, int64_t end) {
        while (position < end) {
          int64_t row = position / numel;
          const int64_t column = position % numel;
          const int64_t from = index[row] * indexed_stride + column;
          const int64_t to = row * packed_stride + column;
          int64_t stop = (row + 1) * numel;
          while (gap_free && stop < end && index[row + 1] == index[row] + 1) {
            ++row;
            stop += numel;
          }
          stop = std::min(stop, end);
          move(from, to, stop - position);
          position = stop;
        }
      });
}

void check_writable_rows(const Tensor& x, const char* name) {
  if (x.size(0) > 1 && x.stride(0) < row_numel(x)) {
    throw std::invalid_argument(std::string(name) + " must not have rows that overlap in memory, got stride " +
                                std::to_string(x.stride(0)) + " for rows of " + std::to_string(row_numel(x)));
  }
}

void check_disjoint(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  const auto bytes = [](const Tensor& x) {
    const int64_t elements = x.numel() == 0 ? 0 : (x.size(0) - 1) * x.stride(0) + row_numel(x);
    const char* begin = static_cast<const char*>(x.const_data_ptr());
    return std::make_pair(begin, begin + elements * static_cast<int64_t>(x.element_size()));
  };
  const auto [a_begin, a_end] = bytes(a);
  const auto [b_begin, b_end] = bytes(b);
  if (std::max(a_begin, b_begin) < std::min(a_end, b_end)) {
    throw std::invalid_argument(std::string(a_name) + " must not share memory with " + b_name);
  }
}

// x has dense rows and out has the same layout of a row.
void gather_dense(const Tensor& x, const Index& index, const Tensor& out) {
  const int64_t size = x.element_size();
  const char* source = static_cast<const char*>(x.const_data_ptr());
  char* target = static_cast<char*>(out.mutable_data_ptr());
  for_each_span(index, row_numel(x), x.stride(0), out.stride(0), size, [&](int64_t from, int64_t to, int64_t length) {
    std::memcpy(target + to * size, source + from * size, length * size);
  });
}

Tensor gather_rows(const Tensor& x, const Tensor& index) {
  const Tensor rows = torch::stable::contiguous(index);
  const Index numbers = read_index(rows);
  numbers.check(x.size(0));
  const Tensor out = empty_rows(x, numbers.count);
  gather_dense(has_dense_rows(x) ? x : torch::stable::contiguous(x), numbers, out);
  return out;
}

void gather_rows_out(const Tensor& x, const Tensor& index, Tensor out) {
  if (!has_dense_rows(x) || !same_row_layout(x, out)) {
    torch::stable::copy_(out, gather_rows(x, index));
    return;
  }
  check_writable_rows(out, "out");
  check_disjoint(out, "out", x, "x");
  const Tensor rows = torch::stable::contiguous(index);
  const Index numbers = read_index(rows);
  numbers.check(x.size(0));
  gather_dense(x, numbers, out);
}

template <class T>
void update_dense(const Tensor& destination, const Index& index, const Tensor& rows, bool add, bool relu) {
  T* target = static_cast<T*>(destination.mutable_data_ptr());
  const T* source = static_cast<const T*>(rows.const_data_ptr());
  for_each_span(index, row_numel(rows), destination.stride(0), rows.stride(0), sizeof(T),
                [&](int64_t to, int64_t from, int64_t length) {
                  update(target + to, source + from, length, add, relu);
                });
}

void replace_dense(const Tensor& destination, const Index& index, const Tensor& rows) {
  const int64_t size = rows.element_size();
  char* target = static_cast<char*>(destination.mutable_data_ptr());
  const char* source = static_cast<const char*>(rows.const_data_ptr());
  for_each_span(index, row_numel(rows), destination.stride(0), rows.stride(0), size,
                [&](int64_t to, int64_t from, int64_t length) {
                  std::memcpy(target + to * size, source + from * size, length * size);
                });
}

void scatter_dense(const Tensor& destination, const Index& index, const Tensor& rows, bool add, bool relu) {
  if (!add && !relu) {
    replace_dense(destination, index, rows);
    return;
  }
  switch (rows.scalar_type()) {
    case ScalarType::Float:
      return update_dense<float>(destination, index, rows, add, relu);
    case ScalarType::Double:
      return update_dense<double>(destination, index, rows, add, relu);
    case ScalarType::Half:
      return update_dense<torch::headeronly::Half>(destination, index, rows, add, relu);
    case ScalarType::BFloat16:
      return update_dense<torch::headeronly::BFloat16>(destination, index, rows, add, relu);
    default:
      throw std::invalid_argument("rows must be float16, bfloat16, float32 or float64 where add or relu is asked");
  }
}

void scatter_rows_(Tensor destination, const Tensor& index, const Tensor& rows, bool add, bool relu) {
  const Tensor contiguous_index = torch::stable::contiguous(index);
  const Index numbers = read_index(contiguous_index);
  numbers.check(destination.size(0));
  if (rows.numel() == 0) return;  // a destination of no elements is contiguous, whatever its strides
  if (!has_dense_rows(destination)) {
    Tensor dense = torch::stable::contiguous(destination);
    scatter_rows_(dense, index, rows, add, relu);
    torch::stable::copy_(destination, dense);
    return;
  }
  check_writable_rows(destination, "destination");
  if (same_row_layout(destination, rows)) {
    check_disjoint(rows, "rows", destination, "destination");
    scatter_dense(destination, numbers, rows, add, relu);
  } else {
    Tensor alike = empty_rows(destination, numbers.count);
    torch::stable::copy_(alike, rows);
    scatter_dense(destination, numbers, alike, add, relu);
  }
}

STABLE_TORCH_LIBRARY_IMPL(dynexec, CPU, library) {
  library.impl("gather_rows", TORCH_BOX(&gather_rows));
  library.impl("gather_rows_out", TORCH_BOX(&gather_rows_out));
  library.impl("scatter_rows_", TORCH_BOX(&scatter_rows_));
}

}  // namespace
}  // namespace dynexec
