#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dynexec {
namespace {

constexpr int64_t kVersion = 1;
constexpr int64_t kMaxGroup = 64;          // samples: their numbers are on the stack
constexpr int64_t kPixels = 192;           // of a convolution at a time: a multiple of every tile's rows
constexpr int64_t kReduction = 512;        // floats of a reduction at a time: a panel of weights stays in the L1 cache
constexpr int64_t kWinogradTiles = 48;     // at most at once; a multiple of every tile's rows
constexpr int64_t kWinogradFloats = 96 * 1024;  // of transformed inputs and outputs at a time
constexpr int64_t kDepthwiseChannels = 32;  // at a time: a multiple of every width
constexpr int64_t kDepthwiseRows = 8;
constexpr int64_t kMaxWindow = 64 * 64;    // inputs of a pooling: their pointers are on the stack
constexpr int64_t kMaxSize = int64_t(1) << 24;

// With AddressSanitizer, forbidden floats behind every slot, and NaN in memory that nothing was written to.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGap = 64;
void poison(float* from, int64_t count) { __asan_poison_memory_region(from, count * sizeof(float)); }
void unpoison(float* from, int64_t count) { __asan_unpoison_memory_region(from, count * sizeof(float)); }
void fill_with_nan(float* from, int64_t count) { std::fill(from, from + count, __builtin_nanf("")); }
#else
constexpr int64_t kGap = 0;
void poison(float*, int64_t) {}
void unpoison(float*, int64_t) {}
void fill_with_nan(float*, int64_t) {}
#endif

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("program: " + what); }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// How many items of a thread's part of a step were started; the first thread's: and how many of the step are finished.
struct alignas(64) Counter {
  std::atomic<int64_t> started{0}, done{0};
};

struct FreeMemory {
  void operator()(float* p) const { std::free(p); }
};

}  // namespace

struct Program::Memory {
  int64_t floats, counters;
  std::unique_ptr<float, FreeMemory> arena;
  std::unique_ptr<Counter[]> counter;

  Memory(int64_t floats, int64_t counters)
      : floats(floats),
        counters(counters),
        arena(static_cast<float*>(std::aligned_alloc(64, std::max<int64_t>(64, round_up(4 * floats, 64))))),
        counter(new Counter[counters]) {
    if (!arena) throw std::bad_alloc();
    fill_with_nan(arena.get(), floats);
  }
};

// Where a thread is in a call: its group, the samples of the phase that it works on, those that a gate lets through.
struct Program::Frame {
  const Batch& batch;
  const std::vector<int64_t>& slots;      // where they begin
  float* arena = nullptr;
  float* scratch = nullptr;               // of this thread
  Counter* counter = nullptr;             // of the next step; null: this thread works alone
  int64_t helpers = 1, helper = 0;        // threads that share a step, number of this one
  int64_t group = 0, group_size = 0;      // first sample and number of samples
  int64_t first = 0, size = 0;            // of the phase, within the group
  int64_t count = 0, active[kMaxGroup];   // samples of the phase

  Frame(const Batch& batch, const std::vector<int64_t>& slots) : batch(batch), slots(slots) {}

  // The sample `sample` of the phase in a buffer.
  float* at(const Buffer& buffer, int64_t sample) const {
    return arena + slots[buffer.slot] + ((buffer.phase < 0 ? first : 0) + sample) * buffer.sample();
  }

