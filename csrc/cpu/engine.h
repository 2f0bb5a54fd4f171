// Runs a frozen network, or a part of one, as a program of convolutions on buffers that stay in the caches. No torch
// here: threads and memory come from the caller, so that the engine can be tested, and sanitized, alone.
//
// A program is made by dynexec/executors/program.py; its layout as integers is described there and read by the
// constructor, which checks everything: a program that was constructed stays within its memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"

namespace dynexec {

// An image batch outside the engine: x[n][c][h][w] is at data[n * strides[0] + c * strides[1] + ...].
struct Images {
  float* data;
  int64_t strides[4];
};

// [height][width][channels] per sample, with borders of zeros around height and width for convolutions to read.
struct Buffer {
  int64_t slot;      // buffers of one slot share memory, at different times; -1: only some of its rows exist at a time
  int64_t phase;     // that uses it, or -1: several do
  int64_t channels;
  int64_t pitch;     // floats from pixel to pixel
  int64_t height, width;
  int64_t top, left, bottom, right;

  int64_t row() const { return (left + width + right) * pitch; }
  int64_t sample() const { return ((top + height + bottom) * row() + 15) / 16 * 16; }
  int64_t origin() const { return top * row() + left * pitch; }
  int64_t pixels() const { return height * width; }
  bool has_border() const { return top + left + bottom + right > 0; }
};

enum class Op : int64_t {
  kLoad,
  kStore,
  kConv,
  kWinograd,
  kDepthwise,
  kPoolMax,
  kPoolSum,
  kAdd,
  kMultiply,
  kGate,
  kCount
};

struct Instruction {
  Op op;
  // Buffers, -1: none. kGate: the column, the first instruction behind the gated ones, the decision that passes, 0 or 1.
  int64_t in, out, other;
  int64_t weights, bias;   // positions in the weights
  Activation activation;
  int64_t kernel[2], stride[2], dilation[2], padding[2];  // height, width; padding at the top and on the left
  // kPoolSum: by what sums are divided, 0: by the number of inputs that are no padding.
  int64_t divisor;
  // How many of the next instructions run with this one on a band of rows at a time: a 1x1 convolution, a depthwise one,
  // a 1x1 one, or two of these. What lies between them, slot -1, stays in the cache.
  int64_t bands;
};

// Instructions that run for `samples` samples together, before they run for the next ones of the group.
struct Phase {
  int64_t first, end, samples;
};

// That a thread ran an instruction, with those that run with it on bands, for so many samples: when it began and ended, in
// nanoseconds since the call began. What a thread waits for others at the end of an instruction is in it.
struct Span {
  int64_t thread, instruction, samples, begin, end;
};

// Calls work() on up to `threads` threads; returns when all of them are done. Fewer threads only make it slower.
using Parallel = std::function<void(int64_t threads, const std::function<void()>& work)>;

class Program {
 public:
  // The kernels that this processor can run, the best ones last.
  static std::vector<const Kernels*> all_kernels();

  // Throws std::invalid_argument for anything that would not run. The weights must outlive the program.
  Program(const int64_t* code, int64_t size, const float* weights, int64_t num_weights, const Kernels& kernels);

  // What is read and what is written, as channels, height and width.
  const Buffer& input() const { return buffers_[input_]; }
  const Buffer& output() const { return buffers_[output_]; }
  int64_t columns() const { return columns_; }
  // What a thread with one sample needs to work in, at most.
  double floats() const;

  struct Batch {
    int64_t samples;
    Images x, y;
    const uint8_t* decisions;  // [samples][columns]
  };

  // Safe to call from several threads at once. `group`: samples that go through the program together; with
  // `together` all threads work on one group, otherwise each on its own. 0 and false: what suits the batch. `spans`: gets
  // what every thread did, thread by thread in the order of time.
  void run(const Batch& batch, int64_t threads, int64_t group, bool together, const Parallel& parallel,
           std::vector<Span>* spans = nullptr) const;

