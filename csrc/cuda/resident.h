// A whole residual network for 32x32 images in one kernel: a block of threads, or a cluster of them, takes one sample
// through all of it. Activations stay in shared memory, the residual stream in registers too; of a dropped residual
// block not even the weights are fetched. The kernel is written against hardware.h, so the tests run it on a CPU.
//
// Networks: a 3x3 stem to 16 channels, three stages of residual blocks of two 3x3 convolutions with 16, 32 and 64
// channels at 32x32, 16x16 and 8x8 pixels, of which the second and third begin with stride 2 and the shortcut "average
// of 2x2, then channels of zeros"; the mean of all pixels and a linear layer. Smaller images, of a multiple of four
// pixels, lie in the upper left corner, and what is outside of them stays zero.
//
// Convolutions are products of 16x16 by 16x8 matrices (mma.sync): 16 pixels of a row, or 8 of two, by 8 channels, summed
// over 16 input channels at a time and nine shifts. Pixels are read by ldmatrix at any shift; the 16 bytes of 8 channels
// are permuted within a line of 128 bytes so that eight neighbouring pixels lie in different banks.
#pragma once

#include "hardware.h"

namespace dynexec::resident {

using namespace hardware;

constexpr int kThreads = 512;
constexpr int kStages = 3;
constexpr int kMaxColumns = 512;  // residual blocks of a network
constexpr int kFeatures = 64;

// Packed by dynexec/executors/resident.py. Weights: the convolutions one after the other, [channels / 8][9][inputs / 16]
// fragments of 16x8, 32 lanes x 4 values each; those of the stem for 16 inputs, of which 3 are used. All on the device.
struct Conv {
  int weights, bytes, biases;  // where they begin, in bytes and in floats
};

struct Network {
  const unsigned char* weights;
  const float* biases;
  const Conv* convs;          // the stem, then two of each block
  const float* head;          // [outputs][64]
  const float* head_biases;   // [outputs]
  int ends[kStages];          // number of the block behind the last one of each stage
  int outputs;
};

struct Batch {
  const uint16_t* images;     // Half [samples][3][size][size], at these strides in elements
  int64_t strides[4];
  int size;
  Network policy, network;
  const uint8_t* given;       // decisions [samples][blocks], without a policy
  uint8_t* decided;           // with one
  float* results;             // [samples][outputs]
  const int* order;           // of the samples, or null
};

// A stage's activations: rows of pixels with a border of zeros on all sides.
template <int STAGE>
struct Plane {
  static constexpr int kChannels = 16 << STAGE, kWidth = 32 >> STAGE;
  static constexpr int kPitch = kWidth + 8;  // pixels; a multiple of eight, so that all rows are permuted alike
  static constexpr int kPixel = 2 * kChannels, kRow = kPitch * kPixel;

  // Where 8 channels of a pixel are in its row.
  DEVICE static uint32_t at(int pixel, int chunk) {
    const int swap = STAGE == 0 ? pixel >> 2 & 1 : STAGE == 1 ? pixel >> 1 & 3 : pixel & 7;
    return pixel * kPixel + ((chunk ^ swap) << 4);
  }
};

// What a warp computes of a stage, of whose rows each block of a cluster has a part.
template <int STAGE, int BLOCKS>
struct Tile {
  using Plane = resident::Plane<STAGE>;
  static constexpr int kRows = Plane::kWidth / BLOCKS;  // of this block
  static constexpr int kChannelTiles = STAGE == 0 ? 2 : 1;  // of 8 channels
  // A product's second 8 pixels: to the right of the first ones, or, where rows are 8 wide, so many rows below.
  static constexpr int kPair = STAGE == 2 ? kRows / 2 : 0;
  static constexpr int kSpan = STAGE == 2 ? kPair : kRows;  // rows that warps share
  static constexpr int kWarpRows = STAGE == 0 ? 8 : STAGE == 1 ? 4 : 2;  // warps beside each other in the column direction
  static constexpr int kProducts = kSpan > kWarpRows ? kSpan / kWarpRows : 1;

  int row, column, channels;  // first ones: row of this block, pixel, tile of 8 channels
  int lane;

