// Instructions that run together on bands of rows: checked, prepared, run.

#include <cstring>

#include "engine_parts.h"

namespace dynexec {
namespace {

constexpr int64_t kBandFloats = 64 * 1024;  // of the rows between the instructions
constexpr int64_t kMaxRow = int64_t(1) << 40;

}  // namespace

Program::Bands Program::bands(int64_t number) const {
  const Step* step = &steps_[number];
  Bands group = {};
  if (step->op == Op::kConv) group.expand = step++;
  group.depthwise = step;
  if (step != &steps_[number + steps_[number].bands]) group.project = step + 1;
  group.overlap = std::max<int64_t>(0, (step->kernel[0] - 1) * step->dilation[0] + 1 - step->stride[0]);
  return group;
}

// The instructions were checked one by one.
void Program::check_bands(int64_t number) const {
  const auto require = [&](bool good, const char* what) {
    if (!good) fail("instructions on bands from " + std::to_string(number) + ": " + what);
  };
  const int64_t count = steps_[number].bands + 1, expands = steps_[number].op == Op::kConv;
  require(count == 2 || expands, "no such kinds");
  for (int64_t i = number; i < number + count; ++i) {
    const Step& step = steps_[i];
    require(step.op == (i == number + expands ? Op::kDepthwise : Op::kConv), "no such kinds");
    require(i == number || !step.bands, "they begin twice");
    require((buffers_[step.in].slot < 0) == (i > number) && (buffers_[step.out].slot < 0) == (i < number + count - 1),
            "wrong kind of memory");
    require(i == number || step.in == steps_[i - 1].out, "they do not follow each other");
    require(step.other < 0 || buffers_[step.other].slot >= 0, "the other input has only some rows");
    if (step.op == Op::kDepthwise) continue;
    const Buffer& in = buffers_[step.in];
    const Buffer& out = buffers_[step.out];
    require(step.kernel[0] * step.kernel[1] * step.stride[0] * step.stride[1] == 1 &&
                step.padding[0] + step.padding[1] == 0 && in.height == out.height && in.width == out.width,
            "no 1x1 convolution");
    require(i == number || !in.has_border(), "a border that nobody reads");
    require(i + 1 == number + count || step.other < 0, "something is added to some rows");
  }
  // The last one writes while the first one still reads: only behind what that has read.
  const Step& last = steps_[number + count - 1];
  const Bands group = bands(number);
  const bool behind = group.expand && group.depthwise->stride[0] == 1 && group.depthwise->padding[0] <= group.overlap;
  const bool in_place = behind && last.out == steps_[number].in;
  require(buffers_[steps_[number].in].slot != buffers_[last.out].slot || in_place, "memory is shared");
}

void Program::prepare_bands(int64_t number) {
  const Bands group = bands(number);
  const Step& depthwise = *group.depthwise;
  const Buffer& in = buffers_[depthwise.in];
  const Buffer& out = buffers_[depthwise.out];
  const int64_t in_row = group.expand ? in.row() : 0, out_row = group.project ? out.row() : 0;
  const int64_t per_row = depthwise.stride[0] * in_row + out_row;
  const int64_t rows = std::clamp<int64_t>((kBandFloats - group.overlap * in_row) / per_row, 1, out.height);
  const int64_t in_rows = rows * depthwise.stride[0] + group.overlap;
  steps_[number].rows = rows;
  bands_ = std::max(bands_, round_up(in_rows * in_row, 16) + rows * out_row);
  shared_ = std::max(shared_, round_up(group.overlap * in_row, 16));
}

// Stretches of each sample's output rows are shared by the threads; a stretch is done band by band. What two stretches
// both need of the depthwise convolution's input is made before: the last instruction may overwrite the first one's.
void Program::run_bands(int64_t number, Frame& frame) const {
  const Bands group = bands(number);
  const Step& last = group.project ? *group.project : *group.depthwise;
  const Buffer& in = buffers_[group.depthwise->in];
  const Buffer& out = buffers_[last.out];
  const int64_t stretches = std::min(frame.helpers, out.height), overlap = group.overlap;
  const int64_t shared_rows = group.expand && overlap ? stretches - 1 : 0;
  frame.share(frame.count * shared_rows, [&](int64_t item) {
    const int64_t first = out.height * (item % shared_rows + 1) / stretches;
    const int64_t row = first * group.depthwise->stride[0] - group.depthwise->padding[0];
    float* to = frame.shared + item * shared_;
    expand_rows(*group.expand, frame, frame.active[item / shared_rows], {to + in.left * in.pitch, row}, row,
                row + overlap);
  });
  frame.share(frame.count * stretches + borders(last, frame), [&](int64_t item) {
    const int64_t place = item / stretches;
    if (place >= frame.count) return clear_border(out, frame.at(out, frame.active[item - frame.count * stretches]));
    run_stretch(group, frame, frame.active[place], item % stretches, stretches,
                shared_rows ? frame.shared + place * shared_rows * shared_ : nullptr);
  });
}

void Program::run_stretch(const Bands& group, const Frame& frame, int64_t sample, int64_t stretch, int64_t stretches,
                          const float* shared) const {
  const Step& depthwise = *group.depthwise;
  const Step& first_step = group.expand ? *group.expand : depthwise;
  const Step& last = group.project ? *group.project : depthwise;
  const Buffer& in = buffers_[depthwise.in];
  const Buffer& out = buffers_[last.out];
  const int64_t stride = depthwise.stride[0], overlap = group.overlap, row_floats = in.row();
  const int64_t begin = out.height * stretch / stretches, end = out.height * (stretch + 1) / stretches;
  const Rows result = {frame.at(out, sample) + out.origin(), 0};
  float* const expanded = frame.scratch;
  float* const filtered =
      expanded + (group.expand ? round_up((first_step.rows * stride + overlap) * row_floats, 16) : 0);
  int64_t made = begin * stride - depthwise.padding[0];  // rows of the depthwise convolution's input up to here exist
  int64_t kept = made;                                   // from here on
  // Rows from here on, of which the next stretch may have overwritten the inputs, were made before.
  const int64_t limit = shared && stretch + 1 < stretches ? end * stride - depthwise.padding[0] : kMaxRow;
  if (shared && stretch > 0) {
    std::memcpy(expanded, shared + (stretch - 1) * shared_, overlap * row_floats * sizeof(float));
    made += overlap;
  }
  for (int64_t row = begin; row < end; row += first_step.rows) {
    const int64_t stop = std::min(end, row + first_step.rows);
    Rows from = {group.expand ? nullptr : frame.at(in, sample) + in.origin(), 0};
    if (group.expand) {
      from.first = row * stride - depthwise.padding[0];
      const int64_t needed = stop * stride - depthwise.padding[0] + overlap;
      if (made > from.first && from.first > kept) {
        std::memmove(expanded, expanded + (from.first - kept) * row_floats,
                     (made - from.first) * row_floats * sizeof(float));
      }
      from.data = expanded + in.left * in.pitch;
      kept = from.first;
      made = std::max(made, kept);
      expand_rows(*group.expand, frame, sample, from, made, std::min(needed, limit));
      if (const int64_t first = std::max(made, limit); first < needed) {
        std::memcpy(expanded + (first - kept) * row_floats, shared + stretch * shared_ + (first - limit) * row_floats,
                    (needed - first) * row_floats * sizeof(float));
      }
      made = needed;
    }
    const Rows to = group.project ? Rows{filtered, row} : result;
    run_depthwise(depthwise, from, to, row, stop);
    if (!group.project) continue;
    const Buffer* other = last.other < 0 ? nullptr : &buffers_[last.other];
    const Rows residual = {other ? frame.at(*other, sample) + other->origin() : nullptr, 0};
    convolve_rows(last, to, result, other ? &residual : nullptr, row, stop);
  }
}

// Rows of what a depthwise convolution reads: zeros outside the image and left and right of it.
void Program::expand_rows(const Step& step, const Frame& frame, int64_t sample, Rows to, int64_t begin,
                          int64_t end) const {
  const Buffer& in = buffers_[step.in];
  const Buffer& out = buffers_[step.out];
  for (int64_t row = begin; row < end; ++row) {
    float* line = to.data + (row - to.first) * out.row() - out.left * out.pitch;
    const bool outside = row < 0 || row >= out.height;
    std::memset(line, 0, (outside ? out.row() : out.left * out.pitch) * sizeof(float));
    if (!outside) std::memset(line + (out.left + out.width) * out.pitch, 0, out.right * out.pitch * sizeof(float));
  }
  const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, out.height);
  if (first < last) convolve_rows(step, {frame.at(in, sample) + in.origin(), 0}, to, nullptr, first, last);
}

}  // namespace dynexec
