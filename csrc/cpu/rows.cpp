// Moving rows: gather_rows, gather_rows_out, scatter_rows_, merge_rows, gather_passed. Meaning: dynexec/reference.py.
//
// Rows that are gap-free in memory move as flat stretches of elements, so channels_last costs nothing; anything else
// goes through a copy that is. dynexec/ops.py names what is wrong with shapes and dtypes; here they are checked once more,
// for callers of torch.ops, and row numbers, because the values are read here.

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

// Rows that take the place of others: out = relu(rows + base), less what is not asked for. `out` may be `base`.
template <class T>
struct Update {
  T* out;
  const T* base;
  const T* rows;
  uint8_t* passed;  // bools: which elements the ReLU passed, or null. As bool loops are not vectorized.
  bool add;
  bool relu;
};

// NaN passes the ReLU, as in torch.
template <bool kAdd, bool kRelu, bool kPassed, class T>
__attribute__((always_inline)) inline void update_span(const Update<T>& u, int64_t count) {
  using Value = typename Arithmetic<T>::type;
  // Of their own: a store of bytes could change those of `u`, and nothing would be vectorized.
  T* const out = u.out;
  const T* const base = u.base;
  const T* const rows = u.rows;
  uint8_t* const passed = u.passed;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    Value value = Value(rows[i]);
    if (kAdd) value += Value(base[i]);
    if (kRelu) value = value < Value(0) ? Value(0) : value;
    if (kPassed) passed[i] = value != Value(0);
    out[i] = T(value);
  }
}

template <class T>
__attribute__((always_inline)) inline void update_any(const Update<T>& u, int64_t count) {
  if (u.passed) return u.add ? update_span<true, true, true>(u, count) : update_span<false, true, true>(u, count);
  if (u.relu) return u.add ? update_span<true, true, false>(u, count) : update_span<false, true, false>(u, count);
  update_span<true, false, false>(u, count);
}

DYNEXEC_CLONES void update(const Update<float>& u, int64_t count) { update_any(u, count); }
DYNEXEC_CLONES void update(const Update<double>& u, int64_t count) { update_any(u, count); }
DYNEXEC_CLONES void update(const Update<torch::headeronly::Half>& u, int64_t count) { update_any(u, count); }
DYNEXEC_CLONES void update(const Update<torch::headeronly::BFloat16>& u, int64_t count) { update_any(u, count); }

// out = x where passed, else 0; of any numbers of this many bytes.
template <class Bits>
__attribute__((always_inline)) inline void select_span(Bits* out, const Bits* x, const uint8_t* passed, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Bits bits = x[i];  // read in any case: so the loop has no branches
    out[i] = passed[i] ? bits : Bits(0);
  }
}

DYNEXEC_CLONES void select_passed(uint16_t* out, const uint16_t* x, const uint8_t* passed, int64_t count) {
  select_span(out, x, passed, count);
}
DYNEXEC_CLONES void select_passed(uint32_t* out, const uint32_t* x, const uint8_t* passed, int64_t count) {
  select_span(out, x, passed, count);
}
DYNEXEC_CLONES void select_passed(uint64_t* out, const uint64_t* x, const uint8_t* passed, int64_t count) {
  select_span(out, x, passed, count);
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
  require(index.dim() == 1 && (index.scalar_type() == ScalarType::Long || index.scalar_type() == ScalarType::Int),
          "index must be int32 or int64 [M]");
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
  require(x.dim() > 0, "x must have at least one dimension");
  const Tensor rows = torch::stable::contiguous(index);
  const Index numbers = read_index(rows);
  numbers.check(x.size(0));
  const Tensor out = empty_rows(x, numbers.count);
  gather_dense(has_dense_rows(x) ? x : torch::stable::contiguous(x), numbers, out);
  return out;
}

