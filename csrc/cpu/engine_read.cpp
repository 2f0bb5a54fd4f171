// Reading and checking a program: what the constructor accepts stays within its memory.

#include "engine_parts.h"

namespace dynexec {
namespace {

constexpr int64_t kVersion = 3;
constexpr int64_t kReduction = 512;              // floats of a reduction at a time: a panel of them stays in the L1 cache
constexpr int64_t kWinogradFloats = 160 * 1024;  // of transformed inputs and outputs at a time
constexpr int64_t kWinogradWeights = 72 * 1024;  // and of transformed weights
constexpr int64_t kMaxSize = int64_t(1) << 24;
constexpr double kInnerShare = 0.95;  // of a dilated convolution's taps: with fewer inside of the image, others are left out
constexpr int64_t kTapFloats = 128;   // at least, or the taps that are left out are too short
constexpr double kMaxFloats = 1e12;  // per sample: what all threads and samples need has to fit into an integer

}  // namespace

Program::Program(const int64_t* code, int64_t size, const float* weights, int64_t num_weights, const Kernels& kernels)
    : kernels_(kernels), weights_(weights) {
  int64_t position = 0;
  const auto next = [&](int64_t low, int64_t high, const char* what) {
    if (position >= size) fail("it ends too early");
    const int64_t value = code[position++];
    if (value < low || value > high) fail(std::string(what) + " is " + std::to_string(value));
    return value;
  };
  next(kVersion, kVersion, "version");
  next(kernels_.width, kernels_.width, "vector width");
  columns_ = next(0, kMaxSize, "number of columns");
  num_slots_ = next(1, 1 << 12, "number of slots");
  const int64_t num_phases = next(1, 1 << 20, "number of phases");
  const int64_t num_buffers = next(1, 1 << 20, "number of buffers");
  const int64_t num_steps = next(1, 1 << 20, "number of instructions");
  int64_t expected = 0;
  for (int64_t i = 0; i < num_phases; ++i) {
    Phase phase;
    phase.first = next(expected, expected, "first instruction of a phase");
    phase.end = expected = next(phase.first, num_steps, "end of a phase");
    phase.samples = next(1, kMaxGroup, "samples of a phase");
    longest_phase_ = std::max(longest_phase_, phase.samples);
    phases_.push_back(phase);
  }
  if (expected != num_steps) fail("its phases do not cover it");
  for (int64_t i = 0; i < num_buffers; ++i) {
    Buffer buffer;
    buffer.slot = next(-1, num_slots_ - 1, "slot");
    buffer.phase = next(-1, num_phases - 1, "phase of a buffer");
    buffer.channels = next(1, kMaxSize, "channels");
    buffer.pitch = next(buffer.channels, kMaxSize, "pitch");
    buffer.height = next(1, kMaxSize, "height");
    buffer.width = next(1, kMaxSize, "width");
    buffer.top = next(0, 4096, "border");
    buffer.left = next(0, 4096, "border");
    buffer.bottom = next(0, 4096, "border");
    buffer.right = next(0, 4096, "border");
    if (double(buffer.top + buffer.height + buffer.bottom) * double(buffer.row()) > 1e10) fail("a buffer is too large");
    buffers_.push_back(buffer);
  }
  for (int64_t i = 0; i < num_steps; ++i) {
    Step step;
    step.op = static_cast<Op>(next(0, static_cast<int64_t>(Op::kCount) - 1, "operation"));
    const int64_t last = step.op == Op::kGate ? kMaxSize : num_buffers - 1;
    step.in = next(-1, last, "input");
    step.out = next(-1, last, "output");
    step.other = next(-1, step.op == Op::kGate ? 1 : num_buffers - 1, "other input");
    step.weights = next(0, num_weights, "position of weights");
    step.bias = next(0, num_weights, "position of a bias");
    step.activation = static_cast<Activation>(next(0, static_cast<int64_t>(Activation::kCount) - 1, "activation"));
    for (auto* pair : {step.kernel, step.stride, step.dilation}) {
      pair[0] = next(1, 4096, "kernel, stride or dilation");
      pair[1] = next(1, 4096, "kernel, stride or dilation");
    }
    for (int64_t& padding : step.padding) padding = next(0, 4096, "padding");
    step.divisor = next(0, kMaxSize, "divisor");
    step.bands = next(0, 2, "number of instructions on bands");
    steps_.push_back(step);
  }
  if (position != size) fail("it is longer than it says");
  for (size_t p = 0; p < phases_.size(); ++p) {
    int64_t gated = 0, banded = 0;  // ends
    for (int64_t i = phases_[p].first; i < phases_[p].end; ++i) {
      Step& step = steps_[i];
      if (step.op == Op::kGate) {
        if (step.in < 0 || step.in >= columns_) fail("a gate has no column");
        if (step.other < 0) fail("a gate has no decision");
        if (i < gated || step.out <= i || step.out > phases_[p].end) fail("a gate ends nowhere");
        gated = step.out;
        if (i < banded) fail("a gate is among instructions on bands");
        continue;
      }
      for (const int64_t b : {step.in, step.out, step.other}) {
        if (b >= 0 && buffers_[b].phase >= 0 && buffers_[b].phase != static_cast<int64_t>(p)) {
          fail("a buffer is used outside its phase");
        }
      }
      check(step, i, num_weights);
      prepare(step);
      if (step.bands) {
        banded = i + step.bands + 1;
        if (banded > (i < gated ? gated : phases_[p].end)) fail("instructions on bands end nowhere");
      } else if (i >= banded) {
        for (const int64_t b : {step.in, step.out, step.other}) {
          if (b >= 0 && buffers_[b].slot < 0) fail("a buffer of some rows is used alone");
        }
      }
      int64_t* const end = step.op == Op::kLoad ? &input_ : step.op == Op::kStore ? &output_ : nullptr;
      if (!end) continue;
      if (*end >= 0) fail("it loads or stores twice");
      *end = step.op == Op::kLoad ? step.out : step.in;
    }
    for (int64_t i = phases_[p].first; i < phases_[p].end; ++i) {
      if (steps_[i].op == Op::kGate || !steps_[i].bands) continue;
      check_bands(i);
      prepare_bands(i);
      i += steps_[i].bands;
    }
  }
  if (input_ < 0 || output_ < 0) fail("it loads or stores nothing");
  if (floats() > kMaxFloats) fail("it needs too much memory");
  place_slots();
}

double Program::floats() const {
  double sum = double(scratch(1)) + double(shared_);
  for (const Buffer& buffer : buffers_) sum += double(buffer.sample());
  return sum;
}

void Program::check(const Step& step, int64_t number, int64_t num_weights) const {
  const auto require = [&](bool good, const char* what) {
    if (!good) fail("instruction " + std::to_string(number) + ": " + what);
  };
  const int64_t width = kernels_.width;
  const auto whole = [&](const Buffer& b) { return b.pitch >= round_up(b.channels, width); };
  if (step.op == Op::kLoad) return require(step.out >= 0, "no output");
  require(step.in >= 0, "no input");
  if (step.op == Op::kStore) return;
  require(step.out >= 0 && step.out != step.in, "no output, or its own input");
  const Buffer& in = buffers_[step.in];
  const Buffer& out = buffers_[step.out];
  require(whole(out), "output without whole vectors");
  const bool alone = in.slot != out.slot || in.slot < 0;
  const bool same = in.height == out.height && in.width == out.width;
  if (step.op == Op::kAdd || step.op == Op::kMultiply) {
    require(same && alone && whole(in) && in.channels <= out.channels, "input does not fit output");
    if (step.op == Op::kMultiply) require(step.other >= 0, "no factors");
    if (step.other < 0) return;
    const Buffer& other = buffers_[step.other];
    require(whole(other) && other.channels == in.channels, "channels differ");
    if (step.op == Op::kMultiply) require(other.pixels() == 1 && other.slot != out.slot, "factors are no vector");
    if (step.op == Op::kAdd) require(other.height == in.height && other.width == in.width, "sizes differ");
    if (step.op == Op::kAdd) require(step.other == step.out || other.slot != out.slot, "memory is shared");
    return;
  }
  require(alone, "input and output share memory");
  // The border must hold every tap of the first and the last pixel, but of a pooling, which leaves padding out.
  for (int d = 0; d < 2; ++d) {
    const int64_t size_in = d ? in.width : in.height, size_out = d ? out.width : out.height;
    const int64_t before = d ? in.left : in.top, after = d ? in.right : in.bottom;
    // Winograd's tiles end where the last whole one does.
    const int64_t computed = step.op == Op::kWinograd ? round_up(size_out, kWinogradTile) : size_out;
    const int64_t last = (computed - 1) * step.stride[d] - step.padding[d];
    const int64_t reach = last + (step.kernel[d] - 1) * step.dilation[d];
    if (step.op == Op::kPoolMax || step.op == Op::kPoolSum) {
      require(step.padding[d] < step.kernel[d] * step.dilation[d] && last < size_in, "a window without inputs");
      require(step.dilation[d] == 1, "a dilated pooling");
    } else {
      require(step.padding[d] <= before && reach < size_in + after, "input without enough border");
    }
  }
  const int64_t taps = step.kernel[0] * step.kernel[1];
  if (step.op == Op::kPoolMax || step.op == Op::kPoolSum) {
    require(whole(in) && in.channels == out.channels && taps <= kMaxWindow, "channels differ or window too large");
    return;
  }
  const int64_t channels = round_up(out.channels, width);
  const int64_t reduction = step.op == Op::kDepthwise ? taps : taps * in.channels;
  if (step.op == Op::kWinograd) {
    for (int d = 0; d < 2; ++d) {
      require(step.kernel[d] == 3 && step.stride[d] == 1 && step.dilation[d] == 1, "no 3x3 convolution of stride 1");
    }
    require(whole(in), "input without whole vectors");
  }
  require(step.weights + reduction * channels <= num_weights, "weights end too early");
  require(step.bias + channels <= num_weights, "bias ends too early");
  if (step.op == Op::kDepthwise) {
    require(whole(in) && in.channels == out.channels && step.other < 0, "no depthwise convolution");
  } else if (step.other >= 0) {
    const Buffer& other = buffers_[step.other];
    require(whole(other) && other.channels == out.channels, "channels differ");
    require(other.height == out.height && other.width == out.width, "sizes differ");
    require(step.other == step.out || other.slot != out.slot, "memory is shared");
  }
}

void Program::prepare(Step& step) {
  if (step.op != Op::kConv && step.op != Op::kDepthwise && step.op != Op::kWinograd) return;
  const Buffer& in = buffers_[step.in];
  step.reduction = step.kernel[0] * step.kernel[1] * in.channels;
  if (step.op == Op::kWinograd) {
    const int64_t width = kernels_.width;
    const int64_t panel = divide_channels(buffers_[step.out].channels, width).last * width;  // the widest
    step.of_tile = winograd_floats(round_up(in.channels, width)) + winograd_floats(panel);
    step.tiles = std::clamp(kWinogradFloats / step.of_tile / 12 * 12, int64_t(12), kWinogradTiles);
    step.depth = divide_up(in.channels, divide_up(in.channels * kWinogradPlanes * panel, kWinogradWeights));
    step.of_weights = kWinogradPlanes * (step.depth * panel + kWinogradGap);
    return;
  }
  // Taps beside each other are one stretch of memory where nothing lies between the pixels.
  const bool merge = step.op == Op::kConv && step.dilation[1] == 1 && in.pitch == in.channels;
  for (int64_t h = 0; h < step.kernel[0]; ++h) {
    for (int64_t w = 0; w < step.kernel[1]; ++w) {
      const int64_t offset = h * step.dilation[0] * in.row() + w * step.dilation[1] * in.pitch;
      if (step.op == Op::kDepthwise) {
        step.offsets.push_back(offset);
      } else if (merge && w > 0) {
        step.runs.back().length += in.channels;
      } else {
        step.runs.push_back({offset, in.channels});
      }
    }
  }
  if (step.op == Op::kDepthwise) return;
  find_inner_taps(step);
  const bool whole_taps = !step.row_taps.empty();  // a run is a tap then, and parts end where taps do
  const int64_t all = whole_taps ? in.channels : step.reduction;
  const int64_t length = round_up(divide_up(all, divide_up(all, kReduction)), 8);
  std::vector<Run> whole;
  whole.swap(step.runs);
  int64_t room = 0;
  for (size_t tap = 0; tap < whole.size(); ++tap) {
    Run run = whole[tap];
    if (whole_taps) room = 0;
    while (run.length > 0) {
      if (room == 0) {
        step.parts.push_back(step.runs.size());
        if (whole_taps) step.part_taps.push_back(uint64_t(1) << tap);
        room = length;
      }
      const int64_t taken = std::min(room, run.length);
      step.runs.push_back({run.offset, taken});
      run.offset += taken;
      run.length -= taken;
      room -= taken;
    }
  }
  step.parts.push_back(step.runs.size());
}

// Where a dilated convolution has many taps in the border, as DeepLab's heads have (Chen et al., 2018), the parts of its
// reduction there add nothing, and are left out.
void Program::find_inner_taps(Step& step) const {
  const Buffer& in = buffers_[step.in];
  const Buffer& out = buffers_[step.out];
  const bool dilated = step.dilation[0] > 1 && step.dilation[1] > 1;
  if (step.op != Op::kConv || !dilated || step.kernel[0] * step.kernel[1] > 64 || in.channels < kTapFloats) return;
  double share = 1;
  std::vector<uint64_t> taps[2];
  for (int d = 0; d < 2; ++d) {
    const int64_t size_in = d ? in.width : in.height, size_out = d ? out.width : out.height;
    int64_t inside = 0;
    for (int64_t o = 0; o < size_out; ++o) {
      uint64_t bits = 0;
      for (int64_t k = 0; k < step.kernel[d]; ++k) {
        const int64_t at = o * step.stride[d] - step.padding[d] + k * step.dilation[d];
        if (at < 0 || at >= size_in) continue;
        ++inside;
        for (int64_t other = 0; other < step.kernel[1 - d]; ++other) {
          bits |= uint64_t(1) << (d ? other * step.kernel[1] + k : k * step.kernel[1] + other);
        }
      }
      taps[d].push_back(bits);
    }
    share *= double(inside) / double(size_out * step.kernel[d]);
  }
  if (share >= kInnerShare) return;
  step.row_taps.swap(taps[0]);
  step.column_taps.swap(taps[1]);
}

}  // namespace dynexec
