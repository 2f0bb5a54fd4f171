// The instructions of cuda/hardware.h on a CPU.
#undef _FORTIFY_SOURCE  // its longjmp takes another thread's stack for a mistake
#include <algorithm>
#include <cmath>

#include "simt_machine.h"

namespace dynexec::hardware {

using simt::machine;
using simt::Together;

float to_float(Float16, uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

float to_float(BFloat16, uint16_t bits) {
  const uint32_t whole = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &whole, 4);
  return value;
}

uint16_t from_float(Float16, float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude == 0.0f) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude in [2 ** (exponent - 1), 2 ** exponent)
  const int unit = std::max(exponent - 11, -24);
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));  // to even
  // The bits of neighbours follow each other, also from one exponent to the next.
  return sign | (unit == -24 ? steps : static_cast<uint32_t>(unit + 24) * 1024 + steps);
}

uint16_t from_float(BFloat16, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

int thread() { return machine->current->number; }
int block() { return machine->current->block->number; }
int rank() { return machine->current->block->rank; }
uint32_t shared() { return static_cast<uint32_t>(rank()) << simt::kRankShift; }

uint32_t load32(uint32_t address, Here here) {
  machine->maybe_yield();
  uint32_t value;
  std::memcpy(&value, machine->access(address, 4, false, here, machine->current), 4);
  machine->log(address, 4, false, here);
  return value;
}

uint2 load64(uint32_t address, Here here) {
  machine->maybe_yield();
  uint2 value;
  std::memcpy(&value, machine->access(address, 8, false, here, machine->current), 8);
  machine->log(address, 8, false, here);
  return value;
}

void store32(uint32_t address, uint32_t value, Here here) {
  machine->maybe_yield();
  std::memcpy(machine->access(address, 4, true, here, machine->current), &value, 4);
  machine->log(address, 4, true, here);
}

void store128(uint32_t address, uint4 value, Here here) {
  machine->maybe_yield();
  std::memcpy(machine->access(address, 16, true, here, machine->current), &value, 16);
  machine->log(address, 16, true, here);
}

void store32_remote(int to, uint32_t address, uint32_t value, Here here) {
  machine->maybe_yield();
  if (machine->current->block->cluster->barriers == 0) {
    machine->fail("writes to another block, which may not have begun: no barrier of the cluster was before", here);
  }
  const uint32_t offset = address & ((1u << simt::kRankShift) - 1);
  const uint32_t remote = static_cast<uint32_t>(to) << simt::kRankShift | offset;
  std::memcpy(machine->access(remote, 4, true, here, machine->current, true), &value, 4);
}

void check_global(const void* address, int bytes, bool writes, Here here) {
  machine->maybe_yield();
  machine->check_global(address, bytes, writes, false, here);
}

int fetch_add(int* to, int value, Here here) {
  machine->maybe_yield();
  machine->check_global(to, 4, true, true, here);
  const int before = *to;
  *to += value;
  return before;
}

void copy128(uint32_t to, const void* from, Here here) {
  machine->maybe_yield();
  machine->check_global(from, 16, false, false, here);
  machine->access(to, 16, true, here, machine->current, false, true);
  machine->current->open.push_back({to, static_cast<const unsigned char*>(from), here});
  machine->report_.copied_bytes += 16;
}

void commit() {
  machine->current->groups.push_back(std::move(machine->current->open));
  machine->current->open.clear();
}

void wait_for(int groups) {
  auto& pending = machine->current->groups;
  for (; static_cast<int>(pending.size()) > groups; pending.pop_front()) {
    for (const simt::Copy& copy : pending.front()) machine->land(copy);
  }
}

void barrier(Here here) { machine->barrier(here); }
void cluster_barrier(Here here) { machine->cluster_barrier(here); }

namespace {

struct Matrices {
  uint32_t address;
  uint32_t* values;
};

struct Product {
  float* d;
  const uint32_t* a;
  uint2 b;
};

struct Shuffle {
  float value, result;
  int mask;
};

}  // namespace

void load_matrices(uint32_t (&values)[4], uint32_t address, Here here) {
  Matrices mine{address, values};
  if (!machine->meet(Together::kLoadMatrices, &mine, here)) return;
  const simt::Warp& warp = *machine->current->warp;
  std::vector<std::pair<uint32_t, int>> lanes;
  for (int row = 0; row < simt::kWarp; ++row) {
    simt::Thread* const owner = warp.lanes[row];
    const uint32_t from = static_cast<Matrices*>(owner->arguments)->address;
    const unsigned char* const data = machine->access(from, 16, false, here, owner);
    lanes.emplace_back(from, 16);
    for (int column = 0; column < 4; ++column) {  // pairs of values
      uint32_t pair;
      std::memcpy(&pair, data + 4 * column, 4);
      simt::Thread* const lane = warp.lanes[row % 8 * 4 + column];
      static_cast<Matrices*>(lane->arguments)->values[row / 8] = pair;
    }
  }
  machine->count_conflicts(here, lanes);
  machine->leave_meeting();
}

void multiply_add_as(float (*convert)(uint16_t), float (&d)[4], const uint32_t (&a)[4], uint2 b, Here here) {
  Product mine{d, a, b};
  if (!machine->meet(Together::kMultiply, &mine, here)) return;
  const simt::Warp& warp = *machine->current->warp;
  const auto half = [&](uint32_t pair, int which) { return convert(static_cast<uint16_t>(pair >> 16 * which)); };
  float left[16][16], right[16][8];
  for (int lane = 0; lane < simt::kWarp; ++lane) {
    const Product& product = *static_cast<Product*>(warp.lanes[lane]->arguments);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int which = 0; which < 2; ++which) {
      left[row][column + which] = half(product.a[0], which);
      left[row + 8][column + which] = half(product.a[1], which);
      left[row][column + 8 + which] = half(product.a[2], which);
      left[row + 8][column + 8 + which] = half(product.a[3], which);
      right[column + which][row] = half(product.b.x, which);
      right[column + 8 + which][row] = half(product.b.y, which);
    }
  }
  for (int lane = 0; lane < simt::kWarp; ++lane) {
    const Product& product = *static_cast<Product*>(warp.lanes[lane]->arguments);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
      product.d[i] += sum;
    }
  }
  ++machine->report_.products;
  machine->leave_meeting();
}

float shuffle_xor(float value, int mask, Here here) {
  Shuffle mine{value, 0, mask};
  if (machine->meet(Together::kShuffle, &mine, here)) {
    for (simt::Thread* lane : machine->current->warp->lanes) {
      auto& own = *static_cast<Shuffle*>(lane->arguments);
      own.result = static_cast<Shuffle*>(machine->current->warp->lanes[lane->lane ^ own.mask]->arguments)->value;
    }
    machine->leave_meeting();
  }
  return mine.result;
}

}  // namespace dynexec::hardware