 private:
  struct Step : Instruction {
    // Of a convolution, from the geometry of its buffers.
    std::vector<Run> runs;         // of the reduction
    std::vector<int64_t> parts;    // first run of each part of it that is done at once, and their number
    // Of a dilated convolution many taps of which lie in the border: bits of the taps that a part has, and of those that
    // are inside of the image in each row and in each column of the output. Empty where no part is left out.
    std::vector<uint64_t> part_taps, row_taps, column_taps;
    std::vector<int64_t> offsets;  // of a depthwise convolution's taps
    int64_t reduction = 0;         // floats
    int64_t tiles = 0;             // Winograd's: tiles that are done at once, at most
    int64_t depth = 0;             // and input channels whose weights are transformed at once, at most
    int64_t of_tile = 0;           // scratch memory, floats, for each of these tiles
    int64_t of_weights = 0;        // and for these weights
    int64_t rows = 0;              // of a band, where bands are
  };
  struct Memory;  // of one call
  struct Frame;   // where a thread is

  // Rows of a sample's buffer, or of a part of it: pixel (row, column) is at data + (row - first) * row() + column * pitch.
  struct Rows {
    float* data;
    int64_t first;
  };
  // The instructions that run on bands from one on; where there is no such one, null.
  struct Bands {
    const Step *expand, *depthwise, *project;
    int64_t overlap;  // rows of the depthwise convolution's input that two bands beside each other share
  };

  void check(const Step& step, int64_t number, int64_t num_weights) const;
  void check_bands(int64_t number) const;
  void prepare(Step& step);
  void prepare_bands(int64_t number);
  Bands bands(int64_t number) const;
  void place_slots();
  const int64_t* slots(int64_t group) const { return &slots_[group * (num_slots_ + 1)]; }
  int64_t scratch(int64_t group) const;
  int64_t steps(int64_t group) const;
  void run_group(Frame& frame) const;
  static int64_t rows_at_once(const Step& step, const Frame& frame, const Buffer& out);
  int64_t borders(const Step& step, const Frame& frame) const;
  int64_t pieces(const Step& step, const Frame& frame) const;
  int64_t conv_pieces(const Step& step, const Frame& frame) const;
  int64_t winograd_pieces(const Step& step, const Frame& frame) const;
  void run_step(const Step& step, Frame& frame) const;
  void run_piece(const Step& step, const Frame& frame, int64_t item) const;
  void run_conv(const Step& step, const Frame& frame, int64_t item) const;
  void convolve(const Step& step, const float* const* from, float* const* to, const float* const* residual,
                int64_t count, int64_t first_panel, int64_t last_panel, uint64_t taps = ~uint64_t(0)) const;
  void find_inner_taps(Step& step) const;
  void convolve_rows(const Step& step, Rows from, Rows to, const Rows* residual, int64_t begin, int64_t end) const;
  void run_bands(int64_t number, Frame& frame) const;
  void run_stretch(const Bands& group, const Frame& frame, int64_t sample, int64_t stretch, int64_t stretches,
                   const float* shared) const;
  void expand_rows(const Step& step, const Frame& frame, int64_t sample, Rows to, int64_t begin, int64_t end) const;
  struct Tiles;
  void run_winograd(const Step& step, const Frame& frame, int64_t item) const;
  void winograd_panel(const Step& step, const Tiles& tiles, int64_t channel, int64_t vectors) const;
  void winograd_output(const Step& step, const Frame& frame, const Tiles& tiles, int64_t channel, int64_t width) const;
  void run_depthwise(const Step& step, Rows from, Rows to, int64_t begin, int64_t end) const;
  void run_pool(const Step& step, const Frame& frame, int64_t sample, int64_t row) const;

  const Kernels& kernels_;
  const float* weights_;
  int64_t columns_ = 0, input_ = -1, output_ = -1, num_slots_ = 0, longest_phase_ = 1;
  int64_t bands_ = 0, shared_ = 0;  // floats for bands: of each thread, and of each thread and sample of a group
  std::vector<Phase> phases_;
  std::vector<Buffer> buffers_;
  std::vector<Step> steps_;
  std::vector<int64_t> slots_;  // where each begins, and where the last one ends, for groups of 0, 1, ... samples

  std::shared_ptr<Memory> take_memory(int64_t floats, int64_t counters) const;
  mutable std::mutex mutex_;
  mutable std::vector<std::shared_ptr<Memory>> unused_;  // kept for the next call
};

}  // namespace dynexec