  // Made anew for every convolution: addresses that depend on it would otherwise all be computed once, and be kept in
  // more registers than there are.
  DEVICE Tile() {
    const int warp = opaque(thread()) / 32;
    lane = opaque(thread()) % 32;
    const int place = STAGE == 0 ? warp / 2 : STAGE == 1 ? warp / 4 : warp / 8;
    row = place * kProducts;
    column = STAGE == 0 ? warp % 2 * 16 : 0;
    channels = STAGE == 0 ? 0 : STAGE == 1 ? warp % 4 : warp % 8;
  }
  DEVICE bool active() const { return row < kSpan; }
};

template <class T>
using Sums = float[T::kProducts][T::kChannelTiles][4];

constexpr uint32_t kSumsAt = 0;  // [block of the cluster][2][64]
constexpr uint32_t kGatesAt = kSumsAt + 4 * 2 * kFeatures * 4;
constexpr uint32_t kStreamAt = (kGatesAt + 4 * kMaxColumns + 1023) / 1024 * 1024;
constexpr uint32_t kPlaneBytes = 34 * Plane<0>::kRow;  // the largest one
constexpr uint32_t kMiddleAt = kStreamAt + kPlaneBytes;
constexpr uint32_t kWeightsAt = kMiddleAt + kPlaneBytes;
constexpr uint32_t kWeightBytes = 9 * 64 * 64 * 2;
constexpr uint32_t kSlotBytes = kWeightBytes / 2;  // of the weights of a convolution before the third stage
constexpr uint32_t kSharedBytes = kWeightsAt + kWeightBytes;
static_assert(kSharedBytes <= 163 * 1024, "what a block may have on sm_80; on sm_86 and sm_89 it is less");

// DECIDES: a policy runs first, and its decisions are used.
template <class Half, int BLOCKS, bool DECIDES>
struct Kernel {
  const Batch& batch;

  DEVICE explicit Kernel(const Batch& batch) : batch(batch) {}

  DEVICE static void all_barrier() {
    if constexpr (BLOCKS > 1) {
      cluster_barrier();
    } else {
      barrier();
    }
  }

  // Number of this block's sample; looked up again each time, for want of a register.
  DEVICE int sample() const {
    const int turn = opaque(block()) / BLOCKS;
    return batch.order ? read(batch.order + turn) : turn;
  }

  DEVICE static int my_rank() {
    if constexpr (BLOCKS > 1) return rank();
    return 0;
  }

  DEVICE bool kept(int block) const { return load32(shared() + kGatesAt + 4 * block) != 0; }

  // Where the weights of a convolution go: not to those of the one before, but in the last stage, where they take all of
  // the memory.
  DEVICE uint32_t slot(int stage, int second) const { return shared() + kWeightsAt + (stage < 2 ? second * kSlotBytes : 0); }

  // Start to fetch the weights of the convolution `second` of a block; the stem is the second one of block -1.
  DEVICE void fetch(const Network& network, int stage, int block, int second) const {
    const Conv* const conv = network.convs + 2 * block + 1 + second;
    const unsigned char* const from = network.weights + read(&conv->weights);
    const int bytes = read(&conv->bytes);
    const uint32_t to = slot(stage, second);
    KEEP_LOOP
    for (int offset = 16 * opaque(thread()); offset < bytes; offset += 16 * kThreads) {
      copy128(to + offset, from + offset);
    }
  }

  // And of the one that follows: in the same stage, or the first one of the next stage. Where the next stage's first
  // block is dropped, that stage's entry is what calls this again.
  DEVICE void fetch_next(const Network& network, int stage, int block, int second) const {
    if (!second) {
      fetch(network, stage, block, 1);
    } else {
      const int end = network.ends[stage];
      ++block;
      while (block < end && !kept(block)) ++block;
      if (block < end) {
        fetch(network, stage, block, 0);
      } else if (stage + 1 < kStages && kept(end)) {
        fetch(network, stage + 1, end, 0);
      }
    }
    commit();
  }

  // One convolution.

  // The weights that a warp multiplies by. In the last stage they fill the memory for weights, so each thread takes its
  // own before the next ones may come; before that they are read when they are needed.
  template <class T, int INPUTS, bool TAKEN = T::Plane::kChannels == 64>
  struct Weights {
    static constexpr int kSteps = 9 * INPUTS / 16;
    uint32_t from;
    uint2 taken[TAKEN ? kSteps : 1][T::kChannelTiles];

