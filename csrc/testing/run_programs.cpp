// Runs programs of the CPU engine from files, alone, without torch and Python: made to be built with sanitizers.
//
//   run_programs FILE...
//   run_programs --mutate COUNT FILE...
//
// A file has int64 values: magic, sizes of code and weights, samples, columns, input [C, H, W], output [C, H, W]; then
// the code, the weights, the input batch, the decisions (a byte each) and the expected output, both batches NHWC. Every
// set of kernels whose vector width the program was made for runs it: by one thread and by four, in groups of several
// sizes, each thread on its own and all together, and several calls at once. Exit status 1: an output was wrong, or a
// call allocated memory though one like it had gone before, or spans did not say what ran.
//
// With --mutate, COUNT programs are made of each by changing some of its integers. The engine must refuse them or stay
// within its memory and that of the batch, whatever they now say; there is no right output to compare with.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/engine.h"

namespace {

std::atomic<int64_t> allocations{0};

void* allocate(std::size_t size, std::size_t alignment) {
  ++allocations;
  const std::size_t whole = (std::max<std::size_t>(size, 1) + alignment - 1) / alignment * alignment;
  if (void* const memory = std::aligned_alloc(alignment, whole)) return memory;
  throw std::bad_alloc();
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size, __STDCPP_DEFAULT_NEW_ALIGNMENT__); }
void* operator new(std::size_t size, std::align_val_t alignment) { return allocate(size, std::size_t(alignment)); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace {

constexpr int64_t kMagic = 0x64796e65786563;

struct Case {
  int64_t samples, columns, in[3], out[3];
  std::vector<int64_t> code;
  std::vector<float> weights, x, expected;
  std::vector<uint8_t> decisions;

  explicit Case(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    file.exceptions(std::ios::failbit | std::ios::badbit);
    int64_t header[11];
    file.read(reinterpret_cast<char*>(header), sizeof(header));
    if (header[0] != kMagic) throw std::runtime_error(path + " is no program");
    const auto read = [&](auto& values, int64_t size) {
      values.resize(size);
      if (size > 0) file.read(reinterpret_cast<char*>(values.data()), size * sizeof(values[0]));
    };
    samples = header[3];
    columns = header[4];
    for (int i = 0; i < 3; ++i) in[i] = header[5 + i], out[i] = header[8 + i];
    read(code, header[1]);
    read(weights, header[2]);
    read(x, samples * in[0] * in[1] * in[2]);
    read(decisions, samples * columns);
    read(expected, samples * out[0] * out[1] * out[2]);
  }
};

dynexec::Images view(float* data, const int64_t* shape) {
  return {data, {shape[0] * shape[1] * shape[2], 1, shape[0] * shape[2], shape[0]}};
}

void parallel(int64_t threads, const std::function<void()>& work) {
  std::vector<std::thread> team;
  for (int64_t i = 1; i < threads; ++i) team.emplace_back(work);
  work();
  for (std::thread& thread : team) thread.join();
}

void one_after_the_other(int64_t threads, const std::function<void()>& work) {
  for (int64_t i = 0; i < threads; ++i) work();
}

// Whether the spans of a call say that each instruction ran for all samples, or those that keep it, one after the other.
bool check_spans(const std::string& path, Case& test, const dynexec::Program& program, const std::vector<float>& expected,
                 bool together) {
  std::vector<float> y(test.expected.size(), NAN);
  std::vector<dynexec::Span> spans;
  program.run({test.samples, view(test.x.data(), test.in), view(y.data(), test.out), test.decisions.data()}, 4, 2,
              together, parallel, &spans);
  bool good = y == expected && !spans.empty();
  int64_t loaded = 0;
  for (size_t i = 0; i < spans.size(); ++i) {
    const dynexec::Span& span = spans[i];
    const bool follows = i > 0 && spans[i - 1].thread == span.thread;
    good = good && span.begin >= (follows ? spans[i - 1].end : 0) && span.end >= span.begin;
    good = good && span.samples > 0 && span.samples <= 2 && (i == 0 || spans[i - 1].thread <= span.thread);
    if (span.instruction == 0) loaded += span.samples;
  }
  good = good && loaded == test.samples * (together ? 4 : 1);
  if (!good) std::printf("%s: together %d: wrong spans\n", path.c_str(), together);
  return good;
}

// Whether the program gives what is expected, the same bits every time.
bool check(const std::string& path, Case& test, const dynexec::Kernels& kernels) {
  const dynexec::Program program(test.code.data(), test.code.size(), test.weights.data(), test.weights.size(), kernels);
  std::vector<float> first;
  bool good = true;
  const auto run = [&](int64_t threads, int64_t group, bool together) {
    std::vector<float> y(test.expected.size(), NAN);
    program.run({test.samples, view(test.x.data(), test.in), view(y.data(), test.out), test.decisions.data()}, threads,
                group, together, parallel);
    return y;
  };
  for (const int64_t threads : {1, 4}) {
    for (const int64_t group : {0, 1, 3, 64}) {
      for (const bool together : {false, true}) {
        const std::vector<float> y = run(threads, group, together);
        float largest = 0, error = 0;
        for (size_t i = 0; i < y.size(); ++i) {
          largest = std::max(largest, std::fabs(test.expected[i]));
          error = std::fmax(error, std::isfinite(y[i]) ? std::fabs(y[i] - test.expected[i]) : INFINITY);
        }
        if (first.empty()) first = y;
        if (error > 1e-4f * std::max(largest, 1e-3f) || y != first) {
          std::printf("%s: %ld threads, groups of %ld, together %d: error %g of %g, same bits %d\n", path.c_str(),
                      long(threads), long(group), together, error, largest, y == first);
          good = false;
        }
      }
    }
  }
  std::vector<float> y(test.expected.size());
  const dynexec::Program::Batch batch = {test.samples, view(test.x.data(), test.in), view(y.data(), test.out),
                                         test.decisions.data()};
  for (const bool together : {false, true}) {
    program.run(batch, 4, 0, together, one_after_the_other);
    const int64_t before = allocations;
    program.run(batch, 4, 0, together, one_after_the_other);
    if (allocations != before) {
      std::printf("%s: together %d: %ld allocations in a call\n", path.c_str(), together, long(allocations - before));
      good = false;
    }
  }
  for (const bool together : {false, true}) good = check_spans(path, test, program, first, together) && good;
  std::vector<std::thread> callers;
  std::vector<std::vector<float>> results(3);
  for (auto& result : results) callers.emplace_back([&] { result = run(2, 0, &result == &results[0]); });
  for (std::thread& caller : callers) caller.join();
  for (const auto& result : results) good = good && result == first;
  return good;
}

struct Counts {
  int64_t ran = 0, refused = 0, large = 0;
};

void run_mutated(const Case& test, const std::vector<int64_t>& code, const dynexec::Kernels& kernels, Counts& counts) {
  const auto size = [](const dynexec::Buffer& b) { return double(b.channels) * double(b.height) * double(b.width); };
  try {
    const dynexec::Program program(code.data(), code.size(), test.weights.data(), test.weights.size(), kernels);
    const dynexec::Buffer &in = program.input(), &out = program.output();
    if (program.floats() + size(in) + size(out) > 1 << 22) {
      ++counts.large;
      return;
    }
    const int64_t from[] = {in.channels, in.height, in.width}, to[] = {out.channels, out.height, out.width};
    std::vector<float> x(test.samples * int64_t(size(in)), 1.0f), y(test.samples * int64_t(size(out)));
    std::vector<uint8_t> decisions(test.samples * program.columns());
    for (size_t i = 0; i < decisions.size(); ++i) decisions[i] = i % 3 != 0;
    const dynexec::Program::Batch batch = {test.samples, view(x.data(), from), view(y.data(), to), decisions.data()};
    program.run(batch, 1, 0, false, parallel);
    program.run(batch, 3, 0, true, parallel);
    ++counts.ran;
  } catch (const std::invalid_argument&) {
    ++counts.refused;
  }
}

// `count` programs that differ from the file's in one to three integers, now small or large.
void mutate(const Case& test, const dynexec::Kernels& kernels, int64_t count, Counts& counts) {
  std::mt19937_64 random(test.code.size());
  for (int64_t i = 0; i < count; ++i) {
    std::vector<int64_t> code = test.code;
    for (uint64_t changes = 1 + random() % 3; changes > 0; --changes) {
      int64_t& value = code[random() % code.size()];
      const int64_t small = int64_t(random() % 42) - 2, near = value + int64_t(random() % 5) - 2;
      const int64_t large = int64_t(random() >> (1 + random() % 63));
      const uint64_t kind = random() % 8;
      value = kind < 3 ? small : kind < 7 ? near : large;
    }
    run_mutated(test, code, kernels, counts);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool mutated = argc > 2 && std::string(argv[1]) == "--mutate";
  const int first = mutated ? 3 : 1;
  bool good = argc > first;
  int ran = 0;
  Counts counts;
  for (int i = first; i < argc; ++i) {
    Case test(argv[i]);
    for (const dynexec::Kernels* kernels : dynexec::Program::all_kernels()) {
      if (test.code.size() < 2 || kernels->width != test.code[1]) continue;
      if (mutated) {
        mutate(test, *kernels, std::stol(argv[2]), counts);
      } else {
        good = check(argv[i], test, *kernels) && good;
      }
      ++ran;
    }
  }
  std::printf("%d programs ran\n", ran);
  if (mutated) {
    std::printf("mutated: %ld ran, %ld refused, %ld too large\n", long(counts.ran), long(counts.refused),
                long(counts.large));
  }
  return good && ran == argc - first ? 0 : 1;
}