void gather_rows_out(const Tensor& x, const Tensor& index, Tensor out) {
  require(x.dim() > 0 && index.dim() == 1, "x must have at least one dimension, and index one");
  require_rows(x, out, index.size(0), x.scalar_type());
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

// Calls run(write), where write(position in out, in base, in rows, length) has `length` elements take their places.
// `passed` is null or as long as `rows`, which are gap-free then.
template <class Run>
void with_update(const Tensor& out, const Tensor& base, const Tensor& rows, uint8_t* passed, bool add, bool relu,
                 const Run& run) {
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    T* target = static_cast<T*>(out.mutable_data_ptr());
    const T* before = static_cast<const T*>(base.const_data_ptr());
    const T* source = static_cast<const T*>(rows.const_data_ptr());
    run([=](int64_t to, int64_t at, int64_t from, int64_t length) {
      update(Update<T>{target + to, before + at, source + from, passed ? passed + from : nullptr, add, relu}, length);
    });
  };
  if (!add && !relu) {
    const int64_t size = rows.element_size();
    char* target = static_cast<char*>(out.mutable_data_ptr());
    const char* source = static_cast<const char*>(rows.const_data_ptr());
    return run([=](int64_t to, int64_t, int64_t from, int64_t length) {
      std::memcpy(target + to * size, source + from * size, length * size);
    });
  }
  switch (rows.scalar_type()) {
    case ScalarType::Float:
      return of_type(float{});
    case ScalarType::Double:
      return of_type(double{});
    case ScalarType::Half:
      return of_type(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return of_type(torch::headeronly::BFloat16{});
    default:
      throw std::invalid_argument("rows must be float16, bfloat16, float32 or float64 where add or relu is asked");
  }
}

// `rows`, or a copy that lies in memory like rows of `x`; with `packed`, without gaps between rows.
Tensor laid_out_as(const Tensor& x, const Tensor& rows, bool packed) {
  if (same_row_layout(x, rows) && !(packed && rows.stride(0) != row_numel(rows))) return rows;
  Tensor alike = empty_rows(x, rows.size(0), rows.scalar_type());
  torch::stable::copy_(alike, rows);
  return alike;
}

void scatter_rows_(Tensor destination, const Tensor& index, const Tensor& rows, bool add, bool relu) {
  require(destination.dim() > 0, "destination must have at least one dimension");
  const Tensor contiguous_index = torch::stable::contiguous(index);
  const Index numbers = read_index(contiguous_index);
  require_rows(destination, rows, numbers.count, destination.scalar_type());
  numbers.check(destination.size(0));
  if (rows.numel() == 0) return;  // a destination of no elements is contiguous, whatever its strides
  if (!has_dense_rows(destination)) {
    Tensor dense = torch::stable::contiguous(destination);
    scatter_rows_(dense, index, rows, add, relu);
    torch::stable::copy_(destination, dense);
    return;
  }
  check_writable_rows(destination, "destination");
  const Tensor alike = laid_out_as(destination, rows, false);
  check_disjoint(alike, "rows", destination, "destination");
  with_update(destination, destination, alike, nullptr, add, relu, [&](const auto& write) {
    for_each_span(numbers, row_numel(alike), destination.stride(0), alike.stride(0), alike.element_size(),
                  [&](int64_t to, int64_t from, int64_t length) { write(to, to, from, length); });
  });
}

// In one pass: what is not replaced is copied, and nothing else.
void merge_dense(const Tensor& out, const Tensor& rest, const Index& index, const Tensor& rows, uint8_t* passed, bool add,
                 bool relu) {
  const int64_t samples = out.size(0), numel = row_numel(out), size = out.element_size();
  std::vector<int64_t> source(samples, -1);  // which of `rows` takes the place of a row
  for (int64_t i = 0; i < index.count; ++i) source[index[i]] = i;
  char* target = static_cast<char*>(out.mutable_data_ptr());
  const char* before = static_cast<const char*>(rest.const_data_ptr());
  with_update(out, rest, rows, passed, add, relu, [&](const auto& write) {
    torch::stable::parallel_for(0, samples * numel, kBytesPerThread / size, [&](int64_t position, int64_t end) {
      while (position < end) {
        const int64_t row = position / numel, column = position % numel;
        const int64_t length = std::min((row + 1) * numel, end) - position;
        const int64_t at = row * rest.stride(0) + column;
        if (source[row] < 0) {
          std::memcpy(target + position * size, before + at * size, length * size);
        } else {
          write(position, at, source[row] * numel + column, length);
        }
        position += length;
      }
    });
  });
}

std::tuple<Tensor, Tensor> merge_rows(const Tensor& rest, const Tensor& index, const Tensor& rows, bool add,
                                      bool relu) {
  require(rest.dim() > 0, "rest must have at least one dimension");
  const Tensor contiguous_index = torch::stable::contiguous(index);
  const Index numbers = read_index(contiguous_index);
  require_rows(rest, rows, numbers.count, rest.scalar_type());
  numbers.check(rest.size(0));
  if (rest.numel() != 0 && !has_dense_rows(rest)) {  // what has no elements is contiguous without being gap-free
    Tensor output = torch::stable::clone(rest);
    auto [merged, passed] = merge_rows(torch::stable::contiguous(rest), index, rows, add, relu);
    torch::stable::copy_(output, merged);
    return {output, passed};
  }
  const Tensor output = empty_rows(rest, rest.size(0));
  const Tensor passed = relu ? empty_rows(rest, numbers.count, ScalarType::Bool)
                             : empty_strided({0}, {1}, ScalarType::Bool);
  if (output.numel() == 0) return {output, passed};
  const Tensor packed = laid_out_as(output, rows, true);
  merge_dense(output, rest, numbers, packed, relu ? static_cast<uint8_t*>(passed.mutable_data_ptr()) : nullptr, add, relu);
  return {output, passed};
}

Tensor gather_passed(const Tensor& x, const Tensor& index, const Tensor& passed) {
  require(x.dim() > 0, "x must have at least one dimension");
  const Tensor contiguous_index = torch::stable::contiguous(index);
  const Index numbers = read_index(contiguous_index);
  require_rows(x, passed, numbers.count, ScalarType::Bool);
  numbers.check(x.size(0));
  const Tensor dense = has_dense_rows(x) ? x : torch::stable::contiguous(x);
  const Tensor out = empty_rows(x, numbers.count);
  const Tensor mask = laid_out_as(out, passed, true);
  const auto of_type = [&](auto zero) {
    using Bits = decltype(zero);
    Bits* target = static_cast<Bits*>(out.mutable_data_ptr());
    const Bits* source = static_cast<const Bits*>(dense.const_data_ptr());
    const uint8_t* wanted = static_cast<const uint8_t*>(mask.const_data_ptr());
    for_each_span(numbers, row_numel(x), dense.stride(0), out.stride(0), sizeof(Bits),
                  [&](int64_t from, int64_t to, int64_t length) {
                    select_passed(target + to, source + from, wanted + to, length);
                  });
  };
  switch (x.element_size()) {
    case 2:
      of_type(uint16_t{});
      break;
    case 4:
      of_type(uint32_t{});
      break;
    case 8:
      of_type(uint64_t{});
      break;
    default:
      throw std::invalid_argument("x must be float16, bfloat16, float32 or float64");
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(dynexec, CPU, library) {
  library.impl("gather_rows", TORCH_BOX(&gather_rows));
  library.impl("gather_rows_out", TORCH_BOX(&gather_rows_out));
  library.impl("scatter_rows_", TORCH_BOX(&scatter_rows_));
  library.impl("merge_rows", TORCH_BOX(&merge_rows));
  library.impl("gather_passed", TORCH_BOX(&gather_passed));
}

}  // namespace
}  // namespace dynexec