    DEVICE Weights(const T& tile, uint32_t slot) : from(slot + tile.channels * kSteps * 256 + tile.lane * 8) {}

    DEVICE void take() {
      if constexpr (TAKEN) {
        UNROLL
        for (int step = 0; step < kSteps; ++step) {
          UNROLL
          for (int n = 0; n < T::kChannelTiles; ++n) taken[step][n] = load64(from + (n * kSteps + step) * 256);
        }
      }
    }

    DEVICE uint2 get(int step, int n) const {
      if constexpr (TAKEN) return taken[step][n];
      return load64(from + (n * kSteps + step) * 256);
    }
  };

  // Wait for the weights, and for what all threads wrote before; then fetch the next weights.
  template <class T, int INPUTS, bool TAKEN>
  DEVICE void begin(Weights<T, INPUTS, TAKEN>& weights, const T& tile, const Network& network, int stage, int block,
                    int second) const {
    wait<0>();
    all_barrier();
    if constexpr (TAKEN) {
      if (tile.active()) weights.take();
      barrier();
    }
    fetch_next(network, stage, block, second);
  }

  // sums = biases of the convolution, plus the residual stream.
  template <class T>
  DEVICE void start(Sums<T>& sums, const T& tile, const Network& network, int conv, bool add,
                    const Sums<T>& stream) const {
    const float* const biases =
        network.biases + read(&network.convs[conv].biases) + tile.channels * 8 + tile.lane % 4 * 2;
    UNROLL
    for (int n = 0; n < T::kChannelTiles; ++n) {
      const float two[2] = {read(biases + 8 * n), read(biases + 8 * n + 1)};
      UNROLL
      for (int m = 0; m < T::kProducts; ++m) {
        UNROLL
        for (int i = 0; i < 4; ++i) sums[m][n][i] = two[i % 2] + (add ? stream[m][n][i] : 0.0f);
      }
    }
  }

  template <class T, class In, int STRIDE>
  DEVICE void convolve(Sums<T>& sums, const T& tile, const Weights<T, In::kChannels>& weights, uint32_t from) const {
    constexpr int kChunks = In::kChannels / 16, kReach = STRIDE * (T::kProducts - 1) + 3;
    if (!tile.active()) return;
    const int lane = tile.lane, pixel = lane % 16;
    const int column = T::kPair ? pixel % 8 : tile.column + pixel;
    const int row = tile.row + (T::kPair ? pixel / 8 * T::kPair : 0);
    const uint32_t first = from + STRIDE * row * In::kRow;
    UNROLL
    for (int shift = 0; shift < 3; ++shift) {
      UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        uint2 factors[3][T::kChannelTiles];
        UNROLL
        for (int down = 0; down < 3; ++down) {
          UNROLL
          for (int n = 0; n < T::kChannelTiles; ++n) {
            factors[down][n] = weights.get((down * 3 + shift) * kChunks + chunk, n);
          }
        }
        const uint32_t start = first + In::at(STRIDE * column + shift, 2 * chunk + lane / 16);
        UNROLL
        for (int line = 0; line < kReach; ++line) {  // rows of pixels, each used for up to three of sums
          uint32_t pixels[4];
          load_matrices(pixels, start + line * In::kRow);
          UNROLL
          for (int down = 0; down < 3; ++down) {
            if ((line - down) % STRIDE || line < down || (line - down) / STRIDE >= T::kProducts) continue;
            UNROLL
            for (int n = 0; n < T::kChannelTiles; ++n) {
              multiply_add<Half>(sums[(line - down) / STRIDE][n], pixels, factors[down][n]);
            }
          }
        }
      }
    }
  }

  // Calls use(m, n, i, row of this block, column, channel) for every pair of sums, of channels beside each other.
  template <class T, class Use>
  DEVICE void for_pairs(const T& tile, const Use& use) const {
    if (!tile.active()) return;
    const int lane = tile.lane;
    UNROLL
    for (int m = 0; m < T::kProducts; ++m) {
      UNROLL
      for (int n = 0; n < T::kChannelTiles; ++n) {
        UNROLL
        for (int i = 0; i < 4; i += 2) {
          const int row = tile.row + m + i / 2 * T::kPair;
          const int column = tile.column + lane / 4 + (T::kPair ? 0 : 4 * i);
          use(m, n, i, row, column, (tile.channels + n) * 8 + lane % 4 * 2);
        }
      }
    }
  }

