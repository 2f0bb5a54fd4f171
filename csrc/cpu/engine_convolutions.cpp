// The convolutions: how they are divided among threads, and what of them the inner loops get.

#include "engine_parts.h"

namespace dynexec {
namespace {

constexpr int64_t kPixels = 192;            // of a convolution at a time: a multiple of every tile's rows
constexpr int64_t kDepthwiseChannels = 32;  // at a time: a multiple of every width

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

// The first output pixel of a tile, and which of the computed samples it is in.
struct TilePlace {
  int64_t sample, row, column;
};

TilePlace place_tile(const Buffer& out, int64_t tile) {
  const int64_t of_sample = winograd_tiles(out), across = divide_up(out.width, kWinogradTile);
  const int64_t within = tile % of_sample;
  return {tile / of_sample, within / across * kWinogradTile, within % across * kWinogradTile};
}

// How Winograd's tiles and panels are divided among items; every item transforms the inputs of its tiles and the weights
// of its panels itself.
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

}  // namespace

// Of an item of Winograd's, in the scratch memory: transformed inputs, [tiles][36][channels] with gaps, transformed
// outputs of a panel behind them, and transformed weights behind those.
struct Program::Tiles {
  int64_t first, count;
  float *inputs, *outputs;
  const float* from[kWinogradTiles];
};

int64_t Program::conv_pieces(const Step& step, const Frame& frame) const {
  const Buffer& out = buffers_[step.out];
  const int64_t panels = divide_channels(out.channels, kernels_.width).count;
  const Division division = divide_conv(frame.count * out.pixels(), panels, frame.helpers);
  return division.pixel_items * division.panel_items;
}

int64_t Program::winograd_pieces(const Step& step, const Frame& frame) const {
  const Buffer& out = buffers_[step.out];
  const int64_t panels = divide_channels(out.channels, kernels_.width).count;
  const int64_t tiles = frame.count * winograd_tiles(out);
  const TileDivision division = divide_winograd(tiles, step.tiles, panels, frame.helpers);
  return division.tile_items * division.panel_items;
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
  uint64_t taps[kPixels + 12];
  const bool leaves_out = !step.row_taps.empty();
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
    for (int64_t p = begin; leaves_out && p < end; ++p) {
      taps[p] = step.row_taps[row] & step.column_taps[column + p - begin];
    }
    column = 0;
    if (++row == out.height) {
      row = 0;
      ++place;
    }
  }

  const float* const* const residual = !other ? nullptr : (step.other == step.out ? to : added);
  const int64_t first_panel = panels.count * share / division.panel_items;
  const int64_t last_panel = panels.count * (share + 1) / division.panel_items;
  if (!leaves_out) return convolve(step, from, to, residual, count, first_panel, last_panel);
  // Pixels with the same taps inside of the image go together.
  for (int64_t done = 0; done < count;) {
    int64_t end = done;
    for (int64_t p = done; p < count; ++p) {
      if (taps[p] != taps[done]) continue;
      std::swap(from[p], from[end]);
      std::swap(to[p], to[end]);
      if (residual == added) std::swap(added[p], added[end]);
      std::swap(taps[p], taps[end++]);
    }
    convolve(step, from + done, to + done, residual ? residual + done : nullptr, end - done, first_panel, last_panel,
             taps[done]);
    done = end;
  }
}

// Pixels by pointers, at most kPixels and what rounding adds; panels of output channels from `first_panel` on; parts of
// the reduction that have one of `taps`, the others being zeros.
void Program::convolve(const Step& step, const float* const* from, float* const* to, const float* const* residual,
                       int64_t count, int64_t first_panel, int64_t last_panel, uint64_t taps) const {
  const Panels panels = divide_channels(buffers_[step.out].channels, kernels_.width);
  ConvTask task;
  task.in = from;
  task.out = to;
  task.residual = residual;
  task.pixels = count;
  const int64_t parts = static_cast<int64_t>(step.parts.size()) - 1;
  const auto counts = [&](int64_t part) { return step.part_taps.empty() || (step.part_taps[part] & taps) != 0; };
  int64_t first_part = 0, last_part = parts - 1;
  while (first_part < last_part && !counts(first_part)) ++first_part;
  while (last_part > first_part && !counts(last_part)) --last_part;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    task.vectors = panel == panels.count - 1 ? panels.last : kPanel;
    task.channel = panel * kPanel * kernels_.width;
    task.weights = weights_ + step.weights + task.channel * step.reduction;
    for (int64_t part = 0; part < parts; ++part) {
      task.runs = &step.runs[step.parts[part]];
      task.num_runs = step.parts[part + 1] - step.parts[part];
      task.bias = part == first_part ? weights_ + step.bias + task.channel : nullptr;
      task.activation = part == last_part ? step.activation : Activation::kNone;
      task.length = 0;
      for (int64_t run = 0; run < task.num_runs; ++run) task.length += task.runs[run].length;
      const int64_t floats = task.length * task.vectors * kernels_.width;
      task.ahead = task.weights + floats;
      if (part == first_part || counts(part)) kernels_.conv(task);
      task.weights += floats;
    }
  }
}

// A 1x1 convolution of stride 1 on rows of one sample.
void Program::convolve_rows(const Step& step, Rows from, Rows to, const Rows* residual, int64_t begin,
                            int64_t end) const {
  const Buffer& in = buffers_[step.in];
  const Buffer& out = buffers_[step.out];
  const float* inputs[kPixels];
  float* outputs[kPixels];
  const float* added[kPixels];
  const int64_t panels = divide_channels(out.channels, kernels_.width).count;
  for (int64_t pixel = begin * out.width; pixel < end * out.width;) {
    const int64_t count = std::min(kPixels, end * out.width - pixel);
    for (int64_t i = 0; i < count; ++i, ++pixel) {
      const int64_t row = pixel / out.width, column = pixel % out.width;
      inputs[i] = from.data + (row - from.first) * in.row() + column * in.pitch;
      outputs[i] = to.data + (row - to.first) * out.row() + column * out.pitch;
      if (residual) {
        const Buffer& other = buffers_[step.other];
        added[i] = residual->data + (row - residual->first) * other.row() + column * other.pitch;
      }
    }
    convolve(step, inputs, outputs, residual ? added : nullptr, count, 0, panels);
  }
}

