// Runs CUDA kernels on the host, one thread block at a time, and checks what a device would not. Every thread of a
// block is a fiber; a barrier switches to the next one. A fault ends the launch with an exception that names the fault,
// the kernel, the block, the thread and the line of the kernel's source:
//   race                        two threads of a block access memory, one of them writes, and no barrier stands between
//   race between blocks         the same of threads of different blocks of a launch, in global memory
//   uninitialised shared memory a read of what no thread of the block has written
//   uninitialised global memory a read of what nothing has written since the launcher made the tensor
//   out of bounds               an access outside shared memory, or outside the tensors that the launcher named
//   misaligned                  an address that is no multiple of its type's alignment
//   write to an input           a write to a tensor that the launcher named as read-only
//   divergent barrier           threads of a block wait at different barriers, or some have left
//   divergent warp              the same of a warp's barriers and shuffles
// Threads that write the same value to a place of global memory do not race. Bank conflicts are counted (Statistics).
// What it cannot see: time, and a wrong tensor of the call where the right one was meant.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

namespace sb::emulator {

// A line of a kernel's source.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Statistics {
  int64_t launches, blocks, barriers, shuffles;
  int64_t shared_accesses;  // of warps: the lanes' together count once
  int64_t bank_conflicts;   // further passes that those take; 128 bytes fit into one
  int64_t copied_bytes;     // of global memory that asynchronous copies have read
};
Statistics& statistics();

// The function of a kernel, whose symbol names it, and its one argument.
struct KernelCall {
  const void* function;
  const void* params;
  int64_t param_bytes;
};

// Runs body once for every thread of every block.
void launch(const char* kernel, int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& body,
            const KernelCall& call);

// Memory that kernels may access from here on, and none any more. `element`: torch's number of its scalar type.
void expose(const void* data, int64_t bytes, bool is_writable, int element, int64_t bytes_of_element);
void withdraw_all();
// What new memory holds until something writes it: NaN, or an integer that is no index and no count.
constexpr unsigned char unwritten_byte(int element) {
  return (element >= 5 && element <= 7) || element == 15 ? 0xff : 0x87;
}
void fill_unwritten(void* data, int64_t bytes, int element);

// Launches have at most so many blocks from here on, each of which then takes several tasks.
void limit_grid(int64_t blocks);

// Memory that a launch may access.
struct Exposed {
  uintptr_t begin, end;
  int64_t is_writable, element;
};
// What an observer sees before and after every launch.
struct Observed {
  const char* kernel;
  KernelCall call;
  int64_t blocks, threads, shared_bytes;
  const Exposed* exposed;
  int64_t exposed_count;
};
typedef void (*Observer)(const Observed*, int32_t is_after);
void observe(Observer observer);  // null: nobody

// -------------------- what a thread may call

int thread_index();
int block_threads();
int64_t block_index();
int64_t grid_blocks();
void sync_block(Place place);
void sync_warp(Place place);
// The bits of another lane's value.
uint64_t shuffle_bits(uint64_t bits, int mask, Place place);
// Calls `together` once with what the lanes of the warp give, when all of them are here.
typedef void (*Together)(void* const* given);
void with_warp(Together together, void* given, Place place);
void* shared_access(int64_t offset, int64_t bytes, bool is_write, Place place);
// `written`: the value that the access writes, null where it reads.
void global_access(const void* data, int64_t bytes, int64_t alignment, const void* written, Place place);

template <class V>
V exchanged(V value, int mask, Place place) {
  static_assert(sizeof(V) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = shuffle_bits(bits, mask, place);
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

// The bits of the value of lane `from`; bit l: whether lane l says yes.
uint64_t shuffle_bits_from(uint64_t bits, int from, Place place);
uint32_t ballot(bool yes, Place place);

template <class V>
V exchanged_from(V value, int from, Place place) {
  static_assert(sizeof(V) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = shuffle_bits_from(bits, from, place);
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

}  // namespace sb::emulator
