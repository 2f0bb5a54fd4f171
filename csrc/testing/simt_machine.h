// What runs the threads of simt.h: memory with its history, warps, barriers, the order of things.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "simt.h"

namespace dynexec::simt {

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

extern Machine* machine;  // the one that runs

}  // namespace dynexec::simt