// The tiles of an item: their inputs are transformed, then a panel of output channels after the other is computed.
void Program::run_winograd(const Step& step, const Frame& frame, int64_t item) const {
  const Buffer& in = buffers_[step.in];
  const Buffer& out = buffers_[step.out];
  const int64_t total = frame.count * winograd_tiles(out);
  const Panels panels = divide_channels(out.channels, kernels_.width);
  const TileDivision division = divide_winograd(total, step.tiles, panels.count, frame.helpers);
  const int64_t share = item / division.tile_items;
  const int64_t first_panel = panels.count * share / division.panel_items;
  const int64_t last_panel = panels.count * (share + 1) / division.panel_items;
  const int64_t channels = round_up(in.channels, kernels_.width), floats = winograd_floats(channels);

  Tiles tiles;
  tiles.first = item % division.tile_items * division.tiles;
  tiles.count = std::min(division.tiles, total - tiles.first);
  tiles.inputs = frame.scratch;
  tiles.outputs = tiles.inputs + tiles.count * floats;
  for (int64_t i = 0; i < tiles.count; ++i) {
    const TilePlace place = place_tile(out, tiles.first + i);
    tiles.from[i] = tiles.inputs + i * floats;
    kernels_.winograd_input({frame.at(in, frame.active[place.sample]) + in.origin() +
                                 (place.row - step.padding[0]) * in.row() + (place.column - step.padding[1]) * in.pitch,
                             in.row(), in.pitch, tiles.inputs + i * floats, channels});
  }
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t vectors = panel == panels.count - 1 ? panels.last : kPanel;
    winograd_panel(step, tiles, panel * kPanel * kernels_.width, vectors);
    winograd_output(step, frame, tiles, panel * kPanel * kernels_.width, vectors * kernels_.width);
  }
}

// The products of a panel, the `vectors` from `channel` on: weights of some input channels are transformed, then used for
// all tiles.
void Program::winograd_panel(const Step& step, const Tiles& tiles, int64_t channel, int64_t vectors) const {
  const Buffer& in = buffers_[step.in];
  const int64_t channels = round_up(in.channels, kernels_.width), width = vectors * kernels_.width;
  const int64_t floats = winograd_floats(width), tap = in.channels * width;
  float* const weights = tiles.outputs + tiles.count * floats;
  float* to[kWinogradTiles];
  for (int64_t i = 0; i < tiles.count; ++i) to[i] = tiles.outputs + i * floats;

  static const float zeros[64] = {};
  ConvTask task;
  task.in = tiles.from;
  task.out = to;
  task.residual = nullptr;
  task.pixels = tiles.count;
  task.vectors = vectors;
  task.activation = Activation::kNone;
  task.num_runs = 1;
  for (int64_t begin = 0; begin < in.channels; begin += step.depth) {
    const int64_t depth = std::min(step.depth, in.channels - begin), plane = depth * width + kWinogradGap;
    const float* const plain = weights_ + step.weights + channel * step.reduction + begin * width;
    kernels_.winograd_weights({plain, tap, weights, plane, depth * width});
    // The first products fetch the weights of the next input channels, or of the next panel; the others have nothing left
    // to fetch but what is in the cache.
    const float* const next = plain + (begin + depth < in.channels ? depth * width : 9 * tap - begin * width);
    task.bias = begin == 0 ? zeros : nullptr;
    task.length = depth;
    for (int64_t p = 0; p < kWinogradPlanes; ++p) {
      const Run run = {p * channels + begin, depth};
      task.runs = &run;
      task.channel = p * width;
      task.weights = weights + p * plane;
      task.ahead = p < 9 ? next + p * tap : task.weights;
      kernels_.conv(task);
    }
  }
}

void Program::winograd_output(const Step& step, const Frame& frame, const Tiles& tiles, int64_t channel,
                              int64_t width) const {
  const Buffer& out = buffers_[step.out];
  const Buffer* other = step.other < 0 ? nullptr : &buffers_[step.other];
  for (int64_t i = 0; i < tiles.count; ++i) {
    const auto [place, row, column] = place_tile(out, tiles.first + i);
    const int64_t sample = frame.active[place];
    WinogradOutput output;
    output.in = tiles.outputs + i * winograd_floats(width);
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
    output.height = std::min(kWinogradTile, out.height - row);
    output.width = std::min(kWinogradTile, out.width - column);
    output.channels = width;
    output.bias = weights_ + step.bias + channel;
    output.activation = step.activation;
    kernels_.winograd_output(output);
  }
}

void Program::run_depthwise(const Step& step, Rows from, Rows to, int64_t begin, int64_t end) const {
  const Buffer& in = buffers_[step.in];
  const Buffer& out = buffers_[step.out];
  const int64_t channels = round_up(out.channels, kernels_.width);
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
    for (int64_t row = begin; row < end; ++row) {
      const int64_t in_row = row * step.stride[0] - step.padding[0] - from.first;
      task.in = from.data + in_row * in.row() - step.padding[1] * in.pitch + channel;
      task.out = to.data + (row - to.first) * out.row() + channel;
      kernels_.depthwise(task);
    }
  }
}

}  // namespace dynexec
