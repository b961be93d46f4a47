// Asynchronous copies from global to shared memory (cp.async).
#pragma once
#include <utility>

#include "memory.h"

namespace ptx {

class AsynchronousCopies : public Memory {
 public:
  using Memory::Memory;

 protected:
  void start_copies(uint32_t lanes) {
    each(lanes, [&](int lane) {
      Copy copy{get<uint32_t>(0, lane) + uint64_t(i->target),
                get<uint64_t>(1, lane) + uint64_t(i->offset),
                i->bits,
                0,
                pc,
                {}};
      const uint32_t read = get<uint32_t>(2, lane);
      if (read > uint32_t(copy.bytes))
        throw Fault{"out of bounds",
                    "a copy of " + std::to_string(copy.bytes) + " bytes that reads " + std::to_string(read), lane};
      copy.read = int(read);
      aligned(copy.from, copy.bytes, lane);
      if (copy.read) {
        std::memcpy(copy.content, global_memory(copy.from, copy.read, nullptr, lane), read);
        each_source(copy, lane, [](Byte& byte) { ++byte.copies; });
      }
      memory(sp::shared, copy.to, copy.bytes, copy.content, lane);
      std::fill_n(&targeted[copy.to], copy.bytes, int16_t(warp_index * kWarp + lane));
      warp->copies[lane].open.push_back(copy);
    });
  }
  void commit_copies(uint32_t lanes) {
    each(lanes, [&](int lane) {
      Copies& of_lane = warp->copies[lane];
      of_lane.groups.push_back(std::move(of_lane.open));
      of_lane.open.clear();
    });
  }
  void wait_copies(uint32_t lanes) {
    each(lanes, [&](int lane) {
      auto& groups = warp->copies[lane].groups;
      while (int64_t(groups.size()) > i->offset) {
        for (const Copy& copy : groups.front()) {
          if (copy.read) {
            // Both accesses may happen as late as now.
            each_source(copy, lane, [](Byte& byte) { --byte.copies; });
            global_memory(copy.from, copy.read, nullptr, lane);
          }
          std::fill_n(&targeted[copy.to], copy.bytes, int16_t(-1));
          std::memcpy(memory(sp::shared, copy.to, copy.bytes, copy.content, lane), copy.content, size_t(copy.bytes));
        }
        groups.erase(groups.begin());
      }
    });
  }
  // Of the bytes that a copy reads, those that the launch may write.
  template <class Visit>
  void each_source(const Copy& copy, int lane, const Visit& visit) {
    const Buffer& b = buffer_of(copy.from, copy.read, false, lane);
    for (uint64_t x = copy.from - b.address; x < copy.from - b.address + uint64_t(copy.read); ++x)
      if (b.permissions[x] & 2) visit(shadows[size_t(last_buffer)].at(x));
  }

  void check_copies() {
    for (warp_index = 0; warp_index < int(warps.size()); ++warp_index)
      for (int lane = 0; lane < kWarp; ++lane) {
        Copies& of_lane = warps[size_t(warp_index)].copies[lane];
        of_lane.groups.push_back(of_lane.open);
        for (const auto& group : of_lane.groups) {
          if (group.empty()) continue;
          pc = group.front().pc;
          throw Fault{"asynchronous copy", "the thread has left without a wait for it", lane};
        }
      }
    warp_index = 0;
  }
};

}  // namespace ptx
