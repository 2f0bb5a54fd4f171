// What an instruction does, in items that the threads share.

#include <cstring>

#include "engine_parts.h"

namespace dynexec {
namespace {

constexpr int64_t kPixels = 192;            // of a convolution at a time: a multiple of every tile's rows
constexpr int64_t kDepthwiseChannels = 32;  // at a time: a multiple of every width
constexpr int64_t kDepthwiseRows = 8;

// How the output channels are divided into panels.
struct Panels {
  int64_t count, last;
};

Panels divide_channels(int64_t channels, int64_t width) {
  const int64_t vectors = divide_up(channels, width);
  const int64_t count = std::max<int64_t>(1, vectors / kPanel);
  return {count, vectors - kPanel * (count - 1)};
}

// How the pixels and panels of a convolution are divided among items.
struct Division {
  int64_t pixels;  // of an item
  int64_t pixel_items, panel_items;
};

Division divide_conv(int64_t pixels, int64_t panels, int64_t threads) {
  Division division = {0, divide_up(pixels, kPixels), 1};
  if (threads > 1 && division.pixel_items < 4 * threads) {
    division.panel_items = std::min(panels, 2 * threads);
    while (division.pixel_items * division.panel_items % threads && pixels / (division.pixel_items + 1) >= 24) {
      ++division.pixel_items;
    }
  }
  division.pixels = round_up(divide_up(pixels, division.pixel_items), 12);
  division.pixel_items = divide_up(pixels, division.pixels);
  return division;
}

int64_t winograd_tiles(const Buffer& out, int64_t tile) {
  return divide_up(out.height, tile) * divide_up(out.width, tile);
}

// How Winograd's tiles and panels are divided among items; every item transforms the inputs of its tiles itself.
struct TileDivision {
  int64_t tiles;  // of an item
  int64_t tile_items, panel_items;
};

TileDivision divide_winograd(int64_t tiles, int64_t most, int64_t panels, int64_t threads) {
  TileDivision division = {0, divide_up(tiles, most), 1};
  if (threads > 1 && tiles < 12 * threads && panels >= threads) {
    division.panel_items = threads;
  } else if (threads > 1) {
    division.tile_items = std::min(tiles, round_up(division.tile_items, threads));
  }
  division.tiles = divide_up(tiles, division.tile_items);
  division.tile_items = divide_up(tiles, division.tiles);
  return division;
}

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

// Rows of an item: a depthwise convolution reads its inputs again for the next row, while they are in the cache.
int64_t Program::rows_at_once(const Step& step, const Frame& frame, const Buffer& out) {
  return step.op == Op::kDepthwise ? std::min(divide_up(out.height, frame.helpers), kDepthwiseRows) : 1;
}

// The work of a step in pieces: what it computes, then the borders of its output.
int64_t Program::items(const Step& step, const Frame& frame) const {
  if (step.op == Op::kStore) return frame.count * buffers_[step.in].height;
  const Buffer& out = buffers_[step.out];
  const int64_t borders = out.has_border() && step.out != step.other ? frame.count : 0;
  if (step.op != Op::kConv && step.op != Op::kWinograd) {
    return borders + frame.count * divide_up(out.height, rows_at_once(step, frame, out));
  }
  const int64_t panels = divide_channels(out.channels, kernels_.width).count;
  if (step.op == Op::kWinograd) {
    const TileDivision division =
        divide_winograd(frame.count * winograd_tiles(out, step.tile), step.tiles, panels, frame.helpers);
    return borders + division.tile_items * division.panel_items;
  }
  const Division division = divide_conv(frame.count * out.pixels(), panels, frame.helpers);
  return borders + division.pixel_items * division.panel_items;
}

void Program::run_item(const Step& step, const Frame& frame, int64_t item) const {
  const Buffer& out = buffers_[step.op == Op::kStore ? step.in : step.out];
  if (step.op != Op::kStore && out.has_border() && step.out != step.other) {
    const int64_t border = item - (items(step, frame) - frame.count);
    if (border >= 0) return clear_border(out, frame.at(out, frame.active[border]));
  }
  if (step.op == Op::kConv) return run_conv(step, frame, item);
  if (step.op == Op::kWinograd) return run_winograd(step, frame, item);
  const int64_t bands = divide_up(out.height, rows_at_once(step, frame, out));
  const int64_t sample = frame.active[item / bands], row = item % bands * rows_at_once(step, frame, out);
  float* to = frame.at(out, sample) + out.origin() + row * out.row();
  const int64_t number = frame.group + frame.first + sample;  // in the batch
  switch (step.op) {
    case Op::kLoad:
      return load_row(frame.batch.x, number, row, out, to);
    case Op::kStore:
      return store_row(to, out, frame.batch.y, number, row);
    case Op::kDepthwise:
      return run_depthwise(step, frame, sample, row);
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

void Program::run_conv(const Step& step, const Frame& frame, int64_t item) const {
  const Buffer& in = buffers_[step.in];
  const Buffer& out = buffers_[step.out];
  const Buffer* other = step.other < 0 ? nullptr : &buffers_[step.other];
  const Panels panels = divide_channels(out.channels, kernels_.width);
  const int64_t total = frame.count * out.pixels();
  const Division division = divide_conv(total, panels.count, frame.helpers);
  const int64_t first = item % division.pixel_items * division.pixels;
  const int64_t share = item / division.pixel_items;
  const int64_t count = std::min(division.pixels, total - first);

  const float* from[kPixels + 12];
  float* to[kPixels + 12];
  const float* added[kPixels + 12];
  int64_t place = first / out.pixels(), row = first % out.pixels() / out.width, column = first % out.width;
  for (int64_t pixel = 0; pixel < count;) {
    const int64_t sample = frame.active[place];
    const float* x = frame.at(in, sample) + in.origin() + (row * step.stride[0] - step.padding[0]) * in.row() +
                     (column * step.stride[1] - step.padding[1]) * in.pitch;
    float* y = frame.at(out, sample) + out.origin() + row * out.row() + column * out.pitch;
    const int64_t end = std::min(count, pixel + out.width - column), begin = pixel;
    const int64_t x_step = step.stride[1] * in.pitch;
    for (; pixel < end; ++pixel, x += x_step, y += out.pitch) {
      from[pixel] = x;
      to[pixel] = y;
    }
    if (other && step.other != step.out) {
      const float* z = frame.at(*other, sample) + other->origin() + row * other->row() + column * other->pitch;
      for (int64_t p = begin; p < end; ++p, z += other->pitch) added[p] = z;
    }
    column = 0;
    if (++row == out.height) {
      row = 0;
      ++place;
    }
  }

  ConvTask task;
  task.in = from;
  task.out = to;
  task.residual = !other ? nullptr : (step.other == step.out ? to : added);
  task.pixels = count;
  const int64_t parts = static_cast<int64_t>(step.parts.size()) - 1;
  for (int64_t panel = panels.count * share / division.panel_items;
       panel < panels.count * (share + 1) / division.panel_items; ++panel) {
    task.vectors = panel == panels.count - 1 ? panels.last : kPanel;
    task.channel = panel * kPanel * kernels_.width;
    task.weights = weights_ + step.weights + task.channel * step.reduction;
    for (int64_t part = 0; part < parts; ++part) {
      task.runs = &step.runs[step.parts[part]];
      task.num_runs = step.parts[part + 1] - step.parts[part];
      task.bias = part == 0 ? weights_ + step.bias + task.channel : nullptr;
      task.activation = part == parts - 1 ? step.activation : Activation::kNone;
      task.length = 0;
      for (int64_t run = 0; run < task.num_runs; ++run) task.length += task.runs[run].length;
      const int64_t floats = task.length * task.vectors * kernels_.width;
      task.ahead = task.weights + floats;
      kernels_.conv(task);
      task.weights += floats;
    }
  }
}

void Program::run_winograd(const Step& step, const Frame& frame, int64_t item) const {
  const Buffer& in = buffers_[step.in];
  const Buffer& out = buffers_[step.out];
  const Buffer* other = step.other < 0 ? nullptr : &buffers_[step.other];
  const int64_t across = divide_up(out.width, step.tile), of_sample = winograd_tiles(out, step.tile);
  const int64_t planes = winograd_planes(step.tile);
  const int64_t total = frame.count * of_sample;
  const Panels panels = divide_channels(out.channels, kernels_.width);
  const TileDivision division = divide_winograd(total, step.tiles, panels.count, frame.helpers);
  const int64_t first = item % division.tile_items * division.tiles, count = std::min(division.tiles, total - first);
  const int64_t share = item / division.tile_items;
  const int64_t first_panel = panels.count * share / division.panel_items;
  const int64_t last_panel = panels.count * (share + 1) / division.panel_items;
  const int64_t in_channels = round_up(in.channels, kernels_.width);
  const int64_t out_channels = round_up(out.channels, kernels_.width);
  // 16 floats between the planes, so that they do not all fall into the same lines of the cache.
  const int64_t in_plane = count * in_channels + 16, out_plane = count * out_channels + 16;
  float* inputs = frame.scratch;
  float* outputs = inputs + planes * in_plane;

  const float* from[kWinogradTiles];
  float* to[kWinogradTiles];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tile = (first + i) % of_sample, sample = frame.active[(first + i) / of_sample];
    const int64_t row = tile / across * step.tile - step.padding[0];
    const int64_t column = tile % across * step.tile - step.padding[1];
    from[i] = inputs + i * in_channels;
    to[i] = outputs + i * out_channels;
    kernels_.winograd_input({step.tile, frame.at(in, sample) + in.origin() + row * in.row() + column * in.pitch, in.row(),
                             in.pitch, inputs + i * in_channels, in_plane, in_channels});
  }

  static const float zeros[64] = {};
  ConvTask task;
  task.in = from;
  task.out = to;
  task.residual = nullptr;
  task.pixels = count;
  task.bias = zeros;
  task.activation = Activation::kNone;
  task.num_runs = 1;
  task.length = in.channels;
  for (int64_t plane = 0; plane < planes; ++plane) {
    const Run run = {plane * in_plane, in.channels};
    task.runs = &run;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t channel = panel * kPanel * kernels_.width;
      task.vectors = panel == panels.count - 1 ? panels.last : kPanel;
      task.channel = plane * out_plane + channel;
      task.weights = weights_ + step.weights + (plane * out_channels + channel) * in.channels;
      task.ahead = task.weights + in.channels * task.vectors * kernels_.width;
      kernels_.conv(task);
    }
  }

  const int64_t channel = first_panel * kPanel * kernels_.width;
  const int64_t end = last_panel == panels.count ? out_channels : last_panel * kPanel * kernels_.width;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tile = (first + i) % of_sample, sample = frame.active[(first + i) / of_sample];
    const int64_t row = tile / across * step.tile, column = tile % across * step.tile;
    WinogradOutput output;
    output.tile = step.tile;
    output.in = to[i] + channel;
    output.plane = out_plane;
    output.out = frame.at(out, sample) + out.origin() + row * out.row() + column * out.pitch + channel;
    output.row = out.row();
    output.pitch = out.pitch;
    output.residual = nullptr;
    if (other) {
      output.residual =
          frame.at(*other, sample) + other->origin() + row * other->row() + column * other->pitch + channel;
      output.residual_row = other->row();
      output.residual_pitch = other->pitch;
    }
    output.height = std::min(step.tile, out.height - row);
    output.width = std::min(step.tile, out.width - column);
    output.channels = end - channel;
    output.bias = weights_ + step.bias + channel;
    output.activation = step.activation;
    kernels_.winograd_output(output);
  }
}

void Program::run_depthwise(const Step& step, const Frame& frame, int64_t sample, int64_t first) const {
  const Buffer& in = buffers_[step.in];
  const Buffer& out = buffers_[step.out];
  const int64_t channels = round_up(out.channels, kernels_.width);
  const int64_t end = std::min(out.height, first + rows_at_once(step, frame, out));
  const float* from = frame.at(in, sample) + in.origin() - step.padding[0] * in.row() - step.padding[1] * in.pitch;
  float* to = frame.at(out, sample) + out.origin();
  DepthwiseTask task;
  task.in_step = step.stride[1] * in.pitch;
  task.offsets = step.offsets.data();
  task.taps = step.offsets.size();
  task.kernel = step.dilation[1] == 1 ? step.kernel[1] : 0;
  task.stride = step.stride[1];
  task.out_step = out.pitch;
  task.pixels = out.width;
  task.weight_step = channels;
  task.activation = step.activation;
  for (int64_t channel = 0; channel < channels; channel += kDepthwiseChannels) {
    task.channels = std::min(kDepthwiseChannels, channels - channel);
    task.weights = weights_ + step.weights + channel;
    task.bias = weights_ + step.bias + channel;
    for (int64_t row = first; row < end; ++row) {
      task.in = from + row * step.stride[0] * in.row() + channel;
      task.out = to + row * out.row() + channel;
      kernels_.depthwise(task);
    }
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
