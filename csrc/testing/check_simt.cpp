// Small kernels, right ones and wrong ones, for what testing/simt.h must find:
//
//   check_simt NAME SEED...     prints, per seed, the error or what the kernel computed
//   check_simt floats FILE      every float32 of FILE as float16 and bfloat16, then all 65536 values of each as float32
//
// Run by tests/test_simt.py.

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "../cuda/hardware.h"

namespace {

using namespace dynexec;
using namespace dynexec::hardware;

constexpr int kWords = 64;

struct Setting {
  std::function<void()> kernel;
  int threads = 64, blocks = 1, cluster = 1;
};

alignas(16) uint32_t source[kWords];  // i + 1
uint32_t result[kWords];
int counter;

void sum_in_steps(bool barriers) {
  store32(shared() + 4 * thread(), thread());
  for (int step = 32; step > 0; step /= 2) {
    if (barriers) barrier();
    if (thread() < step) {
      const uint32_t at = shared() + 4 * thread();
      store32(at, load32(at) + load32(at + 4 * step));
    }
  }
  if (thread() == 0) write(result, load32(shared()));
}

// A copy to shared memory, read by the thread that made it or by its neighbour.
void copy(bool waits, bool barriers, int neighbour) {
  const uint32_t at = shared() + 16 * thread();
  if (thread() < 16) copy128(at, source + 4 * thread());
  commit();
  if (waits) wait<0>();
  if (barriers) barrier();
  const int other = thread() ^ neighbour;
  if (other < 16 && thread() < 16) write(result + thread(), load32(shared() + 16 * other));
}

// Two copies in groups of their own, of which the older one is waited for.
void copy_in_groups(int used) {
  const uint32_t at = shared() + 32 * thread();
  copy128(at, source);
  commit();
  copy128(at + 16, source + 4);
  commit();
  wait<1>();
  if (thread() == 0) write(result, load32(at + 16 * used));
  wait<0>();
}

// a b for a[i][k] = i - k and b[k][j] = k + 3 j, 16x16 by 16x8; `swapped`: with two lanes' parts of b exchanged.
void multiply(bool swapped) {
  const int lane = thread() % 32;
  for (int i = 4 * lane; i < 4 * lane + 4; ++i) {  // a as rows of 16, two values to a word
    const int row = i / 8, column = i % 8 * 2;
    store32(shared() + 4 * i, pack<Float16>(row - column, row - column - 1));
  }
  barrier();
  uint32_t a[4];
  load_matrices(a, shared() + lane % 16 * 32 + lane / 16 * 16);
  const int used = swapped && lane < 2 ? 1 - lane : lane;
  const int k = used % 4 * 2, j = used / 4;
  float d[4] = {0, 0, 0, 0};
  multiply_add<Float16>(d, a, {pack<Float16>(k + 3 * j, k + 1 + 3 * j), pack<Float16>(k + 8 + 3 * j, k + 9 + 3 * j)});
  bool right = true;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float expected = 0;
    for (int n = 0; n < 16; ++n) expected += static_cast<float>((row - n) * (n + 3 * column));
    right = right && d[i] == expected;
  }
  const float wrong = right ? 0.0f : 1.0f;
  float all = wrong;
  for (int mask = 16; mask > 0; mask /= 2) all += shuffle_xor(all, mask);
  if (lane == 0) write(result, static_cast<uint32_t>(all));
}

// Words that all threads wrote before a barrier, written by one and read or written by another.
void exchange(bool both_write) {
  const uint32_t mine = shared() + 4 * thread(), neighbours = shared() + 4 * (thread() ^ 1);
  store32(mine, 1);
  barrier();
  if (both_write) {
    store32(neighbours, 2);
  } else {
    load32(neighbours);
  }
  store32(mine, 3);
}

void tell_neighbour(bool begins, bool barriers) {
  if (begins) cluster_barrier();
  if (thread() == 0) store32_remote(1 - rank(), shared(), 10 + rank());
  if (barriers) cluster_barrier();
  if (thread() == 0) write(result + rank(), load32(shared()));
}

