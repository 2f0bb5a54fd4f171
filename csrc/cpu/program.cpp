// The CPU engine as ops: make_program, run_program, profile_program and facts. Meaning: dynexec/executors/engine.py.

#include "common.h"
#include "engine.h"

#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace dynexec {
namespace {

// DYNEXEC_KERNELS=0, 1, ... takes a narrower instruction set than the best one, for tests.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const auto all = Program::all_kernels();
    const char* wanted = std::getenv("DYNEXEC_KERNELS");
    if (!wanted) return *all.back();
    return *all[std::min<size_t>(std::strtoul(wanted, nullptr, 10), all.size() - 1)];
  }();
  return chosen;
}

struct Held {
  Tensor weights;
  Program program;

  Held(const Tensor& code, const Tensor& weights)
      : weights(weights),
        program(static_cast<const int64_t*>(code.const_data_ptr()), code.numel(),
                static_cast<const float*>(weights.const_data_ptr()), weights.numel(), kernels()) {}
};

std::mutex mutex;
std::unordered_map<int64_t, std::shared_ptr<const Held>> programs;
int64_t next_handle = 1;

int64_t vector_width(const Tensor&) { return kernels().width; }

// Floating-point operations per second of one thread: the best of several short runs.
double peak_rate(const Tensor&) {
  double best = 0;
  for (int run = 0; run < 50; ++run) {
    float values[32];
    for (int i = 0; i < 32; ++i) values[i] = 0.5f + i / 64.0f;
    const auto start = std::chrono::steady_clock::now();
    const int64_t per_round = kernels().multiply_add(100000, values);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, 2e5 * per_round / seconds.count());
  }
  return best;
}

int64_t make_program(const Tensor& code, const Tensor& weights) {
  if (code.scalar_type() != ScalarType::Long || !code.is_contiguous()) {
    throw std::invalid_argument("code must be contiguous int64");
  }
  if (weights.scalar_type() != ScalarType::Float || !weights.is_contiguous()) {
    throw std::invalid_argument("weights must be contiguous float32");
  }
  auto held = std::make_shared<const Held>(code, weights);
  const std::lock_guard lock(mutex);
  programs.emplace(next_handle, std::move(held));
  return next_handle++;
}

Images view(const Tensor& x) {
  return {static_cast<float*>(x.mutable_data_ptr()), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

Tensor run(const Tensor& x, const Tensor& decisions, int64_t handle, int64_t group, bool together,
           std::vector<Span>* spans) {
  std::shared_ptr<const Held> held;
  {
    const std::lock_guard lock(mutex);
    const auto found = programs.find(handle);
    if (found == programs.end()) throw std::invalid_argument("there is no program " + std::to_string(handle));
    held = found->second;
  }
  const Program& program = held->program;
  const Buffer &in = program.input(), &out = program.output();
  if (x.scalar_type() != ScalarType::Float || x.dim() != 4 || x.size(1) != in.channels || x.size(2) != in.height ||
      x.size(3) != in.width) {
    throw std::invalid_argument("x must be float32 [N, " + std::to_string(in.channels) + ", " +
                                std::to_string(in.height) + ", " + std::to_string(in.width) + "]");
  }
  const int64_t samples = x.size(0);
  if (decisions.scalar_type() != ScalarType::Bool || decisions.dim() != 2 || decisions.size(0) != samples ||
      decisions.size(1) != program.columns()) {
    throw std::invalid_argument("decisions must be bool [" + std::to_string(samples) + ", " +
                                std::to_string(program.columns()) + "]");
  }
  const Tensor rows = torch::stable::contiguous(decisions);
  const int64_t plane = out.height * out.width;
  const Tensor y = empty_strided({samples, out.channels, out.height, out.width},
                                 {plane * out.channels, 1, out.width * out.channels, out.channels}, ScalarType::Float);
  program.run({samples, view(x), view(y), static_cast<const uint8_t*>(rows.const_data_ptr())},
              torch::stable::get_num_threads(), group, together,
              [](int64_t threads, const std::function<void()>& work) {
                torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
              },
              spans);
  return y;
}

Tensor run_program(const Tensor& x, const Tensor& decisions, int64_t handle, int64_t group, bool together) {
  return run(x, decisions, handle, group, together, nullptr);
}

std::tuple<Tensor, Tensor> profile_program(const Tensor& x, const Tensor& decisions, int64_t handle, int64_t group,
                                           bool together) {
  std::vector<Span> spans;
  const Tensor y = run(x, decisions, handle, group, together, &spans);
  const Tensor rows = empty_strided({static_cast<int64_t>(spans.size()), 5}, {5, 1}, ScalarType::Long);
  auto* value = static_cast<int64_t*>(rows.mutable_data_ptr());
  for (const Span& span : spans) {
    for (const int64_t number : {span.thread, span.instruction, span.samples, span.begin, span.end}) *value++ = number;
  }
  return {y, rows};
}

STABLE_TORCH_LIBRARY_IMPL(dynexec, CPU, library) {
  library.impl("vector_width", TORCH_BOX(&vector_width));
  library.impl("peak_rate", TORCH_BOX(&peak_rate));
  library.impl("make_program", TORCH_BOX(&make_program));
  library.impl("run_program", TORCH_BOX(&run_program));
  library.impl("profile_program", TORCH_BOX(&profile_program));
}

}  // namespace
}  // namespace dynexec

// No op: Python collects garbage at any time, also while torch traces what its ops do.
extern "C" __attribute__((visibility("default"))) void dynexec_free_program(int64_t handle) {
  const std::lock_guard lock(dynexec::mutex);
  dynexec::programs.erase(handle);
}
