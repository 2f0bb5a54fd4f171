#undef _FORTIFY_SOURCE  // its longjmp takes another thread's stack for a mistake
#include "simt.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <unordered_map>

namespace dynexec::simt {
namespace {

using hardware::Here;

constexpr int kWarp = 32;
constexpr int kStack = 128 << 10;
constexpr uint32_t kRankShift = 24;   // of a shared address: the block of the cluster
constexpr uint32_t kPoison = 0x7fc07fc0;  // NaN as a float and as two halves of either kind
constexpr int kNobody = -1, kSeveral = -2;

enum class State { kReady, kWarp, kBlock, kCluster, kDone };

// A word of shared memory: who used it last, at which count of barriers.
struct Word {
  int writer = kNobody, reader = kNobody;
  uint32_t written = 0, written_cluster = 0, read = 0, read_cluster = 0;
  bool initialised = false, copying = false;
};

struct Access {
  uint32_t address;
  int bytes;
  bool writes;
  Here here;
};

struct Copy {
  uint32_t to;
  const unsigned char* from;
  Here here;
};

enum class Together { kNone, kLoadMatrices, kMultiply, kShuffle };

struct Thread;

struct Warp {
  Thread* lanes[kWarp];
  int arrived = 0;
  Together what = Together::kNone;
  Here here;
};

struct Block {
  int number, rank, arrived = 0, running;
  uint32_t barriers = 0;
  std::vector<unsigned char> shared;
  std::vector<Word> words;
  std::vector<Warp> warps;
  struct Cluster* cluster;
};

struct Cluster {
  int arrived = 0, threads;
  uint32_t barriers = 0;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Thread {
  ucontext_t context;
  jmp_buf place;
  char* stack;
  bool started = false;
  State state = State::kReady;
  int number, lane, in_cluster;
  Warp* warp;
  Block* block;
  Here here;                // where it waits
  void* arguments = nullptr;  // of what the warp does together
  std::vector<Access> accesses;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Stop {};

class Machine {
 public:
  Machine(const Launch& launch, const std::function<void()>& kernel) : launch_(launch), kernel_(kernel) {
    random_.seed(launch.seed);
    for (const Buffer& buffer : launch.buffers) writers_.emplace_back(buffer.writable ? buffer.bytes : 0, kNobody);
  }

  Report run();

  Thread* current = nullptr;

  void yield(State state, Here here) {
    current->state = state;
    current->here = here;
    switch_to_scheduler();
  }

  // Give another thread a turn, now and then.
  void maybe_yield() {
    if (random_() % 16 == 0) {
      ready_.push_back(current);
      switch_to_scheduler();
    }
  }

  [[noreturn]] void fail(const std::string& what, Here here, const Thread* who = nullptr) {
    if (!who) who = current;
    if (report_.error.empty()) {
      char text[512];
      std::snprintf(text, sizeof(text), "block %d, thread %d, %s:%u: %s", who->block->number, who->number,
                    strip(here.file_name()), here.line(), what.c_str());
      report_.error = text;
    }
    stopped_ = true;
    switch_to_scheduler();
    __builtin_unreachable();
  }

  // Check an access of shared memory; where it is.
  unsigned char* access(uint32_t address, int bytes, bool writes, Here here, Thread* who, bool remote = false,
                        bool by_copy = false);
  void land(const Copy& copy);
  void check_global(const void* address, int bytes, bool writes, bool atomic, Here here);
  // Wait for the other lanes; the last one to come executes for all. Whether this one is.
  bool meet(Together what, void* arguments, Here here);
  void leave_meeting();
  void meet_at_barrier(State kind, Here here);
  void barrier(Here here);
  void cluster_barrier(Here here);
  void log(uint32_t address, int bytes, bool writes, Here here) {
    current->accesses.push_back({address, bytes, writes, here});
  }
  void count_conflicts(const Here& here, const std::vector<std::pair<uint32_t, int>>& lanes);

  Report report_;

 private:
  static const char* strip(const char* path) {
    const char* name = std::strrchr(path, '/');
    return name ? name + 1 : path;
  }
  void switch_to_scheduler() {
    if (_setjmp(current->place) == 0) _longjmp(scheduler_, 1);
  }
  static void enter();
  // Neither is inlined where the compiler would have to keep variables for a second return.
  __attribute__((noinline)) void start_cluster();
  __attribute__((noinline)) static void prepare(Thread& thread);
  void finish(Thread* thread);
  void count_accesses(Warp& warp);
  void release(Thread* thread) {
    thread->state = State::kReady;
    ready_.push_back(thread);
  }
  void report_deadlock();

  const Launch& launch_;
  const std::function<void()>& kernel_;
  std::mt19937_64 random_;
  jmp_buf scheduler_;
  bool stopped_ = false;
  int next_cluster_ = 0;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Thread*> ready_;
  std::vector<char*> free_stacks_;
  std::vector<std::vector<int>> writers_;  // of each byte of the buffers that are written to
};

Machine* machine = nullptr;

void Machine::enter() {
  Machine& self = *machine;
  self.kernel_();
  self.finish(self.current);
  self.switch_to_scheduler();
}

void Machine::prepare(Thread& thread) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = kStack;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, &Machine::enter, 0);
}

void Machine::start_cluster() {
  auto cluster = std::make_unique<Cluster>();
  cluster->threads = launch_.cluster * launch_.threads;
  for (int rank = 0; rank < launch_.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    block->number = next_cluster_ * launch_.cluster + rank;
    block->rank = rank;
    block->running = launch_.threads;
    block->cluster = cluster.get();
    block->shared.resize(launch_.shared_bytes);
    for (int i = 0; i + 4 <= launch_.shared_bytes; i += 4) std::memcpy(&block->shared[i], &kPoison, 4);
    block->words.resize(launch_.shared_bytes / 4);
    block->warps.resize(launch_.threads / kWarp);
    for (int number = 0; number < launch_.threads; ++number) {
      auto thread = std::make_unique<Thread>();
      thread->number = number;
      thread->lane = number % kWarp;
      thread->in_cluster = rank * launch_.threads + number;
      thread->block = block.get();
      thread->warp = &block->warps[number / kWarp];
      thread->warp->lanes[thread->lane] = thread.get();
      if (free_stacks_.empty()) {
        void* const memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
        free_stacks_.push_back(static_cast<char*>(memory));
      }
      thread->stack = free_stacks_.back();
      free_stacks_.pop_back();
      prepare(*thread);
      ready_.push_back(thread.get());
      threads_.push_back(std::move(thread));
    }
    cluster->blocks.push_back(std::move(block));
  }
  clusters_.push_back(std::move(cluster));
  ++next_cluster_;
}

void Machine::finish(Thread* thread) {
  const auto copies = [](const std::vector<Copy>& group) { return !group.empty(); };
  if (!thread->open.empty() || std::any_of(thread->groups.begin(), thread->groups.end(), copies)) {
    fail("ends while a copy is under way", thread->open.empty() ? thread->groups.back().back().here
                                                                : thread->open.back().here);
  }
  thread->state = State::kDone;
  free_stacks_.push_back(thread->stack);
  --thread->block->running;
  if (thread->block->running == 0) {
    for (Warp& warp : thread->block->warps) count_accesses(warp);
  }
}

Report Machine::run() {
  Machine* const before = machine;
  machine = this;
  const int clusters = launch_.blocks / launch_.cluster;
  // Volatile: changed between setjmp and longjmp.
  volatile bool more = true;
  while (more) {
    while (next_cluster_ < clusters) {
      const auto running = std::count_if(clusters_.begin(), clusters_.end(), [](const auto& cluster) {
        return std::any_of(cluster->blocks.begin(), cluster->blocks.end(), [](const auto& b) { return b->running > 0; });
      });
      if (running >= launch_.clusters_at_a_time) break;
      start_cluster();
    }
    if (stopped_ || ready_.empty()) {
      if (!stopped_) report_deadlock();
      more = false;
      continue;
    }
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    current = ready_.back();
    ready_.pop_back();
    if (_setjmp(scheduler_) == 0) {
      if (current->started) _longjmp(current->place, 1);
      current->started = true;
      setcontext(&current->context);
    }
  }
  for (const auto& thread : threads_) {
    if (thread->state != State::kDone) free_stacks_.push_back(thread->stack);
  }
  for (char* stack : free_stacks_) munmap(stack, kStack);
  machine = before;
  return report_;
}

void Machine::report_deadlock() {
  for (const auto& thread : threads_) {
    if (thread->state == State::kDone) continue;
    const char* const what = thread->state == State::kWarp    ? "waits for its warp"
                             : thread->state == State::kBlock ? "waits at a barrier"
                                                              : "waits at a barrier of the cluster";
    current = thread.get();
    char text[512];
    std::snprintf(text, sizeof(text), "block %d, thread %d, %s:%u: %s, where others never come", thread->block->number,
                  thread->number, strip(thread->here.file_name()), thread->here.line(), what);
    report_.error = text;
    return;
  }
}

unsigned char* Machine::access(uint32_t address, int bytes, bool writes, Here here, Thread* who, bool remote,
                               bool by_copy) {
  const uint32_t rank = address >> kRankShift, offset = address & ((1u << kRankShift) - 1);
  Cluster& cluster = *who->block->cluster;
  char text[128];
  const auto describe = [&](const char* what) {
    std::snprintf(text, sizeof(text), "%s, %d bytes at %u of %zu of shared memory", what, bytes, offset,
                  who->block->shared.size());
    return std::string(text);
  };
  if (rank >= cluster.blocks.size() || (!remote && static_cast<int>(rank) != who->block->rank)) {
    fail(describe("an address of another block"), here, who);
  }
  Block& block = *cluster.blocks[rank];
  if (offset + bytes > block.shared.size()) fail(describe(writes ? "writes outside" : "reads outside"), here, who);
  if (offset % bytes) fail(describe("misaligned"), here, who);
  if (block.running == 0) fail(describe("uses memory of a block that is done"), here, who);
  const uint32_t now = who->block->barriers, now_cluster = cluster.barriers;
  for (int i = 0; i < bytes / 4; ++i) {
    Word& word = block.words[offset / 4 + i];
    if (word.copying) fail(describe("uses what is still being copied"), here, who);
    if (!writes && !word.initialised) fail(describe("reads what nothing wrote"), here, who);
    // Whether no barrier that both threads wait at was between.
    const bool by_other = word.writer != kNobody && word.writer != who->in_cluster;
    const bool of_block = by_other && word.writer / launch_.threads == who->block->rank;
    if (by_other && (of_block ? word.written == now : word.written_cluster == now_cluster)) {
      fail(describe(writes ? "writes what another thread writes" : "reads what another thread writes"), here, who);
    }
    // Only threads of the memory's own block read it.
    const bool read_now = &block == who->block ? word.read == now : word.read_cluster == now_cluster;
    if (writes && word.reader != kNobody && word.reader != who->in_cluster && read_now) {
      fail(describe("writes what another thread reads"), here, who);
    }
    if (writes) {
      word.writer = who->in_cluster;
      word.written = now;
      word.written_cluster = now_cluster;
      word.initialised = true;
      word.copying = by_copy;
    } else {
      const bool again = word.read == now && word.read_cluster == now_cluster;
      word.reader = again && word.reader != kNobody && word.reader != who->in_cluster ? kSeveral : who->in_cluster;
      word.read = now;
      word.read_cluster = now_cluster;
    }
  }
  return &block.shared[offset];
}

void Machine::land(const Copy& copy) {
  Block& block = *current->block;
  const uint32_t offset = copy.to & ((1u << kRankShift) - 1);
  std::memcpy(&block.shared[offset], copy.from, 16);
  for (int i = 0; i < 4; ++i) {
    Word& word = block.words[offset / 4 + i];
    word.copying = false;
    word.written = block.barriers;
    word.written_cluster = block.cluster->barriers;
  }
}

void Machine::check_global(const void* address, int bytes, bool writes, bool atomic, Here here) {
  const auto* const first = static_cast<const unsigned char*>(address);
  for (size_t i = 0; i < launch_.buffers.size(); ++i) {
    const Buffer& buffer = launch_.buffers[i];
    const auto* const begin = static_cast<const unsigned char*>(buffer.begin);
    if (first < begin || first >= begin + buffer.bytes) continue;
    const std::string where = std::to_string(bytes) + " bytes at " + std::to_string(first - begin) + " of " +
                              std::to_string(buffer.bytes) + " of " + buffer.name;
    if (first + bytes > begin + buffer.bytes) fail("outside: " + where, here);
    if ((first - begin) % bytes) fail("misaligned: " + where, here);
    if (writes && !buffer.writable) fail("writes what is to be read only: " + where, here);
    if (!buffer.writable || atomic) return;
    const int self = current->block->number * launch_.threads + current->number;
    for (int byte = 0; byte < bytes; ++byte) {
      int& writer = writers_[i][first - begin + byte];
      if (writer != kNobody && writer != self) fail("used by two threads: " + where, here);
      if (writes) writer = self;
    }
    return;
  }
  fail(std::string(writes ? "writes" : "reads") + " outside of every global buffer", here);
}

bool Machine::meet(Together what, void* arguments, Here here) {
  Warp& warp = *current->warp;
  if (warp.arrived == 0) {
    warp.what = what;
    warp.here = here;
  } else if (warp.what != what || warp.here.line() != here.line()) {
    fail("its warp waits at line " + std::to_string(warp.here.line()) + " for something else", here);
  }
  current->arguments = arguments;
  if (++warp.arrived < kWarp) {
    yield(State::kWarp, here);
    return false;
  }
  count_accesses(warp);
  return true;
}

void Machine::leave_meeting() {
  current->warp->arrived = 0;
  for (Thread* lane : current->warp->lanes) {
    if (lane != current) release(lane);
  }
}

// A warp comes to a barrier together: to the same one.
void Machine::meet_at_barrier(State kind, Here here) {
  for (const Thread* lane : current->warp->lanes) {
    if (lane->state == kind && lane->here.line() != here.line()) {
      fail("its warp waits at another barrier, line " + std::to_string(lane->here.line()), here);
    }
  }
}

void Machine::barrier(Here here) {
  Block& block = *current->block;
  meet_at_barrier(State::kBlock, here);
  if (++block.arrived < launch_.threads) return yield(State::kBlock, here);
  block.arrived = 0;
  ++block.barriers;
  ++report_.barriers;
  for (Warp& warp : block.warps) {
    count_accesses(warp);
    for (Thread* lane : warp.lanes) {
      if (lane != current) release(lane);
    }
  }
}

void Machine::cluster_barrier(Here here) {
  Cluster& cluster = *current->block->cluster;
  meet_at_barrier(State::kCluster, here);
  if (++cluster.arrived < cluster.threads) return yield(State::kCluster, here);
  cluster.arrived = 0;
  ++cluster.barriers;
  ++report_.barriers;
  for (const auto& block : cluster.blocks) {
    ++block->barriers;
    for (Warp& warp : block->warps) {
      count_accesses(warp);
      for (Thread* lane : warp.lanes) {
        if (lane != current) release(lane);
      }
    }
  }
}

// What the lanes did since they last met, one warp-wide access after the other.
void Machine::count_accesses(Warp& warp) {
  const size_t count = warp.lanes[0]->accesses.size();
  for (size_t i = 0; i < count; ++i) {
    const Access& first = warp.lanes[0]->accesses[i];
    std::vector<std::pair<uint32_t, int>> lanes;
    for (const Thread* lane : warp.lanes) {
      if (i >= lane->accesses.size() || lane->accesses[i].here.line() != first.here.line()) continue;
      lanes.emplace_back(lane->accesses[i].address, lane->accesses[i].bytes);
    }
    if (lanes.size() == kWarp) count_conflicts(first.here, lanes);  // otherwise they have parted ways
  }
  for (Thread* lane : warp.lanes) lane->accesses.clear();
}

// 32 banks of four bytes serve 128 bytes at a time; the same word counts once.
void Machine::count_conflicts(const Here& here, const std::vector<std::pair<uint32_t, int>>& lanes) {
  Accesses& found = report_.accesses[here.function_name()];
  ++found.count;
  const size_t at_once = 128 / lanes[0].second;
  for (size_t first = 0; first < lanes.size(); first += at_once) {
    std::vector<uint32_t> words[32];
    size_t most = 1;
    for (size_t lane = first; lane < std::min(first + at_once, lanes.size()); ++lane) {
      for (int byte = 0; byte < lanes[lane].second; byte += 4) {
        const uint32_t word = (lanes[lane].first + byte) / 4;
        auto& of_bank = words[word % 32];
        if (std::find(of_bank.begin(), of_bank.end(), word) == of_bank.end()) of_bank.push_back(word);
        most = std::max(most, of_bank.size());
      }
    }
    found.conflicts += most - 1;
  }
}

}  // namespace

Report run(const Launch& launch, const std::function<void()>& kernel) {
  if (launch.threads % kWarp || launch.threads < kWarp || launch.cluster < 1 || launch.blocks % launch.cluster) {
    throw std::invalid_argument("whole warps and whole clusters");
  }
  return Machine(launch, kernel).run();
}

}  // namespace dynexec::simt

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
