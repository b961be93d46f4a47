#include "emulator.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <vector>

#include "fiber.h"
#include "matrix.h"

namespace sb::emulator {
namespace {

constexpr int kWarp = 32, kBanks = 32;
constexpr size_t kStackBytes = size_t(64) << 10;

enum class State { kReady, kAtWarp, kAtBlock, kDone };
enum class Rendezvous { kBarrier, kShuffle, kTogether };

constexpr int64_t kMostCopied = 16;

struct Copy {
  int64_t offset, bytes;
  unsigned char data[kMostCopied];
};
struct SharedAccess {
  int64_t word, words;
};

struct Thread {
  Fiber fiber;
  State state = State::kReady;
  Place place{};      // of the barrier or shuffle where it waits
  Rendezvous kind{};  // of a warp
  int mask = 0;       // of a shuffle
  uint64_t given = 0, got = 0;
  Together together = nullptr;
  void* argument = nullptr;
  std::vector<SharedAccess> accesses;  // since the warp last met
  std::vector<Copy> open;              // copies of no group yet
  std::vector<std::vector<Copy>> groups;
};

// Who accessed a byte of shared memory or an element of global memory last. Counts of barriers say whether one stands
// between two accesses. Blocks and their barriers are counted together and never anew, so that a count tells the block
// and the launch too.
struct Access {
  int64_t block_count = -1, warp_count = -1;
  int thread = -1;
  bool by_warps = false, by_lanes = false;  // several of them, since that barrier
  bool by_blocks = false;                   // several of them, in this launch
};
struct Byte {
  Access write, read;
  bool is_under_way = false;
};
constexpr int64_t kWord = 4;
struct Element {
  Access write, read;
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
  // The history of every word of it, or of its bytes by themselves where one of them was accessed alone. They go on
  // from block to block of a launch.
  std::vector<Byte> words, bytes;
  std::vector<char> is_split;
  int64_t launch_begin = 0, begin = 0;  // counts at the start of the launch and of this block
  int64_t block_count = 0;
  std::vector<int64_t> warp_count;
  std::exception_ptr fault;
};

Block* block = nullptr;
std::vector<Exposed> exposed;
std::vector<std::vector<Element>> elements;  // of each of them that is writable, from its first access on
std::vector<int64_t> element_bytes;
// A line of a kernel mostly goes on with the tensor that it accessed last.
constexpr int kLines = 512;
size_t last_exposed[kLines] = {};
int64_t last_count = 0;  // of barriers and blocks
int64_t largest_grid = INT64_MAX;
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

bool same(Place a, Place b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

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

// The same of global memory, which other blocks reach too.
bool is_ordered_on_device(const Access& access, int t) {
  if (access.block_count < block->launch_begin) return true;
  return !access.by_blocks && access.block_count >= block->begin && is_ordered(access, t);
}
void note_on_device(Access& access, int t) {
  const bool by_blocks =
      access.block_count >= block->launch_begin && (access.by_blocks || access.block_count < block->begin);
  note(access, t);
  access.by_blocks = by_blocks;
}
std::string who(const Access& access) {
  const std::string thread = "thread " + std::to_string(access.thread);
  return access.by_blocks || access.block_count < block->begin ? thread + " of another block" : thread;
}

// Calls `visit` with the histories of bytes of shared memory.
template <class Visit>
void visit_histories(int64_t offset, int64_t bytes, const Visit& visit) {
  for (int64_t i = offset; i < offset + bytes;) {
    const auto word = size_t(i / kWord);
    if (!block->is_split[word] && i % kWord == 0 && offset + bytes - i >= kWord) {
      visit(block->words[word]), i += kWord;
      continue;
    }
    if (!block->is_split[word]) {
      std::fill_n(&block->bytes[word * kWord], kWord, block->words[word]);
      block->is_split[word] = true;
    }
    visit(block->bytes[size_t(i)]), ++i;
  }
}

// The k-th accesses of a warp's lanes since they last met are one instruction.
void count_conflicts(int warp) {
  Thread* lanes = &block->threads[size_t(warp * kWarp)];
  size_t most = 0;
  for (int l = 0; l < kWarp; ++l) most = std::max(most, lanes[l].accesses.size());
  for (size_t k = 0; k < most; ++k) {
    int64_t width = 1;
    for (int l = 0; l < kWarp; ++l)
      if (k < lanes[l].accesses.size()) width = std::max(width, lanes[l].accesses[k].words);
    ++counts.shared_accesses;
    // As many lanes at a time as 128 bytes serve.
    for (int first = 0; first < kWarp; first += kWarp / int(width)) {
      // Mostly the words are of different banks, or all lanes read the same ones.
      uint64_t banks = 0;
      int64_t last = -1;
      bool is_one_pass = true;
      for (int l = first; is_one_pass && l < first + kWarp / int(width); ++l) {
        if (k >= lanes[l].accesses.size() || lanes[l].accesses[k].word == last) continue;
        last = lanes[l].accesses[k].word;
        const uint64_t of_lane = ((uint64_t(1) << width) - 1) << last % kBanks;
        is_one_pass = !(banks & of_lane) && of_lane >> kBanks == 0, banks |= of_lane;
      }
      if (is_one_pass) continue;
      int64_t words[kBanks][kWarp];
      int used[kBanks] = {}, passes = 1;
      for (int l = first; l < first + kWarp / int(width); ++l) {
        if (k >= lanes[l].accesses.size()) continue;
        for (int64_t word = lanes[l].accesses[k].word; word < lanes[l].accesses[k].word + width; ++word) {
          const int bank = int(word % kBanks);
          if (std::find(words[bank], words[bank] + used[bank], word) != words[bank] + used[bank]) continue;
          words[bank][used[bank]++] = word;
          passes = std::max(passes, used[bank]);
        }
      }
      counts.bank_conflicts += passes - 1;
    }
  }
  for (int l = 0; l < kWarp; ++l) lanes[l].accesses.clear();
}

// -------------------- scheduling

void meet(int warp) {
  Thread* lanes = &block->threads[size_t(warp * kWarp)];
  const Thread& waiting =
      *std::find_if(lanes, lanes + kWarp, [](const Thread& lane) { return lane.state == State::kAtWarp; });
  for (int l = 0; l < kWarp; ++l) {
    block->current = warp * kWarp + l;
    if (lanes[l].state != State::kAtWarp)
      fail("divergent warp",
           std::string("this lane ") + (lanes[l].state == State::kDone ? "has left" : "waits for its block") +
               " while others of its warp wait for it",
           lanes[l].state == State::kDone ? waiting.place : lanes[l].place);
    if (lanes[l].kind != lanes[0].kind || lanes[l].mask != lanes[0].mask || lanes[l].together != lanes[0].together ||
        !same(lanes[l].place, lanes[0].place))
      fail("divergent warp", "lanes wait at different places, the first at line " + std::to_string(lanes[0].place.line),
           lanes[l].place);
  }
  count_conflicts(warp);
  if (lanes[0].kind == Rendezvous::kBarrier) {
    ++block->warp_count[size_t(warp)];
  } else if (lanes[0].kind == Rendezvous::kTogether) {
    void* given[kWarp];
    for (int l = 0; l < kWarp; ++l) given[l] = lanes[l].argument;
    lanes[0].together(given);
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

void check_copies() {
  for (Thread& thread : block->threads) {
    block->current = int(&thread - block->threads.data());
    if (!thread.open.empty() || !thread.groups.empty())
      fail("asynchronous copy", "this thread has left without a wait for its copies", thread.place);
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
    if (waiting == 0) return check_copies();
    if (waiting < block->launch.threads)
      fail("divergent barrier",
           std::to_string(block->launch.threads - waiting) + " of " + std::to_string(block->launch.threads) +
               " threads have left",
           first->place);
    block->block_count = ++last_count, ++counts.barriers;
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
  blocks = std::min(blocks, largest_grid);
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
  running.launch_begin = last_count + 1;
  const auto words = size_t((shared_bytes + kWord - 1) / kWord);
  running.words.resize(words), running.bytes.resize(words * kWord), running.is_split.resize(words);
  for (running.index = 0; running.index < blocks; ++running.index) {
    ++counts.blocks;
    running.memory.assign(size_t(shared_bytes), 0xff);
    running.begin = running.block_count = ++last_count;
    std::fill(running.warp_count.begin(), running.warp_count.end(), 0);
    for (Thread& thread : running.threads) thread.state = State::kReady, start_fiber(thread.fiber, kStackBytes, &enter);
    run_block();
  }
  if (observer) observer(&seen, true);
}

void observe(Observer by) { observer = by; }

void limit_grid(int64_t blocks) { largest_grid = blocks; }

void expose(const void* data, int64_t bytes, bool is_writable, int element, int64_t bytes_of_element) {
  if (!data || bytes <= 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + uintptr_t(bytes);
  for (const Exposed& range : exposed)  // elements have one history
    if (range.is_writable && range.begin <= begin && end <= range.end) return;
  exposed.push_back({begin, end, is_writable, element});
  elements.emplace_back(), element_bytes.push_back(bytes_of_element);
}
void withdraw_all() { exposed.clear(), elements.clear(), element_bytes.clear(), std::fill_n(last_exposed, kLines, 0); }

void fill_unwritten(void* data, int64_t bytes, int element) {
  if (bytes > 0) std::memset(data, unwritten_byte(element), size_t(bytes));
}

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

void with_warp(Together together, void* given, Place place) {
  Thread& self = block->threads[size_t(block->current)];
  self.kind = Rendezvous::kTogether, self.together = together, self.argument = given;
  wait(State::kAtWarp, place);
  self.together = nullptr;
}

namespace {
struct Exchange {
  uint64_t given, got;
  int from;
};
void exchange(void* const* lanes) {
  for (int l = 0; l < kWarp; ++l) {
    auto& of_lane = *static_cast<Exchange*>(lanes[l]);
    of_lane.got = static_cast<const Exchange*>(lanes[of_lane.from % kWarp])->given;
  }
}
void vote(void* const* lanes) {
  uint64_t votes = 0;
  for (int l = 0; l < kWarp; ++l) votes |= static_cast<const Exchange*>(lanes[l])->given << l;
  for (int l = 0; l < kWarp; ++l) static_cast<Exchange*>(lanes[l])->got = votes;
}
}  // namespace

uint64_t shuffle_bits_from(uint64_t bits, int from, Place place) {
  Exchange of_lane{bits, 0, from};
  with_warp(&exchange, &of_lane, place);
  return of_lane.got;
}
uint32_t ballot(bool yes, Place place) {
  Exchange of_lane{yes, 0, 0};
  with_warp(&vote, &of_lane, place);
  return uint32_t(of_lane.got);
}

void* shared_access(int64_t offset, int64_t bytes, bool is_write, Place place) {
  const auto at = [&] { return "shared memory byte " + std::to_string(offset); };
  if (offset < 0 || offset + bytes > int64_t(block->memory.size()))
    fail("out of bounds", at() + " of " + std::to_string(block->memory.size()), place);
  if (offset % bytes != 0) fail("misaligned", at() + " is not aligned to " + std::to_string(bytes), place);
  const int t = block->current;
  visit_histories(offset, bytes, [&](Byte& byte) {
    if (byte.is_under_way) fail("asynchronous copy", at() + " has a copy under way", place);
    if (!is_write && byte.write.block_count < block->begin) fail("uninitialised shared memory", at(), place);
    if (!is_ordered(byte.write, t))
      fail("race", at() + " was written by " + who(byte.write) + " and no barrier follows", place);
    if (is_write && !is_ordered(byte.read, t))
      fail("race", at() + " was read by " + who(byte.read) + " and no barrier follows", place);
    note(is_write ? byte.write : byte.read, t);
  });
  block->threads[size_t(t)].accesses.push_back({offset / 4, std::max<int64_t>(bytes / 4, 1)});
  return &block->memory[size_t(offset)];
}

void copy_async(int64_t offset, const void* from, bool is_there, int64_t bytes, Place place) {
  if (is_there) global_access(from, bytes, bytes, nullptr, place), counts.copied_bytes += bytes;
  Thread& self = block->threads[size_t(block->current)];
  Copy copy{offset, bytes, {}};
  if (is_there) std::memcpy(copy.data, from, size_t(bytes));
  shared_access(offset, bytes, true, place);  // from here on it may land at any time
  std::memset(&block->memory[size_t(offset)], 0xff, size_t(bytes));
  visit_histories(offset, bytes, [](Byte& byte) { byte.is_under_way = true; });
  self.open.push_back(copy);
  self.place = place;
}
void commit_copies() {
  Thread& self = block->threads[size_t(block->current)];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}
void wait_copies(int open_groups, Place) {
  Thread& self = block->threads[size_t(block->current)];
  while (int(self.groups.size()) > open_groups) {
    for (const Copy& copy : self.groups.front()) {
      std::memcpy(&block->memory[size_t(copy.offset)], copy.data, size_t(copy.bytes));
      visit_histories(copy.offset, copy.bytes, [](Byte& byte) {
        byte.is_under_way = false;
        note(byte.write, block->current);
      });
    }
    self.groups.erase(self.groups.begin());
  }
}

namespace {

// An access to a writable tensor.
void track(size_t tensor, const void* data, int64_t bytes, const void* written, Place place) {
  const Exposed& range = exposed[tensor];
  const int64_t width = element_bytes[tensor];
  const auto offset = int64_t(reinterpret_cast<uintptr_t>(data) - range.begin);
  std::vector<Element>& of_tensor = elements[tensor];
  if (of_tensor.empty()) of_tensor.resize((range.end - range.begin + size_t(width) - 1) / size_t(width));
  const int t = block->current;
  // Threads may write the same to one place: which of them does is no matter.
  const bool is_same = written && std::memcmp(data, written, size_t(bytes)) == 0;
  const auto at = [&] { return "byte " + std::to_string(offset) + " of a tensor of the call"; };
  const auto race = [&](const char* done, const Access& by) {
    const bool is_of_block = !by.by_blocks && by.block_count >= block->begin;
    fail(is_of_block ? "race" : "race between blocks",
         at() + " was " + done + " by " + who(by) + (is_of_block ? " and no barrier follows" : " in this launch"),
         place);
  };
  for (int64_t i = offset / width; i <= (offset + bytes - 1) / width; ++i) {
    Element& element = of_tensor[size_t(i)];
    if (!written && element.write.block_count < 0) {
      const auto* first = static_cast<const unsigned char*>(data);
      const auto unwritten = unwritten_byte(int(range.element));
      if (std::all_of(first, first + bytes, [&](unsigned char byte) { return byte == unwritten; }))
        fail("uninitialised global memory", at(), place);
    }
    if (!is_same && !is_ordered_on_device(element.write, t)) race("written", element.write);
    if (written && !is_ordered_on_device(element.read, t)) race("read", element.read);
    note_on_device(written ? element.write : element.read, t);
  }
}

}  // namespace

void global_access(const void* data, int64_t bytes, int64_t alignment, const void* written, Place place) {
  const bool is_write = written;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + uintptr_t(bytes);
  const auto has = [&](const Exposed& range) {
    return range.begin <= begin && end <= range.end && (range.is_writable || !is_write);
  };
  if (begin % uintptr_t(alignment) != 0)
    fail("misaligned", "an address of global memory is not aligned to " + std::to_string(alignment), place);
  bool is_input = false;
  size_t& last = last_exposed[place.line % kLines];
  for (size_t i = last, seen = 0; seen < exposed.size(); ++seen, i = i + 1 == exposed.size() ? 0 : i + 1) {
    if (has(exposed[i])) {
      last = i;
      if (exposed[i].is_writable) track(i, data, bytes, written, place);
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