  template <class T>
  DEVICE bool inside(int row, int column) const {
    const int size = batch.size * T::Plane::kWidth / 32;
    return my_rank() * T::kRows + row < size && column < size;
  }

  template <class T>
  DEVICE void relu(Sums<T>& sums) const {
    UNROLL
    for (int m = 0; m < T::kProducts; ++m) {
      UNROLL
      for (int n = 0; n < T::kChannelTiles; ++n) {
        UNROLL
        for (int i = 0; i < 4; ++i) sums[m][n][i] = sums[m][n][i] < 0.0f ? 0.0f : sums[m][n][i];  // NaN stays
      }
    }
  }

  // Write sums to a plane, rows at a block's edge also to the border of the block beside it.
  template <class T>
  DEVICE void store(const Sums<T>& sums, const T& tile, uint32_t to) const {
    using Plane = typename T::Plane;
    for_pairs(tile, [&](int m, int n, int i, int row, int column, int channel) {
      const uint32_t both = inside<T>(row, column) ? pack<Half>(sums[m][n][i], sums[m][n][i + 1]) : 0;
      const uint32_t in_row = Plane::at(column + 1, channel / 8) + channel % 8 * 2;
      store32(to + (row + 1) * Plane::kRow + in_row, both);
      if constexpr (BLOCKS > 1) {
        const int me = my_rank();
        if (row == 0 && me > 0) store32_remote(me - 1, to + (T::kRows + 1) * Plane::kRow + in_row, both);
        if (row == T::kRows - 1 && me + 1 < BLOCKS) store32_remote(me + 1, to + in_row, both);
      }
    });
  }

  // The shortcut of a stage's first block.
  template <class T, class In>
  DEVICE void shorten(Sums<T>& stream, const T& tile, uint32_t from) const {
    for_pairs(tile, [&](int m, int n, int i, int row, int column, int channel) {
      float low = 0.0f, high = 0.0f;
      if (channel < In::kChannels) {
        UNROLL
        for (int pixel = 0; pixel < 4; ++pixel) {
          const uint32_t line = from + (2 * row + pixel / 2 + 1) * In::kRow;
          const float2 both =
              unpack<Half>(load32(line + In::at(2 * column + pixel % 2 + 1, channel / 8) + channel % 8 * 2));
          low += both.x;
          high += both.y;
        }
      }
      stream[m][n][i] = 0.25f * low;
      stream[m][n][i + 1] = 0.25f * high;
    });
  }

  template <class T>
  DEVICE void clear_pixel(uint32_t plane, int row, int column) const {
    using Plane = typename T::Plane;
    UNROLL
    for (int chunk = 0; chunk < Plane::kChannels / 8; ++chunk) {
      store128(plane + row * Plane::kRow + Plane::at(column, chunk), {0, 0, 0, 0});
    }
  }

  // Zeros around a plane, but for what the blocks beside this one write.
  template <class T>
  DEVICE void clear_borders(uint32_t plane) const {
    constexpr int kWidth = T::Plane::kWidth;
    const int me = my_rank();
    for (int row = opaque(thread()); row < T::kRows + 2; row += kThreads) {
      clear_pixel<T>(plane, row, 0);
      clear_pixel<T>(plane, row, kWidth + 1);
    }
    for (int column = 1 + opaque(thread()); column <= kWidth; column += kThreads) {
      if (me == 0) clear_pixel<T>(plane, 0, column);
      if (me == BLOCKS - 1) clear_pixel<T>(plane, T::kRows + 1, column);
    }
  }

