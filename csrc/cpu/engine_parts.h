// What the sources of the engine share; nobody else includes it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>

#include "engine.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dynexec {

constexpr int64_t kMaxGroup = 64;        // samples: their numbers are on the stack
constexpr int64_t kMaxWindow = 64 * 64;  // inputs of a pooling: their pointers are on the stack
constexpr int64_t kWinogradTiles = 48;   // at most at once; a multiple of every tile's rows
// Floats between Winograd's tiles and between planes of its weights, so that these do not all fall into the same lines of
// the cache.
constexpr int64_t kWinogradGap = 16;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// How the output channels of a convolution are divided into panels.
struct Panels {
  int64_t count, last;  // the last one's vectors; all others have kPanel
};

inline Panels divide_channels(int64_t channels, int64_t width) {
  const int64_t vectors = divide_up(channels, width);
  const int64_t count = std::max<int64_t>(1, vectors / kPanel);
  return {count, vectors - kPanel * (count - 1)};
}

// Of a sample.
inline int64_t winograd_tiles(const Buffer& out) {
  return divide_up(out.height, kWinogradTile) * divide_up(out.width, kWinogradTile);
}

// Of a tile's 36 planes.
inline int64_t winograd_floats(int64_t channels) { return kWinogradPlanes * channels + kWinogradGap; }

[[noreturn]] inline void fail(const std::string& what) { throw std::invalid_argument("program: " + what); }

void clear_border(const Buffer& b, float* data);

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// How many items of a thread's part of a step were started; the first thread's: and how many of the step are finished.
struct alignas(64) Counter {
  std::atomic<int64_t> started{0}, done{0};
};

// What one thread did since a call began.
class Clock {
 public:
  Clock(int64_t thread, std::chrono::steady_clock::time_point start) : thread_(thread), start_(start) {}

  int64_t now() const {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start_).count();
  }
  void add(int64_t instruction, int64_t samples, int64_t begin) {
    spans.push_back({thread_, instruction, samples, begin, now()});
  }

  std::vector<Span> spans;

 private:
  int64_t thread_;
  std::chrono::steady_clock::time_point start_;
};

// Where a thread is in a call: its group, the samples of the phase that it works on, those that a gate lets through.
struct Program::Frame {
  const Batch& batch;
  const int64_t* const slots;             // where they begin
  float* arena = nullptr;
  float* scratch = nullptr;               // of this thread
  float* shared = nullptr;                // of all
  Counter* counter = nullptr;             // of the next step; null: this thread works alone
  Clock* clock = nullptr;                 // null: nobody wants to know
  int64_t helpers = 1, helper = 0;        // threads that share a step, number of this one
  int64_t group = 0, group_size = 0;      // first sample and number of samples
  int64_t first = 0, size = 0;            // of the phase, within the group
  int64_t count = 0, active[kMaxGroup];   // samples of the phase

  Frame(const Batch& batch, const int64_t* slots) : batch(batch), slots(slots) {}

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

}  // namespace dynexec