  // Do every item once, with the other threads that are at this step. Each begins with its own part of the items, which
  // is the same part of an image in all steps and in its own cache, then helps with the others'. Nobody waits for a
  // thread that has not started an item: it works as well if the threads come one after the other.
  template <class Work>
  void share(int64_t items, const Work& work) {
    if (!counter) {
      for (int64_t item = 0; item < items; ++item) work(item);
      return;
    }
    Counter* const step = counter;
    counter += helpers;
    int64_t finished = 0;
    for (int64_t turn = 0; turn < helpers; ++turn) {
      const int64_t part = (helper + turn) % helpers;
      const int64_t first = items * part / helpers, end = items * (part + 1) / helpers;
      for (int64_t item; (item = first + step[part].started.fetch_add(1, std::memory_order_relaxed)) < end; ++finished) {
        work(item);
      }
    }
    if (finished) step->done.fetch_add(finished, std::memory_order_release);
    for (int64_t spins = 0; step->done.load(std::memory_order_acquire) < items; ++spins) {
      if (spins < 4000) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }
};

Program::~Program() = default;

std::vector<const Kernels*> Program::all_kernels() {
  std::vector<const Kernels*> found = {&kGenericKernels};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2Kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found.push_back(&kAvx512Kernels);
  }
#endif
  return found;
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading a program

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
  num_slots_ = next(1, 1 << 20, "number of slots");
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
    buffer.slot = next(0, num_slots_ - 1, "slot");
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
    step.other = next(-1, num_buffers - 1, "other input");
    step.weights = next(0, num_weights, "position of weights");
    step.bias = next(0, num_weights, "position of a bias");
    step.activation = static_cast<Activation>(next(0, static_cast<int64_t>(Activation::kCount) - 1, "activation"));
    for (auto* pair : {step.kernel, step.stride, step.dilation}) {
      pair[0] = next(1, 4096, "kernel, stride or dilation");
      pair[1] = next(1, 4096, "kernel, stride or dilation");
    }
    for (int64_t& padding : step.padding) padding = next(0, 4096, "padding");
    step.divisor = next(0, kMaxSize, "divisor");
    steps_.push_back(step);
  }
  if (position != size) fail("it is longer than it says");
  for (size_t p = 0; p < phases_.size(); ++p) {
    int64_t gated = 0;
    for (int64_t i = phases_[p].first; i < phases_[p].end; ++i) {
      Step& step = steps_[i];
      if (step.op == Op::kGate) {
        if (step.in < 0 || step.in >= columns_) fail("a gate has no column");
        if (i < gated || step.out <= i || step.out > phases_[p].end) fail("a gate ends nowhere");
        gated = step.out;
        continue;
      }
      for (const int64_t b : {step.in, step.out, step.other}) {
        if (b >= 0 && buffers_[b].phase >= 0 && buffers_[b].phase != static_cast<int64_t>(p)) {
          fail("a buffer is used outside its phase");
        }
      }
      check(step, i, num_weights);
      prepare(step);
      if (step.op == Op::kLoad) input_ = step.out;
      if (step.op == Op::kStore) output_ = step.in;
    }
  }
  if (input_ < 0 || output_ < 0) fail("it loads or stores nothing");
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
  const bool alone = in.slot != out.slot;
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
  if (step.op == Op::kWinograd) require(step.divisor == 2 || step.divisor == 4, "no tile of Winograd's");
  // The border must hold every tap of the first and the last pixel, but of a pooling, which leaves padding out.
  for (int d = 0; d < 2; ++d) {
    const int64_t size_in = d ? in.width : in.height, size_out = d ? out.width : out.height;
    const int64_t before = d ? in.left : in.top, after = d ? in.right : in.bottom;
    // Winograd's tiles end where the last whole one does.
    const int64_t computed = step.op == Op::kWinograd ? round_up(size_out, step.divisor) : size_out;
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
  int64_t reduction = step.op == Op::kConv ? taps * in.channels : taps;
  if (step.op == Op::kWinograd) {
    for (int d = 0; d < 2; ++d) {
      require(step.kernel[d] == 3 && step.stride[d] == 1 && step.dilation[d] == 1, "no 3x3 convolution of stride 1");
    }
    require(whole(in), "input without whole vectors");
    reduction = winograd_planes(step.divisor) * in.channels;
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
  if (step.op == Op::kWinograd) {
    const int64_t width = kernels_.width, planes = winograd_planes(step.divisor);
    const int64_t out_channels = buffers_[step.out].channels;
    const int64_t floats = planes * (round_up(in.channels, width) + round_up(out_channels, width));
    step.tile = step.divisor;
    step.tiles = std::clamp(kWinogradFloats / floats / 12 * 12, int64_t(12), kWinogradTiles);
    scratch_ = std::max(scratch_, step.tiles * floats + 2 * planes * 16);
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
  step.reduction = step.kernel[0] * step.kernel[1] * in.channels;
  const int64_t length = round_up(divide_up(step.reduction, divide_up(step.reduction, kReduction)), 8);
  std::vector<Run> whole;
  whole.swap(step.runs);
  int64_t room = 0;
  for (Run run : whole) {
    while (run.length > 0) {
      if (room == 0) {
        step.parts.push_back(step.runs.size());
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

// ---------------------------------------------------------------------------------------------------------------------
// Running it

// Where the slots begin, for groups of that many samples, and where the last one ends.
std::vector<int64_t> Program::place_slots(int64_t group) const {
  std::vector<int64_t> begin(num_slots_ + 1, 0);
  for (const Buffer& buffer : buffers_) {
    const int64_t samples = buffer.phase < 0 ? group : std::min(group, phases_[buffer.phase].samples);
    begin[buffer.slot + 1] = std::max(begin[buffer.slot + 1], samples * buffer.sample());
  }
  for (int64_t slot = 0; slot < num_slots_; ++slot) begin[slot + 1] += begin[slot] + kGap;
  return begin;
}

int64_t Program::steps(int64_t group) const {
  int64_t steps = 0;
  for (const Phase& phase : phases_) steps += (phase.end - phase.first) * divide_up(group, phase.samples);
  return steps;
}

std::unique_ptr<Program::Memory> Program::take_memory(int64_t floats, int64_t counters) const {
  {
    const std::lock_guard lock(mutex_);
    for (auto& memory : unused_) {
      if (memory->floats >= floats && memory->counters >= counters) {
        std::swap(memory, unused_.back());
        auto taken = std::move(unused_.back());
        unused_.pop_back();
        return taken;
      }
    }
    if (!unused_.empty()) unused_.pop_back();  // the larger one takes its place
  }
  return std::make_unique<Memory>(floats, counters);
}

void Program::run(const Batch& batch, int64_t threads, int64_t group, bool together, const Parallel& parallel) const {
  if (batch.samples == 0) return;
  threads = std::max<int64_t>(threads, 1);
  together = (together || batch.samples < threads) && threads > 1;
  if (group <= 0) group = together ? longest_phase_ : std::min(longest_phase_, divide_up(batch.samples, threads));
  group = std::min({group, kMaxGroup, batch.samples});
  const int64_t groups = divide_up(batch.samples, group);
  const int64_t workers = together ? threads : std::min(threads, groups);
  const std::vector<int64_t> slots = place_slots(group);
  const int64_t arena = slots.back();
  const int64_t counters = together ? groups * steps(group) * threads : 0;
  const int64_t shared = arena * (together ? 1 : workers);
  std::unique_ptr<Memory> memory = take_memory(shared + scratch_ * workers, counters);
  unpoison(memory->arena.get(), memory->floats);
  for (int64_t a = 0; kGap && a < shared; a += arena) {
    for (int64_t slot = 1; slot <= num_slots_; ++slot) poison(memory->arena.get() + a + slots[slot] - kGap, kGap);
  }
  for (int64_t i = 0; i < counters; ++i) {
    memory->counter[i].started.store(0, std::memory_order_relaxed);
    memory->counter[i].done.store(0, std::memory_order_relaxed);
  }
  std::atomic<int64_t> next_worker{0}, next_group{0};
  const std::function<void()> work = [&] {
    const int64_t worker = next_worker.fetch_add(1);
    if (worker >= workers) return;
    Frame frame(batch, slots);
    frame.arena = memory->arena.get() + (together ? 0 : worker * arena);
    frame.scratch = memory->arena.get() + shared + worker * scratch_;
    frame.counter = together ? memory->counter.get() : nullptr;
    if (together) {
      frame.helpers = threads;
      frame.helper = worker;
    }
    for (int64_t i = 0; (i = together ? i : next_group.fetch_add(1)) < groups; ++i) {
      frame.group = i * group;
      frame.group_size = std::min(group, batch.samples - frame.group);
      run_group(frame);
    }
  };
  if (workers == 1) {
    work();
  } else {
    parallel(workers, work);
  }
  const std::lock_guard lock(mutex_);
  unused_.push_back(std::move(memory));
}

void Program::run_group(Frame& frame) const {
  for (const Phase& phase : phases_) {
    for (frame.first = 0; frame.first < frame.group_size; frame.first += phase.samples) {
      frame.size = std::min(phase.samples, frame.group_size - frame.first);
      int64_t gated = 0;
      for (int64_t i = phase.first; i < phase.end; ++i) {
        const Step& step = steps_[i];
        if (step.op == Op::kGate) {
          const uint8_t* kept = frame.batch.decisions + (frame.group + frame.first) * columns_ + step.in;
          frame.count = 0;
          for (int64_t sample = 0; sample < frame.size; ++sample) {
            if (kept[sample * columns_]) frame.active[frame.count++] = sample;
          }
          gated = step.out;
          if (frame.count == 0) i = gated - 1;
          continue;
        }
        if (i == phase.first || i == gated) {
          frame.count = frame.size;
          for (int64_t sample = 0; sample < frame.size; ++sample) frame.active[sample] = sample;
        }
        frame.share(items(step, frame), [&](int64_t item) { run_item(step, frame, item); });
      }
    }
  }
}

namespace {

// How the output channels are divided: panels of the kernels' width, but for the last one.
struct Panels {
  int64_t count, last;
};

Panels divide_channels(const Kernels& kernels, int64_t channels) {
  const int64_t vectors = divide_up(channels, kernels.width);
  // 3 vectors are no wider than two panels of 2 and 1, and faster.
  const int64_t count = kernels.panel == 2 ? std::max<int64_t>(1, vectors / 2) : divide_up(vectors, kernels.panel);
  return {count, vectors - kernels.panel * (count - 1)};
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

// The work of a step in pieces: first the borders of its output, then what it computes.
int64_t Program::items(const Step& step, const Frame& frame) const {
  if (step.op == Op::kStore) return frame.count * buffers_[step.in].height;
  const Buffer& out = buffers_[step.out];
  const int64_t borders = out.has_border() && step.out != step.other ? frame.count : 0;
  if (step.op != Op::kConv && step.op != Op::kWinograd) {
    return borders + frame.count * divide_up(out.height, rows_at_once(step, frame, out));
  }
  const int64_t panels = divide_channels(kernels_, out.channels).count;
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
    if (item < frame.count) return clear_border(out, frame.at(out, frame.active[item]));
    item -= frame.count;
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
  const Panels panels = divide_channels(kernels_, out.channels);
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
    task.vectors = panel == panels.count - 1 ? panels.last : kernels_.panel;
    task.channel = panel * kernels_.panel * kernels_.width;
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
  const Panels panels = divide_channels(kernels_, out.channels);
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
      const int64_t channel = panel * kernels_.panel * kernels_.width;
      task.vectors = panel == panels.count - 1 ? panels.last : kernels_.panel;
      task.channel = plane * out_plane + channel;
      task.weights = weights_ + step.weights + (plane * out_channels + channel) * in.channels;
      task.ahead = task.weights + in.channels * task.vectors * kernels_.width;
      kernels_.conv(task);
    }
  }

  const int64_t channel = first_panel * kernels_.panel * kernels_.width;
  const int64_t end = last_panel == panels.count ? out_channels : last_panel * kernels_.panel * kernels_.width;
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