  // The image and all of its border, as 16 channels of which 13 are zero.
  DEVICE void load_image(int sample, uint32_t plane) const {
    using T = Tile<0, BLOCKS>;
    using Plane = typename T::Plane;
    constexpr int kColumns = Plane::kWidth + 2;
    const uint16_t* const image = batch.images + sample * batch.strides[0];
    for (int pixel = opaque(thread()); pixel < (T::kRows + 2) * kColumns; pixel += kThreads) {
      const int row = pixel / kColumns, column = pixel % kColumns;
      const int y = my_rank() * T::kRows + row - 1, x = column - 1;
      uint4 values = {0, 0, 0, 0};
      if (y >= 0 && y < batch.size && x >= 0 && x < batch.size) {
        const uint16_t* const from = image + y * batch.strides[2] + x * batch.strides[3];
        const uint32_t first = read(from), second = read(from + batch.strides[1]);
        values.x = first | second << 16;
        values.y = read(from + 2 * batch.strides[1]);
      }
      store128(plane + row * Plane::kRow + Plane::at(column, 0), values);
      store128(plane + row * Plane::kRow + Plane::at(column, 1), {0, 0, 0, 0});
    }
  }

  // The blocks of a stage from one on.
  template <int STAGE>
  DEVICE void run_stage(const Network& network, int block, Sums<Tile<STAGE, BLOCKS>>& stream) const {
    using T = Tile<STAGE, BLOCKS>;
    using Plane = typename T::Plane;
    const uint32_t plane = shared() + kStreamAt, middle = shared() + kMiddleAt;
    KEEP_LOOP
    for (; block < network.ends[STAGE]; ++block) {
      if (!kept(block)) continue;
      KEEP_LOOP
      for (int second = 0; second < 2; ++second) {
        const T tile;
        Weights<T, Plane::kChannels> weights(tile, slot(STAGE, second));
        Sums<T> sums;
        begin(weights, tile, network, STAGE, block, second);
        start<T>(sums, tile, network, 2 * block + 1 + second, second, stream);
        convolve<T, Plane, 1>(sums, tile, weights, second ? middle : plane);
        relu<T>(sums);
        if (second) copy<T>(stream, sums);
        store<T>(sums, tile, second ? plane : middle);
      }
    }
  }

  template <class T>
  DEVICE void copy(Sums<T>& to, const Sums<T>& from) const {
    UNROLL
    for (int m = 0; m < T::kProducts; ++m) {
      UNROLL
      for (int n = 0; n < T::kChannelTiles; ++n) {
        UNROLL
        for (int i = 0; i < 4; ++i) to[m][n][i] = from[m][n][i];
      }
    }
  }

  // The first block of a stage but the first one: half the size, twice the channels.
  template <int STAGE>
  DEVICE void enter_stage(const Network& network, Sums<Tile<STAGE, BLOCKS>>& stream) const {
    using T = Tile<STAGE, BLOCKS>;
    using In = Plane<STAGE - 1>;
    using Out = Plane<STAGE>;
    const uint32_t plane = shared() + kStreamAt, middle = shared() + kMiddleAt;
    const int block = network.ends[STAGE - 1];
    const T tile;
    all_barrier();
    shorten<T, In>(stream, tile, plane);
    clear_borders<T>(middle);
    if (!kept(block)) {
      all_barrier();
      fetch_next(network, STAGE, block, 1);
      clear_borders<T>(plane);
      store<T>(stream, tile, plane);
      return;
    }
    Sums<T> sums;
    {
      Weights<T, In::kChannels> weights(tile, slot(STAGE, 0));
      begin(weights, tile, network, STAGE, block, 0);
      start<T>(sums, tile, network, 2 * block + 1, false, sums);
      convolve<T, In, 2>(sums, tile, weights, plane);
    }
    relu<T>(sums);
    store<T>(sums, tile, middle);
    Weights<T, Out::kChannels> weights(tile, slot(STAGE, 1));
    begin(weights, tile, network, STAGE, block, 1);
    clear_borders<T>(plane);
    start<T>(sums, tile, network, 2 * block + 2, true, stream);
    convolve<T, Out, 1>(sums, tile, weights, middle);
    relu<T>(sums);
    copy<T>(stream, sums);
    store<T>(stream, tile, plane);
  }

