// plan: the samples of every block grouped by choice. Meaning: dynexec/reference.py.
//
// Two passes over the decisions [N, L], row by row as they lie in memory: count, then place. Both keep one running
// number per (block, choice), so the order inside a group is that of the samples.

#include "common.h"

#include <atomic>
#include <limits>

namespace dynexec {
namespace {

// Decisions per thread below which a second thread costs more than it brings.
constexpr int64_t kDecisionsPerThread = 32 * 1024;

// decisions: [N, L] with any strides; index: [L, N]; offset: [L, choices + 1]; all of blocks [first, last).
// Returns the place n * L + l of the first decision out of range, or the largest int64.
template <class T>
int64_t plan_blocks(const T* decisions, int64_t samples, int64_t blocks, int64_t sample_stride, int64_t block_stride,
                    int64_t choices, int64_t first, int64_t last, int32_t* index, int32_t* offset) {
  const int64_t width = choices + 1;
  std::fill(offset + first * width, offset + last * width, 0);
  for (int64_t n = 0; n < samples; ++n) {
    const T* row = decisions + n * sample_stride;
    for (int64_t l = first; l < last; ++l) {
      const auto choice = static_cast<uint64_t>(row[l * block_stride]);
      if (choice >= static_cast<uint64_t>(choices)) return n * blocks + l;
      ++offset[l * width + choice + 1];
    }
  }
  for (int64_t l = first; l < last; ++l) {
    for (int64_t c = 1; c < choices; ++c) offset[l * width + c + 1] += offset[l * width + c];
  }
  // offset[l, c] is where group c begins. Placing moves it to where the group ends, which is where c + 1 begins ...
  for (int64_t n = 0; n < samples; ++n) {
    const T* row = decisions + n * sample_stride;
    for (int64_t l = first; l < last; ++l) {
      const auto choice = static_cast<int64_t>(row[l * block_stride]);
      index[l * samples + offset[l * width + choice]++] = static_cast<int32_t>(n);
    }
  }
  // ... so one step to the right restores the borders.
  for (int64_t l = first; l < last; ++l) {
    int32_t* border = offset + l * width;
    std::copy_backward(border, border + choices, border + width);
    border[0] = 0;
  }
  return std::numeric_limits<int64_t>::max();
}

template <class T>
void plan_all(const Tensor& decisions, int64_t choices, const Tensor& index, const Tensor& offset) {
  const T* values = static_cast<const T*>(decisions.const_data_ptr());
  const int64_t samples = decisions.size(0), blocks = decisions.size(1);
  auto* index_values = static_cast<int32_t*>(index.mutable_data_ptr());
  auto* offset_values = static_cast<int32_t*>(offset.mutable_data_ptr());
  std::atomic<int64_t> wrong{std::numeric_limits<int64_t>::max()};
  const int64_t grain = std::max<int64_t>(1, kDecisionsPerThread / std::max<int64_t>(samples, 1));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    const int64_t place = plan_blocks(values, samples, blocks, decisions.stride(0), decisions.stride(1), choices,
                                      first, last, index_values, offset_values);
    int64_t smallest = wrong.load();
    while (place < smallest && !wrong.compare_exchange_weak(smallest, place)) {
    }
  });
  if (wrong != std::numeric_limits<int64_t>::max()) {
    const int64_t n = wrong / blocks, l = wrong % blocks;
    const auto value = static_cast<int64_t>(values[n * decisions.stride(0) + l * decisions.stride(1)]);
    throw std::invalid_argument("decisions must be in 0.." + std::to_string(choices - 1) + ", got " +
                                std::to_string(value) + " at [" + std::to_string(n) + ", " + std::to_string(l) + "]");
  }
}

std::tuple<Tensor, Tensor> plan(const Tensor& decisions, int64_t choices) {
  require(decisions.dim() == 2, "decisions must have two dimensions");
  require(choices >= 1 && choices < std::numeric_limits<int32_t>::max(), "choices must be from 1 to 2^31 - 2");
  const int64_t samples = decisions.size(0), blocks = decisions.size(1);
  if (samples > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("decisions must have fewer than 2^31 rows, got " + std::to_string(samples));
  }
  const Tensor index = empty_strided({blocks, samples}, {std::max<int64_t>(samples, 1), 1}, ScalarType::Int);
  const Tensor offset = empty_strided({blocks, choices + 1}, {choices + 1, 1}, ScalarType::Int);
  switch (decisions.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      plan_all<uint8_t>(decisions, choices, index, offset);
      break;
    case ScalarType::Char:
      plan_all<int8_t>(decisions, choices, index, offset);
      break;
    case ScalarType::Short:
      plan_all<int16_t>(decisions, choices, index, offset);
      break;
    case ScalarType::Int:
      plan_all<int32_t>(decisions, choices, index, offset);
      break;
    case ScalarType::Long:
      plan_all<int64_t>(decisions, choices, index, offset);
      break;
    default:
      throw std::invalid_argument("decisions must be bool or integer");
  }
  return {index, offset};
}

STABLE_TORCH_LIBRARY_IMPL(dynexec, CPU, library) { library.impl("plan", TORCH_BOX(&plan)); }

}  // namespace
}  // namespace dynexec
