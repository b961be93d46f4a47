// Kernels with one fault each, and some without: what the emulator must catch by name, and must let pass. Compiled with
// csrc/emulator alone (test_emulator.py).
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "launch.h"

namespace sb::cuda {
namespace {

struct SmallParams {
  int32_t *made, *other;  // new memory, kCount numbers each
  const int32_t* given;   // an input, kCount numbers: 0, 1, 2, ...
  int64_t blocks;
};

constexpr int kThreads = 64;
constexpr int64_t kCount = 256, kSharedBytes = kThreads * int64_t(sizeof(int32_t));

SB_DEVICE int64_t element() { return block_index() * block_threads() + thread_index(); }

// -------------------- shared memory

SB_KERNEL shared_after_a_barrier(SmallParams p) {
  const auto shared = shared_array<int32_t>(0);
  for_each_task(p.blocks, [&](int64_t task) {
    const int t = thread_index();
    shared.set(t, load(p.given + task * kThreads + t));
    sync_block();
    store(p.made + task * kThreads + t, shared.get(kThreads - 1 - t));
    sync_block();
  });
}
SB_KERNEL shared_without_a_barrier_between_tasks(SmallParams p) {
  const auto shared = shared_array<int32_t>(0);
  for_each_task(p.blocks, [&](int64_t task) {
    const int t = thread_index();
    shared.set(t, load(p.given + task * kThreads + t));
    sync_block();
    store(p.made + task * kThreads + t, shared.get(kThreads - 1 - t));
  });
}
SB_KERNEL shared_after_a_warps_barrier(SmallParams) {
  const auto shared = shared_array<int32_t>(0);
  shared.set(thread_index(), 1);
  sync_warp();
  shared.get(thread_index() ^ 1);
}
SB_KERNEL shared_of_another_warp_after_a_warps_barrier(SmallParams) {
  const auto shared = shared_array<int32_t>(0);
  shared.set(thread_index(), 1);
  sync_warp();
  shared.get(thread_index() ^ kWarp);
}
SB_KERNEL shared_after_a_shuffle(SmallParams) {
  const auto shared = shared_array<int32_t>(0);
  shared.set(thread_index(), 1);
  shuffle_xor(thread_index(), 1);
  shared.get(thread_index() ^ 1);
}
SB_KERNEL shared_read_then_written(SmallParams) {
  const auto shared = shared_array<int32_t>(0);
  shared.set(thread_index(), 1);
  sync_block();
  shared.get((thread_index() + kWarp) % kThreads);
  shared.set(thread_index(), 2);
}
SB_KERNEL shared_read_by_two_warps_then_written(SmallParams) {
  const auto shared = shared_array<int32_t>(0);
  if (thread_index() == 0) shared.set(0, 1);
  sync_block();
  shared.get(0);
  sync_warp();
  if (thread_index() == kWarp) shared.set(0, 2);
}
SB_KERNEL shared_of_the_block_before(SmallParams) {
  const auto shared = shared_array<int32_t>(0);
  if (block_index() == 0) shared.set(thread_index(), 1);
  if (block_index() == 1) shared.get(thread_index());
}
SB_KERNEL shared_half_written(SmallParams) {
  shared_array<uint16_t>(0).set(2 * thread_index(), 1);
  shared_array<int32_t>(0).get(thread_index());
}
SB_KERNEL shared_beyond_its_end(SmallParams) { shared_array<int32_t>(0).set(thread_index() + 1, 1); }
SB_KERNEL shared_before_its_begin(SmallParams) { shared_array<int32_t>(0).set(thread_index() - 1, 1); }
SB_KERNEL shared_misaligned(SmallParams) { shared_array<int32_t>(2).set(0, 1); }

// -------------------- barriers and shuffles

SB_KERNEL barrier_of_some(SmallParams) {
  if (thread_index() < kWarp) sync_block();
}
SB_KERNEL barrier_in_two_branches(SmallParams) {
  if (thread_index() < kWarp)
    sync_block();
  else
    sync_block();
}
SB_KERNEL barrier_more_often_by_some(SmallParams) {
  for (int i = 0; i < 1 + thread_index() / kWarp; ++i) sync_block();
}
SB_KERNEL warp_barrier_of_some(SmallParams) {
  if (thread_index() % 2) sync_warp();
}
SB_KERNEL shuffle_of_some(SmallParams) {
  if (thread_index() % kWarp < 16) shuffle_xor(1, 1);
}
SB_KERNEL shuffle_by_different_masks(SmallParams) { shuffle_xor(1, thread_index() % 2 ? 1 : 2); }
SB_KERNEL warp_barrier_against_a_block_barrier(SmallParams) {
  thread_index() % kWarp == 5 ? sync_block() : sync_warp();
}

// -------------------- global memory

SB_KERNEL global_after_a_barrier(SmallParams p) {
  store(p.made + element(), 1);
  sync_block();
  load(p.made + (element() ^ kWarp));
}
SB_KERNEL global_without_a_barrier(SmallParams p) {
  store(p.made + element(), 1);
  load(p.made + (element() & ~int64_t(1)));
}
SB_KERNEL global_read_then_written(SmallParams p) {
  store(p.made + element(), 1);
  sync_block();
  load(p.made + (element() ^ kWarp));
  store(p.made + element(), 2);
}
SB_KERNEL global_of_another_block(SmallParams p) {
  store(p.made + element(), 1);
  sync_block();
  if (block_index() == 1) load(p.made + thread_index());
}
SB_KERNEL global_read_by_two_blocks_then_written(SmallParams p) {
  load(p.other + thread_index());
  sync_block();
  if (block_index() == 1) store(p.other + thread_index(), 7);
}
SB_KERNEL global_written_by_two_blocks(SmallParams p) { store(p.made + thread_index(), int32_t(block_index())); }
SB_KERNEL global_same_value_by_all(SmallParams p) { store(p.made, 1); }
SB_KERNEL global_same_value_by_all_then_read(SmallParams p) {
  store(p.made, 1);
  sync_block();
  load(p.made);
}
SB_KERNEL global_of_the_launch_before(SmallParams p) { load(p.other + thread_index() % 2); }
SB_KERNEL global_unwritten(SmallParams p) { load(p.made + element()); }
SB_KERNEL global_beyond_its_end(SmallParams p) { load(p.given + kCount - 1 + thread_index()); }
SB_KERNEL global_across_its_end(SmallParams p) { load(reinterpret_cast<const RowRange*>(p.given + kCount - 4)); }
SB_KERNEL global_misaligned(SmallParams p) { load(reinterpret_cast<const double*>(p.given + 1 + thread_index() % 2)); }
SB_KERNEL global_input_written(SmallParams p) { store(const_cast<int32_t*>(p.given), 0); }

SB_KERNEL write_other(SmallParams p) { store(p.other + element(), int32_t(element())); }

#define SB_SMALL(kernel) {#kernel, &kernel}
const std::map<std::string, void (*)(SmallParams)> kernels = {SB_SMALL(shared_after_a_barrier),
                                                              SB_SMALL(shared_without_a_barrier_between_tasks),
                                                              SB_SMALL(shared_after_a_warps_barrier),
                                                              SB_SMALL(shared_of_another_warp_after_a_warps_barrier),
                                                              SB_SMALL(shared_after_a_shuffle),
                                                              SB_SMALL(shared_read_then_written),
                                                              SB_SMALL(shared_read_by_two_warps_then_written),
                                                              SB_SMALL(shared_of_the_block_before),
                                                              SB_SMALL(shared_half_written),
                                                              SB_SMALL(shared_beyond_its_end),
                                                              SB_SMALL(shared_before_its_begin),
                                                              SB_SMALL(shared_misaligned),
                                                              SB_SMALL(barrier_of_some),
                                                              SB_SMALL(barrier_in_two_branches),
                                                              SB_SMALL(barrier_more_often_by_some),
                                                              SB_SMALL(warp_barrier_of_some),
                                                              SB_SMALL(shuffle_of_some),
                                                              SB_SMALL(shuffle_by_different_masks),
                                                              SB_SMALL(warp_barrier_against_a_block_barrier),
                                                              SB_SMALL(global_after_a_barrier),
                                                              SB_SMALL(global_without_a_barrier),
                                                              SB_SMALL(global_read_then_written),
                                                              SB_SMALL(global_of_another_block),
                                                              SB_SMALL(global_read_by_two_blocks_then_written),
                                                              SB_SMALL(global_written_by_two_blocks),
                                                              SB_SMALL(global_same_value_by_all),
                                                              SB_SMALL(global_same_value_by_all_then_read),
                                                              SB_SMALL(global_of_the_launch_before),
                                                              SB_SMALL(global_unwritten),
                                                              SB_SMALL(global_beyond_its_end),
                                                              SB_SMALL(global_across_its_end),
                                                              SB_SMALL(global_misaligned),
                                                              SB_SMALL(global_input_written)};

std::string complaint(const std::string& name, int64_t largest_grid) {
  constexpr int kInt = 3;  // torch's number of int32
  std::vector<int32_t> made(kCount), other(kCount), given(kCount);
  const int64_t bytes = kCount * int64_t(sizeof(int32_t));
  for (int64_t i = 0; i < kCount; ++i) given[size_t(i)] = int32_t(i);
  emulator::withdraw_all(), emulator::limit_grid(largest_grid);
  for (std::vector<int32_t>* memory : {&made, &other}) {
    emulator::fill_unwritten(memory->data(), bytes, kInt);
    emulator::expose(memory->data(), bytes, true, kInt, sizeof(int32_t));
  }
  emulator::expose(given.data(), bytes, false, kInt, sizeof(int32_t));
  const SmallParams p{made.data(), other.data(), given.data(), 2};
  std::string what;
  try {
    launch(Stream{}, "write_other", p.blocks, kThreads, 0, write_other, p);
    launch(Stream{}, name.c_str(), p.blocks, kThreads, kSharedBytes, kernels.at(name), p);
  } catch (const std::exception& error) {
    what = error.what();
  }
  emulator::withdraw_all();
  return what;
}

}  // namespace
}  // namespace sb::cuda

#define SB_EXPORT __attribute__((visibility("default")))

extern "C" {

// What the emulator says of a kernel in two blocks, or in one that takes both tasks; empty where nothing.
SB_EXPORT const char* sb_complaint(const char* kernel, int64_t largest_grid) {
  static std::string kept;
  kept = sb::cuda::complaint(kernel, largest_grid);
  return kept.c_str();
}

// The names of the kernels, one per line.
SB_EXPORT const char* sb_kernels() {
  static std::string names;
  names.clear();
  for (const auto& [name, kernel] : sb::cuda::kernels) names += name + "\n";
  return names.c_str();
}
}
