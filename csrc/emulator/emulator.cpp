#include "emulator.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <vector>

#include "fiber.h"

namespace sb::emulator {
namespace {

constexpr int kWarp = 32, kBanks = 32;
constexpr size_t kStackBytes = size_t(64) << 10;

enum class State { kReady, kAtWarp, kAtBlock, kDone };
enum class Rendezvous { kBarrier, kShuffle };

struct Thread {
  Fiber fiber;
  State state = State::kReady;
  Place place{};      // of the barrier or shuffle where it waits
  Rendezvous kind{};  // of a warp
  int mask = 0;       // of a shuffle
  uint64_t given = 0, got = 0;
  std::vector<int64_t> accesses;  // addresses in shared memory since the warp last met
};

// Who accessed a byte of shared memory last. Counts of barriers say whether one stands between two accesses.
struct Access {
  int64_t block_count = -1, warp_count = -1;
  int thread = -1;
  bool by_warps = false, by_lanes = false;  // several of them, since that barrier
};
struct Byte {
  Access write, read;
  bool is_written = false;
};

struct Launch {
  const char* kernel;
  int64_t blocks;
  int threads;
  const std::function<void()>& body;
};

// The block that runs.
struct Block {
  explicit Block(const Launch& launch) : launch(launch) {}
  const Launch& launch;
  int64_t index = 0;
  int current = 0;
  Fiber scheduler;
  std::vector<Thread> threads;
  std::vector<unsigned char> memory;
  std::vector<Byte> bytes;
  int64_t block_count = 0;
  std::vector<int64_t> warp_count;
  std::exception_ptr fault;
};

Block* block = nullptr;
std::vector<Exposed> exposed;
size_t last_exposed = 0;
Observer observer = nullptr;
Statistics counts{};

[[noreturn]] void fail(const char* fault, const std::string& what, Place place) {
  const char* file = std::strrchr(place.file, '/');
  throw std::runtime_error(std::string(fault) + ": " + what + ", in kernel " + block->launch.kernel + ", block " +
                           std::to_string(block->index) + ", thread " + std::to_string(block->current) + ", at " +
                           (file ? file + 1 : place.file) + ":" + std::to_string(place.line));
}

void enter() {
  try {
    block->launch.body();
  } catch (...) {
    block->fault = std::current_exception();
  }
  block->threads[size_t(block->current)].state = State::kDone;
  switch_fiber(block->threads[size_t(block->current)].fiber, block->scheduler);
}

void wait(State state, Place place) {
  Thread& self = block->threads[size_t(block->current)];
  self.state = state, self.place = place;
  switch_fiber(self.fiber, block->scheduler);
}

bool same(Place a, Place b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// -------------------- shared memory

// Whether `access` and one of thread `t` now are ordered.
bool is_ordered(const Access& access, int t) {
  if (access.block_count != block->block_count) return true;
  if (access.by_warps || access.thread / kWarp != t / kWarp) return false;
  return access.warp_count != block->warp_count[size_t(t / kWarp)] || (!access.by_lanes && access.thread == t);
}

void note(Access& access, int t) {
  const int64_t warp_count = block->warp_count[size_t(t / kWarp)];
  if (access.block_count != block->block_count)
    access = {block->block_count, warp_count, t, false, false};
  else if (access.thread / kWarp != t / kWarp)
    access.by_warps = true;
  else if (access.warp_count != warp_count)
    access.thread = t, access.warp_count = warp_count, access.by_lanes = false;
  else if (access.thread != t)
    access.by_lanes = true;
}

// The k-th accesses of a warp's lanes since they last met are one instruction.
void count_conflicts(int warp) {
  Thread* lanes = &block->threads[size_t(warp * kWarp)];
  size_t most = 0;
  for (int l = 0; l < kWarp; ++l) most = std::max(most, lanes[l].accesses.size());
  for (size_t k = 0; k < most; ++k) {
    int64_t words[kBanks][kWarp];
    int used[kBanks] = {}, passes = 1;
    for (int l = 0; l < kWarp; ++l) {
      if (k >= lanes[l].accesses.size()) continue;
      const int64_t word = lanes[l].accesses[k];
      const int bank = int(word % kBanks);
      if (std::find(words[bank], words[bank] + used[bank], word) != words[bank] + used[bank]) continue;
      words[bank][used[bank]++] = word;
      passes = std::max(passes, used[bank]);
    }
    ++counts.shared_accesses, counts.bank_conflicts += passes - 1;
  }
  for (int l = 0; l < kWarp; ++l) lanes[l].accesses.clear();
}

// -------------------- scheduling

void meet(int warp) {
  Thread* lanes = &block->threads[size_t(warp * kWarp)];
  for (int l = 0; l < kWarp; ++l) {
    block->current = warp * kWarp + l;
    if (lanes[l].state != State::kAtWarp)
      fail("divergent warp",
           std::string("this lane ") + (lanes[l].state == State::kDone ? "has left" : "waits for its block") +
               " while others of its warp wait for it",
           lanes[l].state == State::kDone ? lanes[0].place : lanes[l].place);
    if (lanes[l].kind != lanes[0].kind || lanes[l].mask != lanes[0].mask || !same(lanes[l].place, lanes[0].place))
      fail("divergent warp", "lanes wait at different places, the first at line " + std::to_string(lanes[0].place.line),
           lanes[l].place);
  }
  count_conflicts(warp);
  if (lanes[0].kind == Rendezvous::kBarrier) {
    ++block->warp_count[size_t(warp)];
  } else {
    ++counts.shuffles;
    for (int l = 0; l < kWarp; ++l) lanes[l].got = lanes[l ^ lanes[l].mask].given;
  }
  for (int l = 0; l < kWarp; ++l) lanes[l].state = State::kReady;
}

// Runs a warp until all of its lanes have left or wait for the block.
void run_warp(int warp) {
  Thread* lanes = &block->threads[size_t(warp * kWarp)];
  while (true) {
    bool any_at_warp = false;
    for (int l = 0; l < kWarp; ++l) {
      if (lanes[l].state == State::kReady) {
        block->current = warp * kWarp + l;
        switch_fiber(block->scheduler, lanes[l].fiber);
        if (block->fault) std::rethrow_exception(block->fault);
      }
      any_at_warp |= lanes[l].state == State::kAtWarp;
    }
    if (!any_at_warp) return count_conflicts(warp);
    meet(warp);
  }
}

void run_block() {
  const int warps = block->launch.threads / kWarp;
  while (true) {
    for (int w = 0; w < warps; ++w) run_warp(w);
    int waiting = 0;
    const Thread* first = nullptr;
    for (const Thread& thread : block->threads) {
      if (thread.state != State::kAtBlock) continue;
      ++waiting;
      if (!first) first = &thread;
      block->current = int(&thread - block->threads.data());
      if (!same(first->place, thread.place))
        fail("divergent barrier",
             "threads wait at different barriers, the first at line " + std::to_string(first->place.line),
             thread.place);
    }
    if (waiting == 0) return;
    if (waiting < block->launch.threads)
      fail("divergent barrier",
           std::to_string(block->launch.threads - waiting) + " of " + std::to_string(block->launch.threads) +
               " threads have left",
           first->place);
    ++block->block_count, ++counts.barriers;
    for (Thread& thread : block->threads) thread.state = State::kReady;
  }
}

}  // namespace

Statistics& statistics() { return counts; }

void launch(const char* kernel, int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& body,
            const KernelCall& call) {
  if (threads % kWarp != 0 || threads <= 0 || threads > 1024)
    throw std::runtime_error(std::string("the kernel ") + kernel + " is started with " + std::to_string(threads) +
                             " threads; expected whole warps, at most 1024 threads");
  if (shared_bytes > 227 << 10)
    throw std::runtime_error(std::string("the kernel ") + kernel + " asks for " + std::to_string(shared_bytes) +
                             " bytes of shared memory; no device has more than 227 KB for a block");
  const Launch launched{kernel, blocks, threads, body};
  Block running(launched);
  running.threads.resize(size_t(threads)), running.warp_count.resize(size_t(threads / kWarp));
  struct Current {
    explicit Current(Block* running) { block = running; }
    ~Current() { block = nullptr; }
  } current(&running);
  const Observed seen{kernel, call, blocks, threads, shared_bytes, exposed.data(), int64_t(exposed.size())};
  if (observer) observer(&seen, false);
  ++counts.launches;
  for (running.index = 0; running.index < blocks; ++running.index) {
    ++counts.blocks;
    running.memory.assign(size_t(shared_bytes), 0xff), running.bytes.assign(size_t(shared_bytes), Byte());
    running.block_count = 0;
    std::fill(running.warp_count.begin(), running.warp_count.end(), 0);
    for (Thread& thread : running.threads) thread.state = State::kReady, start_fiber(thread.fiber, kStackBytes, &enter);
    run_block();
  }
  if (observer) observer(&seen, true);
}

void observe(Observer by) { observer = by; }

void expose(const void* data, int64_t bytes, bool is_writable, int element) {
  if (!data || bytes <= 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  exposed.push_back({begin, begin + uintptr_t(bytes), is_writable, element});
}
void withdraw_all() { exposed.clear(), last_exposed = 0; }

int thread_index() { return block->current; }
int block_threads() { return block->launch.threads; }
int64_t block_index() { return block->index; }
int64_t grid_blocks() { return block->launch.blocks; }

void sync_block(Place place) { wait(State::kAtBlock, place); }
void sync_warp(Place place) {
  block->threads[size_t(block->current)].kind = Rendezvous::kBarrier;
  wait(State::kAtWarp, place);
}
uint64_t shuffle_bits(uint64_t bits, int mask, Place place) {
  Thread& self = block->threads[size_t(block->current)];
  self.kind = Rendezvous::kShuffle, self.mask = mask, self.given = bits;
  wait(State::kAtWarp, place);
  self.mask = 0;
  return self.got;
}

void* shared_access(int64_t offset, int64_t bytes, bool is_write, Place place) {
  const auto at = [&] { return "shared memory byte " + std::to_string(offset); };
  if (offset < 0 || offset + bytes > int64_t(block->memory.size()))
    fail("out of bounds", at() + " of " + std::to_string(block->memory.size()), place);
  if (offset % bytes != 0) fail("out of bounds", at() + " is not aligned to " + std::to_string(bytes), place);
  const int t = block->current;
  for (int64_t i = offset; i < offset + bytes; ++i) {
    Byte& byte = block->bytes[size_t(i)];
    if (!is_write && !byte.is_written) fail("uninitialised shared memory", at(), place);
    if (!is_ordered(byte.write, t))
      fail("race", at() + " was written by thread " + std::to_string(byte.write.thread) + " and no barrier follows",
           place);
    if (is_write && !is_ordered(byte.read, t))
      fail("race", at() + " was read by thread " + std::to_string(byte.read.thread) + " and no barrier follows", place);
    note(is_write ? byte.write : byte.read, t);
    byte.is_written |= is_write;
  }
  block->threads[size_t(t)].accesses.push_back(offset / 4);
  return &block->memory[size_t(offset)];
}

void global_access(const void* data, int64_t bytes, bool is_write, Place place) {
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + uintptr_t(bytes);
  const auto has = [&](const Exposed& range) {
    return range.begin <= begin && end <= range.end && (range.is_writable || !is_write);
  };
  if (last_exposed < exposed.size() && has(exposed[last_exposed])) return;
  bool is_input = false;
  for (size_t i = 0; i < exposed.size(); ++i) {
    if (has(exposed[i])) {
      last_exposed = i;
      return;
    }
    is_input |= exposed[i].begin <= begin && end <= exposed[i].end;
  }
  if (is_input) fail("write to an input", "the launcher named this tensor as one that is only read", place);
  fail("out of bounds",
       std::string(is_write ? "a write of " : "a read of ") + std::to_string(bytes) +
           " bytes of global memory that belong to no tensor of the call",
       place);
}

}  // namespace sb::emulator
