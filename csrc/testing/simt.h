// Runs a kernel written against cuda/hardware.h on a CPU: every thread a coroutine, in an order that a seed decides.
//
// What a GPU does together is done together: ldmatrix, mma and shuffles wait for the whole warp, barriers for the block
// or the cluster. Everything else interleaves. An error, with the thread, the address and the line, is every access that
// is misaligned or outside of shared memory and of all global buffers; in shared memory, which is poisoned, one that
// reads what nothing wrote or what is still being copied, and two of different threads with no barrier between them of
// which one writes; in global memory what a thread writes and another one uses. So are lanes of a warp that wait for
// different things, and threads that wait for others that never come.
#pragma once

#include <bit>
#include <cstdint>
#include <functional>
#include <map>
#include <source_location>
#include <string>
#include <vector>

#define DEVICE inline
#define UNROLL
#define KEEP_LOOP

struct float2 {
  float x, y;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

namespace dynexec::simt {

struct Buffer {
  std::string name;
  void* begin;
  int64_t bytes;
  bool writable;
};

struct Launch {
  int threads, blocks, cluster, shared_bytes;
  uint64_t seed;
  int clusters_at_a_time = 2;
  std::vector<Buffer> buffers;
};

// What one function of the kernel did in shared memory: warp-wide accesses, and the passes that they took too many.
struct Accesses {
  int64_t count = 0, conflicts = 0;
};

struct Report {
  std::string error;  // the first one, or empty
  int64_t products = 0, copied_bytes = 0, barriers = 0;
  std::map<std::string, Accesses> accesses;  // by function
};

// Run kernel() once per thread.
Report run(const Launch& launch, const std::function<void()>& kernel);

}  // namespace dynexec::simt

namespace dynexec::hardware {

using Here = std::source_location;

struct Float16 {};
struct BFloat16 {};

float to_float(Float16, uint16_t bits);
float to_float(BFloat16, uint16_t bits);
uint16_t from_float(Float16, float value);
uint16_t from_float(BFloat16, float value);

int thread();
int block();
int rank();
uint32_t shared();
uint32_t load32(uint32_t address, Here here = Here::current());
uint2 load64(uint32_t address, Here here = Here::current());
void store32(uint32_t address, uint32_t value, Here here = Here::current());
void store128(uint32_t address, uint4 value, Here here = Here::current());
void store32_remote(int to, uint32_t address, uint32_t value, Here here = Here::current());
void check_global(const void* address, int bytes, bool writes, Here here);
int fetch_add(int* to, int value, Here here = Here::current());
void copy128(uint32_t to, const void* from, Here here = Here::current());
void commit();
void wait_for(int groups);
void barrier(Here here = Here::current());
void cluster_barrier(Here here = Here::current());
void load_matrices(uint32_t (&values)[4], uint32_t address, Here here = Here::current());
void multiply_add_as(float (*convert)(uint16_t), float (&d)[4], const uint32_t (&a)[4], uint2 b, Here here);
float shuffle_xor(float value, int mask, Here here = Here::current());

inline int opaque(int value) { return value; }
inline uint32_t as_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

template <class T>
T read(const T* from, Here here = Here::current()) {
  check_global(from, sizeof(T), false, here);
  return *from;
}

template <class T>
void write(T* to, T value, Here here = Here::current()) {
  check_global(to, sizeof(T), true, here);
  *to = value;
}

template <int N>
void wait() {
  wait_for(N);
}

template <class Half>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint2 b, Here here = Here::current()) {
  multiply_add_as([](uint16_t bits) { return to_float(Half{}, bits); }, d, a, b, here);
}

template <class Half>
uint32_t pack(float low, float high) {
  return from_float(Half{}, low) | static_cast<uint32_t>(from_float(Half{}, high)) << 16;
}

template <class Half>
float2 unpack(uint32_t both) {
  return {to_float(Half{}, both & 0xffff), to_float(Half{}, both >> 16)};
}

}  // namespace dynexec::hardware
