// Running a program: the memory of a call, how samples are divided among threads, the instructions in order.
#include "engine_parts.h"

#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dynexec {
namespace {

// With AddressSanitizer, forbidden floats behind every slot and every thread's scratch, and NaN in memory that nothing was
// written to.
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

// For all groups now, so that a call allocates nothing.
void Program::place_slots() {
  slots_.assign((kMaxGroup + 1) * (num_slots_ + 1), 0);
  for (int64_t group = 1; group <= kMaxGroup; ++group) {
    int64_t* const begin = &slots_[group * (num_slots_ + 1)];
    for (const Buffer& buffer : buffers_) {
      if (buffer.slot < 0) continue;
      const int64_t samples = buffer.phase < 0 ? group : std::min(group, phases_[buffer.phase].samples);
      begin[buffer.slot + 1] = std::max(begin[buffer.slot + 1], samples * buffer.sample());
    }
    for (int64_t slot = 0; slot < num_slots_; ++slot) begin[slot + 1] += begin[slot] + kGap;
  }
}

// Floats that each thread works in besides the slots, for groups of that many samples.
int64_t Program::scratch(int64_t group) const {
  int64_t floats = bands_;
  for (const Phase& phase : phases_) {
    for (int64_t i = phase.first; i < phase.end; ++i) {
      const Step& step = steps_[i];
      if (step.op != Op::kWinograd) continue;
      const int64_t tiles = std::min(group, phase.samples) * winograd_tiles(buffers_[step.out]);
      floats = std::max(floats, std::min(tiles, step.tiles) * step.of_tile + step.of_weights);
    }
  }
  return floats;
}

int64_t Program::steps(int64_t group) const {
  int64_t steps = 0;
  for (const Phase& phase : phases_) steps += (phase.end - phase.first) * divide_up(group, phase.samples);
  return steps;
}

std::shared_ptr<Program::Memory> Program::take_memory(int64_t floats, int64_t counters) const {
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
  return std::make_shared<Memory>(floats, counters);
}

void Program::run(const Batch& batch, int64_t threads, int64_t group, bool together, const Parallel& parallel,
                  std::vector<Span>* spans) const {
  if (batch.samples == 0) return;
  const auto start = spans ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point();
  threads = std::max<int64_t>(threads, 1);
  together = (together || batch.samples < threads) && threads > 1;
  if (group <= 0) group = together ? longest_phase_ : std::min(longest_phase_, divide_up(batch.samples, threads));
  group = std::min({group, kMaxGroup, batch.samples});
  const int64_t groups = divide_up(batch.samples, group);
  const int64_t workers = together ? threads : std::min(threads, groups);
  const int64_t* const slots = this->slots(group);
  const int64_t arena = slots[num_slots_];
  const int64_t counters = together ? groups * steps(group) * threads : 0;
  const int64_t shared = arena * (together ? 1 : workers);
  const int64_t between = together ? shared_ * threads * group + kGap : 0, scratch = this->scratch(group) + kGap;
  std::shared_ptr<Memory> memory = take_memory(shared + between + scratch * workers, counters);
  unpoison(memory->arena.get(), memory->floats);
  fill_with_nan(memory->arena.get() + shared, between + scratch * workers);
  if (between > 0) poison(memory->arena.get() + shared + between - kGap, kGap);
  for (int64_t worker = 1; worker <= workers; ++worker) {
    poison(memory->arena.get() + shared + between + worker * scratch - kGap, kGap);
  }
  for (int64_t a = 0; kGap && a < shared; a += arena) {
    for (int64_t slot = 1; slot <= num_slots_; ++slot) poison(memory->arena.get() + a + slots[slot] - kGap, kGap);
  }
  for (int64_t i = 0; i < counters; ++i) {
    memory->counter[i].started.store(0, std::memory_order_relaxed);
    memory->counter[i].done.store(0, std::memory_order_relaxed);
  }
  std::vector<Clock> clocks;
  for (int64_t worker = 0; spans && worker < workers; ++worker) clocks.emplace_back(worker, start);
  std::atomic<int64_t> next_worker{0}, next_group{0};
  const auto work = [&] {
    const int64_t worker = next_worker.fetch_add(1);
    if (worker >= workers) return;
    Frame frame(batch, slots);
    frame.arena = memory->arena.get() + (together ? 0 : worker * arena);
    frame.shared = memory->arena.get() + shared;
    frame.scratch = frame.shared + between + worker * scratch;
    frame.counter = together ? memory->counter.get() : nullptr;
    frame.clock = spans ? &clocks[worker] : nullptr;
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
    parallel(workers, std::cref(work));  // not a copy, which would be allocated
  }
  for (const Clock& clock : clocks) spans->insert(spans->end(), clock.spans.begin(), clock.spans.end());
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
          const uint8_t* decided = frame.batch.decisions + (frame.group + frame.first) * columns_ + step.in;
          frame.count = 0;
          for (int64_t sample = 0; sample < frame.size; ++sample) {
            if ((decided[sample * columns_] != 0) == step.other) frame.active[frame.count++] = sample;
          }
          gated = step.out;
          if (frame.count == 0) i = gated - 1;
          continue;
        }
        if (i == phase.first || i == gated) {
          frame.count = frame.size;
          for (int64_t sample = 0; sample < frame.size; ++sample) frame.active[sample] = sample;
        }
        const int64_t number = i, begin = frame.clock ? frame.clock->now() : 0;
        if (step.bands) {
          run_bands(i, frame);
          i += step.bands;
        } else {
          run_step(step, frame);
        }
        if (frame.clock) frame.clock->add(number, frame.count, begin);
      }
    }
  }
}

}  // namespace dynexec
