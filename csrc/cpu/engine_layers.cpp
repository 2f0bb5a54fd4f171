// What an instruction does, in pieces that the threads share.

#include <cstring>

#include "engine_parts.h"

namespace dynexec {
namespace {

constexpr int64_t kDepthwiseRows = 8;

void load_row(const Images& x, int64_t sample, int64_t row, const Buffer& b, float* to) {
  const float* from = x.data + sample * x.strides[0] + row * x.strides[2];
  if (x.strides[1] == 1) {
    for (int64_t w = 0; w < b.width; ++w) {
      std::memcpy(to + w * b.pitch, from + w * x.strides[3], b.channels * sizeof(float));
    }
  } else {
    for (int64_t c = 0; c < b.channels; ++c) {
      const float* plane = from + c * x.strides[1];
      for (int64_t w = 0; w < b.width; ++w) to[w * b.pitch + c] = plane[w * x.strides[3]];
    }
  }
  if (b.pitch == b.channels) return;
  for (int64_t w = 0; w < b.width; ++w) {
    std::memset(to + w * b.pitch + b.channels, 0, (b.pitch - b.channels) * sizeof(float));
  }
}

void store_row(const float* from, const Buffer& b, const Images& y, int64_t sample, int64_t row) {
  float* to = y.data + sample * y.strides[0] + row * y.strides[2];
  for (int64_t w = 0; w < b.width; ++w, from += b.pitch) {
    float* pixel = to + w * y.strides[3];
    if (y.strides[1] == 1) {
      std::memcpy(pixel, from, b.channels * sizeof(float));
    } else {
      for (int64_t c = 0; c < b.channels; ++c) pixel[c * y.strides[1]] = from[c];
    }
  }
}

}  // namespace

void clear_border(const Buffer& b, float* data) {
  const auto clear = [](float* from, int64_t count) { std::memset(from, 0, count * sizeof(float)); };
  clear(data, b.top * b.row());
  for (int64_t h = 0; h < b.height; ++h) {
    float* row = data + (b.top + h) * b.row();
    clear(row, b.left * b.pitch);
    clear(row + (b.left + b.width) * b.pitch, b.right * b.pitch);
  }
  clear(data + (b.top + b.height) * b.row(), b.bottom * b.row());
}

// Rows of an item: a depthwise convolution reads its inputs again for the next row, while they are in the cache.
int64_t Program::rows_at_once(const Step& step, const Frame& frame, const Buffer& out) {
  return step.op == Op::kDepthwise ? std::min(divide_up(out.height, frame.helpers), kDepthwiseRows) : 1;
}

// Samples whose borders a step clears: where it adds to something, that has been done.
int64_t Program::borders(const Step& step, const Frame& frame) const {
  return step.op != Op::kStore && buffers_[step.out].has_border() && step.out != step.other ? frame.count : 0;
}

// What a step computes, in pieces.
int64_t Program::pieces(const Step& step, const Frame& frame) const {
  if (step.op == Op::kConv) return conv_pieces(step, frame);
  if (step.op == Op::kWinograd) return winograd_pieces(step, frame);
  const Buffer& out = buffers_[step.op == Op::kStore ? step.in : step.out];
  return frame.count * divide_up(out.height, rows_at_once(step, frame, out));
}

void Program::run_step(const Step& step, Frame& frame) const {
  const int64_t count = pieces(step, frame);
  frame.share(count + borders(step, frame), [&](int64_t item) {
    if (item < count) return run_piece(step, frame, item);
    const Buffer& out = buffers_[step.out];
    clear_border(out, frame.at(out, frame.active[item - count]));
  });
}

void Program::run_piece(const Step& step, const Frame& frame, int64_t item) const {
  if (step.op == Op::kConv) return run_conv(step, frame, item);
  if (step.op == Op::kWinograd) return run_winograd(step, frame, item);
  const Buffer& out = buffers_[step.op == Op::kStore ? step.in : step.out];
  const int64_t bands = divide_up(out.height, rows_at_once(step, frame, out));
  const int64_t sample = frame.active[item / bands], row = item % bands * rows_at_once(step, frame, out);
  float* to = frame.at(out, sample) + out.origin() + row * out.row();
  const int64_t number = frame.group + frame.first + sample;  // in the batch
  switch (step.op) {
    case Op::kLoad:
      return load_row(frame.batch.x, number, row, out, to);
    case Op::kStore:
      return store_row(to, out, frame.batch.y, number, row);
    case Op::kDepthwise: {
      const Buffer& in = buffers_[step.in];
      return run_depthwise(step, {frame.at(in, sample) + in.origin(), 0}, {frame.at(out, sample) + out.origin(), 0},
                           row, std::min(out.height, row + rows_at_once(step, frame, out)));
    }
    case Op::kPoolMax:
    case Op::kPoolSum:
      return run_pool(step, frame, sample, row);
    default:
      break;
  }
  const Buffer& in = buffers_[step.in];
  const float* from = frame.at(in, sample) + in.origin() + row * in.row();
  const int64_t channels = round_up(in.channels, kernels_.width), all = round_up(out.channels, kernels_.width);
  const Buffer* other = step.other < 0 ? nullptr : &buffers_[step.other];
  const float* second = other ? frame.at(*other, sample) + other->origin() : nullptr;
  if (step.op == Op::kAdd && other) second += row * other->row();
  for (int64_t w = 0; w < out.width; ++w) {
    if (step.op == Op::kAdd) {
      kernels_.add(from + w * in.pitch, other ? second + w * other->pitch : nullptr, to + w * out.pitch, channels,
                   step.activation);
    } else {
      kernels_.multiply(from + w * in.pitch, second, to + w * out.pitch, channels);
    }
    if (all > channels) std::memset(to + w * out.pitch + channels, 0, (all - channels) * sizeof(float));
  }
}

void Program::run_pool(const Step& step, const Frame& frame, int64_t sample, int64_t row) const {
  const Buffer& in = buffers_[step.in];
  const Buffer& out = buffers_[step.out];
  const float* inputs[kMaxWindow];
  const float* image = frame.at(in, sample) + in.origin();
  float* to = frame.at(out, sample) + out.origin() + row * out.row();
  const int64_t top = row * step.stride[0] - step.padding[0];
  const int64_t channels = round_up(in.channels, kernels_.width);
  for (int64_t column = 0; column < out.width; ++column, to += out.pitch) {
    const int64_t left = column * step.stride[1] - step.padding[1];
    int64_t count = 0;
    for (int64_t h = std::max<int64_t>(top, 0); h < std::min(top + step.kernel[0], in.height); ++h) {
      for (int64_t w = std::max<int64_t>(left, 0); w < std::min(left + step.kernel[1], in.width); ++w) {
        inputs[count++] = image + h * in.row() + w * in.pitch;
      }
    }
    if (step.op == Op::kPoolMax) {
      kernels_.pool_max(inputs, count, to, channels);
    } else {
      kernels_.pool_sum(inputs, count, 1.0f / float(step.divisor ? step.divisor : count), to, channels);
    }
  }
}

}  // namespace dynexec