const std::map<std::string, Setting> kernels = {
    {"sum", {[] { sum_in_steps(true); }}},
    {"sum without barriers", {[] { sum_in_steps(false); }}},
    {"copy", {[] { copy(true, true, 1); }}},
    {"copy without a wait", {[] { copy(false, true, 0); }}},
    {"copy without a barrier", {[] { copy(true, false, 1); }}},
    {"copy read by its own thread", {[] { copy(true, false, 0); }}},
    {"older group", {[] { copy_in_groups(0); }, 32}},
    {"newer group", {[] { copy_in_groups(1); }, 32}},
    {"product", {[] { multiply(false); }, 32}},
    {"product with a wrong lane", {[] { multiply(true); }, 32}},
    {"store outside", {[] { store32(shared() + 4096 + 4 * thread(), 0); }}},
    {"misaligned", {[] { load64(shared() + 4); }}},
    {"not initialised", {[] { load32(shared() + 4 * thread()); }}},
    {"global outside", {[] { read(source + thread() + 1); }}},
    {"read only", {[] { write(source + thread(), 0u); }}},
    {"read, then written", {[] { exchange(false); }}},
    {"written by two", {[] { exchange(true); }}},
    {"written twice", {[] { write(result, 1u); }}},
    {"atomic", {[] { fetch_add(&counter, 1); }, 64, 4}},
    {"some at a barrier",
     {[] {
       if (thread() < 40) barrier();
     }}},
    {"a part of a warp",
     {[] {
       if (thread() != 5) shuffle_xor(1.0f, 1);
     }}},
    {"parted ways",
     {[] {
       if (thread() % 2) {
         shuffle_xor(1.0f, 1);
       } else {
         shuffle_xor(2.0f, 1);
       }
     }}},
    {"cluster", {[] { tell_neighbour(true, true); }, 32, 2, 2}},
    {"cluster without a barrier", {[] { tell_neighbour(true, false); }, 32, 2, 2}},
    {"cluster that may not have begun", {[] { tell_neighbour(false, true); }, 32, 2, 2}},
    {"copy at the end", {[] { copy(false, true, 64); }}},
    {"two barriers",
     {[] {
       if (thread() % 2) {
         barrier();
       } else {
         barrier();
       }
     }}},
    {"address of another block", {[] { load32(1 << 24); }, 32, 2, 2}},
    {"block that is done",
     {[] {
       cluster_barrier();
       if (rank() == 1) return;
       for (int i = 0; i < 4000; ++i) store32(shared() + 4 * thread(), i);
       store32_remote(1, shared() + 4 * thread(), 0);
     },
      32, 2, 2}},
    {"conflicts", {[] { store32(shared() + 8 * (thread() % 32) + 256 * (thread() / 32), 0), barrier(); }}},
};

int run(const Setting& setting, uint64_t seed) {
  for (int i = 0; i < kWords; ++i) source[i] = i + 1, result[i] = 0;
  counter = 0;
  simt::Launch launch;
  launch.threads = setting.threads;
  launch.blocks = setting.blocks;
  launch.cluster = setting.cluster;
  launch.shared_bytes = 4096;
  launch.seed = seed;
  launch.buffers = {{"source", source, sizeof(source), false},
                    {"result", result, sizeof(result), true},
                    {"counter", &counter, sizeof(counter), true}};
  const simt::Report report = simt::run(launch, setting.kernel);
  if (!report.error.empty()) {
    std::printf("%s\n", report.error.c_str());
    return 0;
  }
  int64_t conflicts = 0;
  for (const auto& [name, accesses] : report.accesses) conflicts += accesses.conflicts;
  std::printf("fine: %u %u, counter %d, %ld products, %ld conflicts\n", result[0], result[1], counter,
              long(report.products), long(conflicts));
  return 0;
}

int convert(const char* path) {
  std::ifstream in(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(in)), {});
  const auto* const values = reinterpret_cast<const float*>(bytes.data());
  std::ofstream out(std::string(path) + ".out", std::ios::binary);
  const auto put = [&](auto value) { out.write(reinterpret_cast<const char*>(&value), sizeof(value)); };
  for (size_t i = 0; i < bytes.size() / 4; ++i) {
    put(from_float(Float16{}, values[i]));
    put(from_float(BFloat16{}, values[i]));
  }
  for (int bits = 0; bits < 1 << 16; ++bits) {
    put(to_float(Float16{}, bits));
    put(to_float(BFloat16{}, bits));
  }
  return out.good() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  if (std::string(argv[1]) == "floats") return convert(argv[2]);
  const auto found = kernels.find(argv[1]);
  if (found == kernels.end()) return 2;
  for (int i = 2; i < argc; ++i) {
    if (run(found->second, std::strtoull(argv[i], nullptr, 10))) return 1;
  }
  return 0;
}
