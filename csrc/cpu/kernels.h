// The inner loops of the CPU engine, one table of functions per instruction set. Nothing of torch here.
#pragma once

#include <cstdint>

namespace dynexec {

enum class Activation : int64_t { kNone, kRelu, kRelu6, kSilu, kHardswish, kSigmoid, kCount };

// A stretch of a reduction: `length` input floats, the first one `offset` floats behind a pixel's first input.
struct Run {
  int64_t offset;
  int64_t length;
};

// Output pixels x one panel of output channels, over a part of the reduction. Pixels are read and written through
// pointers, so that they may lie anywhere: gathered samples cost nothing.
struct ConvTask {
  const float* const* in;        // [pixels]: the first input of each
  float* const* out;             // [pixels]: its channel 0
  const float* const* residual;  // [pixels]: channel 0 of what is added, or null
  int64_t pixels;
  int64_t channel;  // the panel's first
  int64_t vectors;  // of the panel, 1 to 3
  const Run* runs;
  int64_t num_runs;
  const float* weights;  // [sum of the runs' lengths][vectors * width]
  const float* bias;     // of the panel; null: go on with the sums in `out`
  Activation activation;
  int64_t length;      // of all the runs
  const float* ahead;  // as many weights, that are fetched into the cache meanwhile
};

// One row of output pixels of a depthwise convolution, some of its channels.
struct DepthwiseTask {
  const float* in;         // the first tap of the first pixel
  int64_t in_step;         // floats from one pixel's first tap to the next one's
  const int64_t* offsets;  // [taps] from a pixel's first tap
  int64_t taps;
  int64_t kernel, stride;  // width of the kernel, 0 with dilation; and stride along the row
  float* out;
  int64_t out_step;
  int64_t pixels;
  int64_t channels;      // a multiple of the width
  const float* weights;  // [taps][weight_step]
  int64_t weight_step;
  const float* bias;
  Activation activation;
};

// A 3x3 convolution of stride 1 by Winograd's F(4x4, 3x3) (Lavin and Gray, 2016, section 4.3): a tile of 4x4 output
// pixels from 36 products instead of 144. The transforms of inputs and outputs work on one tile, some channels; its 36
// planes follow each other, [36][channels]. That of the weights is done anew for every group of tiles: transformed weights
// would take 4 times the memory, and in a large network as long to fetch.
constexpr int64_t kWinogradTile = 4, kWinogradPlanes = 36;

struct WinogradWeights {
  const float* in;  // the first tap's, [9 taps][any order]
  int64_t tap;      // floats between the taps
  float* out;
  int64_t plane;  // floats between the 36 planes of the result
  int64_t count;  // floats of a tap, a multiple of the width
};

struct WinogradInput {
  const float* in;  // the tile's first input
  int64_t row, pitch;
  float* out;
  int64_t channels;  // a multiple of the width
};

struct WinogradOutput {
  const float* in;
  float* out;  // the tile's first output
  int64_t row, pitch;
  const float* residual;  // of that output, or null
  int64_t residual_row, residual_pitch;
  int64_t height, width;  // of the tile that exist
  int64_t channels;
  const float* bias;
  Activation activation;
};

// Vectors of a panel (_PANEL in dynexec/executors/weights.py); the last one of an odd number has 3, of 1 vector 1.
constexpr int64_t kPanel = 2;

// Convolutions want the floats of `channels` in whole vectors: memory behind the last one is written, as zeros.
struct Kernels {
  int64_t width;  // floats per vector
  void (*conv)(const ConvTask&);
  void (*depthwise)(const DepthwiseTask&);
  void (*winograd_weights)(const WinogradWeights&);
  void (*winograd_input)(const WinogradInput&);
  void (*winograd_output)(const WinogradOutput&);
  // out[c] = the largest of in[i][c] (NaN wins), or their sum times `scale`.
  void (*pool_max)(const float* const* in, int64_t count, float* out, int64_t channels);
  void (*pool_sum)(const float* const* in, int64_t count, float scale, float* out, int64_t channels);
  // out = activation(a + b); b may be null.
  void (*add)(const float* a, const float* b, float* out, int64_t count, Activation activation);
  // out = a * b
  void (*multiply)(const float* a, const float* b, float* out, int64_t count);
  // `rounds` times as many multiplications with addition, all in registers, as it returns: what a core can do at most.
  // `values`: 32 floats to work on, and room for the result.
  int64_t (*multiply_add)(int64_t rounds, float* values);
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace dynexec