  // The mean of all pixels of each channel, then the linear layer; use(output, value) is called by one thread of each
  // block for each.
  template <class Use>
  DEVICE void classify(const Network& network, const Sums<Tile<2, BLOCKS>>& stream, const Use& use) const {
    using T = Tile<2, BLOCKS>;
    constexpr int kGroups = T::kSpan / T::kProducts;  // of warps with the same channels
    const T tile;
    float two[2] = {0.0f, 0.0f};
    for_pairs(tile, [&](int m, int n, int i, int row, int column, int) {
      if (!inside<T>(row, column)) return;
      two[0] += stream[m][n][i];
      two[1] += stream[m][n][i + 1];
    });
    const int lane = tile.lane;
    UNROLL
    for (int mask = 4; mask < 32; mask *= 2) {
      two[0] += shuffle_xor(two[0], mask);
      two[1] += shuffle_xor(two[1], mask);
    }
    if (tile.active() && lane < 4) {
      const int group = my_rank() * kGroups + tile.row / T::kProducts;
      UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t to = shared() + kSumsAt + 4 * (group * kFeatures + tile.channels * 8 + lane * 2 + i);
        const uint32_t bits = as_bits(two[i]);
        store32(to, bits);
        if constexpr (BLOCKS > 1) {
          for (int other = 0; other < BLOCKS; ++other) {
            if (other != my_rank()) store32_remote(other, to, bits);
          }
        }
      }
    }
    all_barrier();
    const int size = batch.size / 4;
    float features[2] = {0.0f, 0.0f};
    for (int group = 0; group < BLOCKS * kGroups; ++group) {
      UNROLL
      for (int i = 0; i < 2; ++i) {
        features[i] += as_float(load32(shared() + kSumsAt + 4 * (group * kFeatures + lane + 32 * i)));
      }
    }
    const float share = 1.0f / static_cast<float>(size * size);
    for (int output = opaque(thread()) / 32; output < network.outputs; output += kThreads / 32) {
      const float* const weights = network.head + output * kFeatures + lane;
      float sum = share * (features[0] * read(weights) + features[1] * read(weights + 32));
      UNROLL
      for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (lane == 0) use(output, sum + read(network.head_biases + output));
    }
  }

  template <bool POLICY>
  DEVICE void run_network() const {
    const Network& network = POLICY ? batch.policy : batch.network;
    const uint32_t plane = shared() + kStreamAt, middle = shared() + kMiddleAt;
    using First = Tile<0, BLOCKS>;
    all_barrier();  // whoever still reads what was there
    fetch(network, 0, -1, 1);
    commit();
    load_image(sample(), middle);
    clear_borders<First>(plane);
    Sums<Tile<1, BLOCKS>> second;
    {
      const First tile;
      Sums<First> stream;
      Weights<First, 16> weights(tile, slot(0, 1));
      begin(weights, tile, network, 0, -1, 1);
      start<First>(stream, tile, network, 0, false, stream);
      convolve<First, Plane<0>, 1>(stream, tile, weights, middle);
      relu<First>(stream);
      store<First>(stream, tile, plane);
      run_stage<0>(network, 0, stream);
    }
    enter_stage<1>(network, second);
    run_stage<1>(network, network.ends[0] + 1, second);
    Sums<Tile<2, BLOCKS>> third;
    enter_stage<2>(network, third);
    run_stage<2>(network, network.ends[1] + 1, third);
    classify(network, third, [&](int output, float value) {
      if constexpr (!POLICY) {
        if (my_rank() == 0) write(batch.results + static_cast<int64_t>(sample()) * network.outputs + output, value);
        return;
      }
      const bool keep = value >= 0.0f;  // a probability of at least one half
      store32(shared() + kGatesAt + 4 * output, keep);
      if (my_rank() == 0) {
        write(batch.decided + static_cast<int64_t>(sample()) * network.outputs + output, static_cast<uint8_t>(keep));
      }
    });
  }

  // A block, or a cluster, runs one sample. Blocks start in the order of their numbers, and a new one when one is done, so
  // with the samples that keep the most first none is left alone at the end. A loop that takes samples from a counter
  // would do the same, but around all of this the compiler finds more to keep than there are registers.
  DEVICE void run() const {
    const int columns = batch.network.ends[kStages - 1];
    for (int column = thread(); column < kMaxColumns; column += kThreads) {
      const uint8_t* const given = batch.given + static_cast<int64_t>(sample()) * columns + column;
      // A policy runs all of its blocks.
      store32(shared() + kGatesAt + 4 * column, DECIDES ? 1 : column < columns ? read(given) : 0);
    }
    if constexpr (DECIDES) run_network<true>();
    run_network<false>();
  }
};

}  // namespace dynexec::resident
