// How the machine runs: turns of threads, meetings of warps, barriers, deadlocks, checks of memory.
#undef _FORTIFY_SOURCE  // its longjmp takes another thread's stack for a mistake
#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

#include "simt_machine.h"

namespace dynexec::simt {

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

Report run(const Launch& launch, const std::function<void()>& kernel) {
  if (launch.threads % kWarp || launch.threads < kWarp || launch.cluster < 1 || launch.blocks % launch.cluster) {
    throw std::invalid_argument("whole warps and whole clusters");
  }
  return Machine(launch, kernel).run();
}

}  // namespace dynexec::simt
