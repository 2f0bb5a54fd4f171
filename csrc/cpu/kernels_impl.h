// The inner loops, for vectors of DYNEXEC_WIDTH floats; each source file that includes this is compiled for one
// instruction set and names its table DYNEXEC_TABLE. Everything is in an unnamed namespace and no header with functions
// that could be shared is included: one compiled for a new processor must never be linked into what runs on an old one.

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dynexec {
namespace {

constexpr int kWidth = DYNEXEC_WIDTH;
using Vector = float __attribute__((vector_size(4 * kWidth)));
using VectorAnywhere = float __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
using Integers = int32_t __attribute__((vector_size(4 * kWidth)));

inline Vector load(const float* p) { return *reinterpret_cast<const VectorAnywhere*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<VectorAnywhere*>(p) = v; }
inline Vector broadcast(float value) { return Vector{} + value; }

// e^x to two units in the last place; 0 and infinity where float32 has nothing better. NaN stays NaN.
inline Vector exponential(Vector x) {
  const Vector low = broadcast(-87.3f), high = broadcast(88.7f);
  const Vector bounded = x < low ? low : (x > high ? high : x);
  const Vector shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = (bounded * 1.44269504f + shifter) - shifter;
  const Vector r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vector finite = n == n ? n : Vector{};
  // In two steps, as 2^128 alone is no float32.
  const Integers exponent = __builtin_convertvector(finite, Integers);
  const Integers half = exponent >> 1;
  const Vector first = reinterpret_cast<Vector>((half + 127) << 23);
  const Vector second = reinterpret_cast<Vector>((exponent - half + 127) << 23);
  const Vector result = p * first * second;
  return x < low ? Vector{} : (x > high ? broadcast(__builtin_inff()) : result);
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

// max(x, low) and min(x, high), and x where that is NaN: the processors' instructions return their second operand then.
inline Vector at_least(Vector x, Vector low) {
#if defined(__x86_64__) && DYNEXEC_WIDTH == 16
  return _mm512_max_ps(low, x);
#elif defined(__x86_64__) && DYNEXEC_WIDTH == 8
  return _mm256_max_ps(low, x);
#elif defined(__x86_64__)
  return _mm_max_ps(low, x);
#else
  return x < low ? low : x;
#endif
}

inline Vector at_most(Vector x, Vector high) {
#if defined(__x86_64__) && DYNEXEC_WIDTH == 16
  return _mm512_min_ps(high, x);
#elif defined(__x86_64__) && DYNEXEC_WIDTH == 8
  return _mm256_min_ps(high, x);
#elif defined(__x86_64__)
  return _mm_min_ps(high, x);
#else
  return x > high ? high : x;
#endif
}

inline Vector relu6(Vector x) { return at_most(at_least(x, Vector{}), broadcast(6.0f)); }

// -infinity gives NaN, as in torch.
inline Vector silu(Vector x) { return x < broadcast(-87.3f) ? x * 0.0f : x * sigmoid(x); }

// The activations that take many instructions stay out of the loops that sums in registers come from.
__attribute__((noinline)) void activate_slowly(Vector* x, int count, Activation activation) {
  for (int i = 0; i < count; ++i) {
    if (activation == Activation::kSilu) x[i] = silu(x[i]);
    if (activation == Activation::kHardswish) x[i] = x[i] * (relu6(x[i] + 3.0f) * (1.0f / 6.0f));
    if (activation == Activation::kSigmoid) x[i] = sigmoid(x[i]);
  }
}

// 0, 1, ... as types.
template <int value>
struct Constant {
  constexpr operator int() const { return value; }
};

// work(0), ..., work(count - 1), unrolled before anything else is optimised: arrays that only such loops index stay in
// registers.
template <int count, int i = 0, class Work>
__attribute__((always_inline)) inline void repeat(const Work& work) {
  if constexpr (i < count) {
    work(Constant<i>{});
    repeat<count, i + 1>(work);
  }
}

// NaN passes every activation, as in torch.
template <int count>
__attribute__((always_inline)) inline void activate(Vector (&x)[count], Activation activation) {
  if (activation == Activation::kRelu) {
    repeat<count>([&](int i) __attribute__((always_inline)) { x[i] = at_least(x[i], Vector{}); });
  } else if (activation == Activation::kRelu6) {
    repeat<count>([&](int i) __attribute__((always_inline)) { x[i] = relu6(x[i]); });
  } else if (activation != Activation::kNone) {
    Vector copy[count];
    repeat<count>([&](int i) __attribute__((always_inline)) { copy[i] = x[i]; });
    activate_slowly(copy, count, activation);
    repeat<count>([&](int i) __attribute__((always_inline)) { x[i] = copy[i]; });
  }
}

// `rows` pixels x `vectors` vectors of channels, all in registers.
template <int rows, int vectors>
void conv_tile(const ConvTask& task, int64_t pixel, const char* ahead, int64_t step) {
  const float* in[rows];
  float* out[rows];
  Vector sums[rows * vectors];
  repeat<rows>([&](int p) __attribute__((always_inline)) {
    in[p] = task.in[pixel + p];
    out[p] = task.out[pixel + p] + task.channel;
  });
  if (task.bias) {
    repeat<rows * vectors>([&](int i) __attribute__((always_inline)) {
      sums[i] = load(task.bias + i % vectors * kWidth);
    });
    if (task.residual) {
      repeat<rows * vectors>([&](int i) __attribute__((always_inline)) {
        sums[i] += load(task.residual[pixel + i / vectors] + task.channel + i % vectors * kWidth);
      });
    }
  } else {
    repeat<rows * vectors>([&](int i) __attribute__((always_inline)) {
      sums[i] = load(out[i / vectors] + i % vectors * kWidth);
    });
  }
  const float* weights = task.weights;
  for (int64_t run = 0; run < task.num_runs; ++run) {
    const float* x[rows];
    repeat<rows>([&](int p) __attribute__((always_inline)) { x[p] = in[p] + task.runs[run].offset; });
    const int64_t length = task.runs[run].length;
#pragma GCC unroll 2
    for (int64_t k = 0; k < length; ++k) {
      Vector w[vectors];
      repeat<vectors>([&](int v) __attribute__((always_inline)) { w[v] = load(weights + v * kWidth); });
      weights += vectors * kWidth;
      repeat<(4 * kWidth * vectors + 63) / 64>([&](int line) __attribute__((always_inline)) {
        __builtin_prefetch(ahead + 64 * line, 0, 2);
      });
      ahead += step;
      repeat<rows>([&](int p) __attribute__((always_inline)) {
        const float value = x[p][k];
        repeat<vectors>([&](int v) __attribute__((always_inline)) { sums[p * vectors + v] += value * w[v]; });
      });
    }
  }
  activate(sums, task.activation);
  repeat<rows * vectors>([&](int i) __attribute__((always_inline)) {
    store(out[i / vectors] + i % vectors * kWidth, sums[i]);
  });
}

// A tile of any number of rows; a sum is made in the same order in every tile.
template <int rows, int vectors>
void conv_rows(const ConvTask& task, int64_t pixel, int64_t count, const char* ahead, int64_t step) {
  if constexpr (rows > 0) {
    if (count == rows) return conv_tile<rows, vectors>(task, pixel, ahead, step);
    conv_rows<rows - 1, vectors>(task, pixel, count, ahead, step);
  }
}

template <int rows, int vectors>
void conv_panel(const ConvTask& task) {
  // As few tiles as can be, of about equal size: a small one would wait for its additions.
  const int64_t tiles = (task.pixels + rows - 1) / rows;
  const char* ahead = reinterpret_cast<const char*>(task.ahead);
  const int64_t step = (4 * kWidth * vectors + tiles - 1) / tiles;
  int64_t pixel = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t end = task.pixels * (tile + 1) / tiles;
    conv_rows<rows, vectors>(task, pixel, end - pixel, ahead + tile * step * task.length, step);
    pixel = end;
  }
}

// Tiles fill the registers: with 16 of them, 12 sums, up to 3 weights and an input; with 32, 24 sums.
#if DYNEXEC_REGISTERS >= 32
constexpr int kRows2 = 12, kRows3 = 8;
#else
constexpr int kRows2 = 6, kRows3 = 4;
#endif

void conv(const ConvTask& task) {
  if (task.vectors == 1) return conv_panel<8, 1>(task);
  if (task.vectors == 2) return conv_panel<kRows2, 2>(task);
  conv_panel<kRows3, 3>(task);
}

template <int rows>
void depthwise_tile(const DepthwiseTask& task, int64_t pixel) {
  const float* in = task.in + pixel * task.in_step;
  float* out = task.out + pixel * task.out_step;
  for (int64_t channel = 0; channel < task.channels; channel += kWidth) {
    Vector sums[rows];
    const Vector bias = load(task.bias + channel);
    repeat<rows>([&](int p) __attribute__((always_inline)) { sums[p] = bias; });
    const float* weights = task.weights + channel;
    for (int64_t tap = 0; tap < task.taps; ++tap, weights += task.weight_step) {
      const Vector w = load(weights);
      const float* x = in + task.offsets[tap] + channel;
      repeat<rows>([&](int p) __attribute__((always_inline)) { sums[p] += load(x + p * task.in_step) * w; });
    }
    activate(sums, task.activation);
    repeat<rows>([&](int p) __attribute__((always_inline)) { store(out + p * task.out_step + channel, sums[p]); });
  }
}

// The same sums, with every input loaded once for all of the taps that it meets in a row of the kernel.
template <int rows, int kernel, int stride>
void depthwise_window(const DepthwiseTask& task, int64_t pixel) {
  const float* in = task.in + pixel * task.in_step;
  float* out = task.out + pixel * task.out_step;
  const int64_t pitch = task.offsets[1];
  for (int64_t channel = 0; channel < task.channels; channel += kWidth) {
    Vector sums[rows];
    const Vector bias = load(task.bias + channel);
    repeat<rows>([&](int p) __attribute__((always_inline)) { sums[p] = bias; });
    const float* weights = task.weights + channel;
    for (int64_t tap = 0; tap < task.taps; tap += kernel) {
      Vector w[kernel];
      repeat<kernel>([&](int t) __attribute__((always_inline)) {
        w[t] = load(weights);
        weights += task.weight_step;
      });
      const float* x = in + task.offsets[tap] + channel;
      repeat<(rows - 1) * stride + kernel>([&](int i) __attribute__((always_inline)) {
        const Vector value = load(x);
        x += pitch;
        repeat<rows>([&](int p) __attribute__((always_inline)) {
          const int t = i - p * stride;
          if (t >= 0 && t < kernel) sums[p] += value * w[t];
        });
      });
    }
    activate(sums, task.activation);
    repeat<rows>([&](int p) __attribute__((always_inline)) { store(out + p * task.out_step + channel, sums[p]); });
  }
}

void depthwise(const DepthwiseTask& task) {
  using Tile = void (*)(const DepthwiseTask&, int64_t);
  Tile tile = depthwise_tile<7>;
  if (task.kernel == 3 && task.stride == 1) tile = depthwise_window<7, 3, 1>;
  if (task.kernel == 3 && task.stride == 2) tile = depthwise_window<7, 3, 2>;
  if (task.kernel == 5 && task.stride == 1) tile = depthwise_window<7, 5, 1>;
  if (task.kernel == 5 && task.stride == 2) tile = depthwise_window<7, 5, 2>;
  int64_t pixel = 0;
  for (; pixel + 7 <= task.pixels; pixel += 7) tile(task, pixel);
  for (; pixel + 3 <= task.pixels; pixel += 3) depthwise_tile<3>(task, pixel);
  for (; pixel < task.pixels; ++pixel) depthwise_tile<1>(task, pixel);
}

// One dimension of the transforms.
inline void winograd_kernel(const Vector (&g)[3], Vector (&t)[6]) {
  const Vector even = (g[0] + g[2]) * (-1.0f / 6), odd = g[1] * (-1.0f / 6);
  const Vector outer = g[0] * (1.0f / 24) + g[2] * (1.0f / 6), inner = g[1] * (1.0f / 12);
  t[0] = g[0] * 0.25f;
  t[1] = even + odd;
  t[2] = even - odd;
  t[3] = outer + inner;
  t[4] = outer - inner;
  t[5] = g[2];
}

// The results of an input transform come in pairs that share sums: 0 and 5, 1 and 2, 3 and 4.
constexpr int kWinogradPairs[3][2] = {{0, 5}, {1, 2}, {3, 4}};

template <int pair, class Load>
__attribute__((always_inline)) inline void winograd_in(const Load& d, Vector& first, Vector& second) {
  if constexpr (pair == 0) {
    const Vector d2 = d(2), d3 = d(3);
    first = 4.0f * d(0) - 5.0f * d2 + d(4);
    second = 4.0f * d(1) - 5.0f * d3 + d(5);
  } else if constexpr (pair == 1) {
    const Vector even = d(4) - 4.0f * d(2), odd = d(3) - 4.0f * d(1);
    first = even + odd;
    second = even - odd;
  } else {
    const Vector outer = d(4) - d(2), inner = 2.0f * (d(3) - d(1));
    first = outer + inner;
    second = outer - inner;
  }
}

// Those of an output transform: 0 and 2, 1 and 3.
template <int pair, class Load>
__attribute__((always_inline)) inline void winograd_out(const Load& m, Vector& first, Vector& second) {
  const Vector m1 = m(1), m2 = m(2), m3 = m(3), m4 = m(4);
  if constexpr (pair == 0) {
    const Vector sum = m1 + m2, far_sum = m3 + m4;
    first = m(0) + sum + far_sum;
    second = sum + 4.0f * far_sum;
  } else {
    const Vector difference = m1 - m2, far_difference = m3 - m4;
    first = difference + 2.0f * far_difference;
    second = difference + 8.0f * far_difference + m(5);
  }
}

void winograd_weights(const WinogradWeights& task) {
  constexpr int size = kWinogradTile + 2;
  for (int64_t i = 0; i < task.count; i += kWidth) {
    Vector half[size][3];
    repeat<3>([&](int w) __attribute__((always_inline)) {
      Vector line[3], result[size];
      repeat<3>([&](int h) __attribute__((always_inline)) { line[h] = load(task.in + (3 * h + w) * task.tap + i); });
      winograd_kernel(line, result);
      repeat<size>([&](int h) __attribute__((always_inline)) { half[h][w] = result[h]; });
    });
    repeat<size>([&](int h) __attribute__((always_inline)) {
      Vector result[size];
      winograd_kernel(half[h], result);
      repeat<size>([&](int w) __attribute__((always_inline)) {
        store(task.out + (size * h + w) * task.plane + i, result[w]);
      });
    });
  }
}

// Two columns at a time: all 36 values would not fit into the registers.
void winograd_input(const WinogradInput& task) {
  constexpr int size = kWinogradTile + 2;
  for (int64_t channel = 0; channel < task.channels; channel += kWidth) {
    repeat<3>([&](auto pair) __attribute__((always_inline)) {
      Vector half[2][size];
      repeat<size>([&](auto h) __attribute__((always_inline)) {
        const float* row = task.in + h * task.row + channel;
        const auto pixel = [&](int w) __attribute__((always_inline)) { return load(row + w * task.pitch); };
        winograd_in<pair>(pixel, half[0][h], half[1][h]);
      });
      repeat<2>([&](auto i) __attribute__((always_inline)) {
        const auto value = [&](int h) __attribute__((always_inline)) { return half[i][h]; };
        repeat<3>([&](auto rows) __attribute__((always_inline)) {
          Vector first, second;
          winograd_in<rows>(value, first, second);
          float* out = task.out + kWinogradPairs[pair][i] * task.channels + channel;
          store(out + size * kWinogradPairs[rows][0] * task.channels, first);
          store(out + size * kWinogradPairs[rows][1] * task.channels, second);
        });
      });
    });
  }
}

void winograd_output(const WinogradOutput& task) {
  constexpr int size = kWinogradTile + 2;
  for (int64_t channel = 0; channel < task.channels; channel += kWidth) {
    const Vector bias = load(task.bias + channel);
    repeat<2>([&](auto pair) __attribute__((always_inline)) {
      Vector half[2][size], pixels[8];  // columns pair and pair + 2
      repeat<size>([&](auto h) __attribute__((always_inline)) {
        const float* row = task.in + size * h * task.channels + channel;
        const auto value = [&](int w) __attribute__((always_inline)) { return load(row + w * task.channels); };
        winograd_out<pair>(value, half[0][h], half[1][h]);
      });
      repeat<2>([&](auto i) __attribute__((always_inline)) {
        const auto value = [&](int h) __attribute__((always_inline)) { return half[i][h]; };
        winograd_out<0>(value, pixels[4 * i], pixels[4 * i + 2]);
        winograd_out<1>(value, pixels[4 * i + 1], pixels[4 * i + 3]);
      });
      const auto exists = [&](int i) __attribute__((always_inline)) {
        return i % 4 < task.height && pair + i / 4 * 2 < task.width;
      };
      repeat<8>([&](auto i) __attribute__((always_inline)) { pixels[i] += bias; });
      if (task.residual) {
        const float* residual = task.residual + channel;
        repeat<8>([&](auto i) __attribute__((always_inline)) {
          const int64_t place = i % 4 * task.residual_row + (pair + i / 4 * 2) * task.residual_pitch;
          if (exists(i)) pixels[i] += load(residual + place);
        });
      }
      activate(pixels, task.activation);
      repeat<8>([&](auto i) __attribute__((always_inline)) {
        const int64_t place = i % 4 * task.row + (pair + i / 4 * 2) * task.pitch;
        if (exists(i)) store(task.out + place + channel, pixels[i]);
      });
    });
  }
}

void pool_max(const float* const* in, int64_t count, float* out, int64_t channels) {
  for (int64_t channel = 0; channel < channels; channel += kWidth) {
    Vector best = load(in[0] + channel);
    for (int64_t i = 1; i < count; ++i) {
      const Vector x = load(in[i] + channel);
      best = (x <= best) | (best != best) ? best : x;
    }
    store(out + channel, best);
  }
}

void pool_sum(const float* const* in, int64_t count, float scale, float* out, int64_t channels) {
  for (int64_t channel = 0; channel < channels; channel += kWidth) {
    Vector sum = {};
    for (int64_t i = 0; i < count; ++i) sum += load(in[i] + channel);
    store(out + channel, sum * scale);
  }
}

void add(const float* a, const float* b, float* out, int64_t count, Activation activation) {
  for (int64_t i = 0; i < count; i += kWidth) {
    Vector x[1] = {b ? load(a + i) + load(b + i) : load(a + i)};
    activate(x, activation);
    store(out + i, x[0]);
  }
}

void multiply(const float* a, const float* b, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store(out + i, load(a + i) * load(b + i));
}

int64_t multiply_add(int64_t rounds, float* values) {
  constexpr int count = DYNEXEC_REGISTERS == 32 ? 24 : 12;
  Vector sums[count];
  for (int i = 0; i < count; ++i) sums[i] = broadcast(values[2 + i]);  // all different, for the compiler
  const Vector factor = broadcast(values[0]), term = broadcast(values[1]);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < count; ++i) sums[i] = sums[i] * factor + term;
  }
  for (int i = 0; i < count; ++i) store(values, load(values) + sums[i]);
  return count * kWidth;
}

}  // namespace

const Kernels DYNEXEC_TABLE = {kWidth,          conv,     depthwise, winograd_weights, winograd_input,
                               winograd_output, pool_max, pool_sum,  add,              multiply,
                               multiply_add};

}  // namespace dynexec
