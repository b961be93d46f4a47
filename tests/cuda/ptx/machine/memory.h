// Loads and stores, and what every access to memory is checked for.
#pragma once
#include <cstdio>

#include "arithmetic.h"

namespace ptx {

class Memory : public Arithmetic {
 public:
  using Arithmetic::Arithmetic;

 protected:
  Now now(int lane) const { return {int32_t(block), warp_index * kWarp + lane, block_epoch, warp->epoch}; }
  // `is_same`: the byte is written as it is, so that the order of the writes does not matter.
  void order(Byte& byte, bool is_write, bool is_same, int lane, const char* kind, uint64_t address) {
    const Now current = now(lane);
    const Mark* other = !is_same && !is_ordered(byte.write, current)  ? &byte.write
                        : is_write && !is_ordered(byte.read, current) ? &byte.read
                                                                      : nullptr;
    if (other) {
      char text[200];
      std::snprintf(text, sizeof text, "%s memory at 0x%llx was %s by thread %d of block %d, and nothing orders it",
                    kind, static_cast<unsigned long long>(address), other == &byte.write ? "written" : "read",
                    other->thread, other->block);
      throw Fault{"race", text, lane};
    }
    note(is_write ? byte.write : byte.read, current);
  }
  [[noreturn]] static void outside(const char* kind, uint64_t address, int bytes, bool is_write, int lane) {
    char text[200];
    std::snprintf(text, sizeof text, "a %s of %d bytes at 0x%llx of %s memory", is_write ? "write" : "read", bytes,
                  static_cast<unsigned long long>(address), kind);
    throw Fault{"out of bounds", text, lane};
  }

  static void aligned(uint64_t address, int bytes, int lane) {
    if (address % uint64_t(bytes) == 0) return;
    char text[100];
    std::snprintf(text, sizeof text, "%d bytes at 0x%llx", bytes, static_cast<unsigned long long>(address));
    throw Fault{"misaligned", text, lane};
  }

  // `written`: what a write puts there, null for a read.
  unsigned char* memory(int32_t space, uint64_t address, int bytes, const unsigned char* written, int lane) {
    const bool is_write = written != nullptr;
    if (space == sp::generic) {
      if (address >= kSharedWindow && address < kSharedWindow + kWindow)
        return memory(sp::shared, address - kSharedWindow, bytes, written, lane);
      if (address >= kLocalWindow && address < kLocalWindow + kWindow)
        return memory(sp::local, address - kLocalWindow, bytes, written, lane);
      space = sp::global;
    }
    aligned(address, bytes, lane);
    switch (space) {
      case sp::shared: {
        if (address > shared.size() || uint64_t(bytes) > shared.size() - address)
          outside("shared", address, bytes, is_write, lane);
        for (uint64_t x = address; x < address + uint64_t(bytes); ++x) {
          if (targeted[x] >= 0)
            throw Fault{"asynchronous copy",
                        "byte " + std::to_string(x) + " of shared memory, which thread " + std::to_string(targeted[x]) +
                            " fills and has not waited for",
                        lane};
          if (!is_write && !shared_set[x])
            throw Fault{"uninitialised shared memory", "byte " + std::to_string(x), lane};
          order(shared_marks[x], is_write, false, lane, "shared", x);
          shared_set[x] |= is_write;
        }
        return &shared[address];
      }
      case sp::local: {
        const uint64_t size = uint64_t(l.local_bytes), base = uint64_t(lane) * size;
        if (address > size || uint64_t(bytes) > size - address) outside("local", address, bytes, is_write, lane);
        for (uint64_t x = base + address; x < base + address + uint64_t(bytes); ++x) {
          if (!is_write && !warp->local_set[x])
            throw Fault{"uninitialised local memory", "byte " + std::to_string(x - base), lane};
          warp->local_set[x] |= is_write;
        }
        return &warp->local[base + address];
      }
      case sp::param:
        if (is_write || address > uint64_t(l.param_bytes) || uint64_t(bytes) > uint64_t(l.param_bytes) - address)
          outside("parameter", address, bytes, is_write, lane);
        return const_cast<unsigned char*>(l.params) + address;
      default: return global_memory(address, bytes, written, lane);
    }
  }
  const Buffer& buffer_of(uint64_t address, int bytes, bool is_write, int lane) {
    const auto holds = [&](const Buffer& b) {
      const uint64_t size = uint64_t(b.bytes), into = address - b.address;
      return b.address <= address && into <= size && uint64_t(bytes) <= size - into;
    };
    if (last_buffer >= l.buffer_count || !holds(l.buffers[last_buffer])) {
      last_buffer = 0;
      while (last_buffer < l.buffer_count && !holds(l.buffers[last_buffer])) ++last_buffer;
      if (last_buffer == l.buffer_count) outside("global", address, bytes, is_write, lane);
    }
    return l.buffers[last_buffer];
  }
  unsigned char* global_memory(uint64_t address, int bytes, const unsigned char* written, int lane) {
    const bool is_write = written != nullptr;
    const Buffer& b = buffer_of(address, bytes, is_write, lane);
    const uint64_t first = address - b.address;
    Shadow& shadow = shadows[size_t(last_buffer)];
    for (uint64_t x = first; x < first + uint64_t(bytes); ++x) {
      if (!(b.permissions[x] & 1)) outside("global", address, bytes, is_write, lane);
      if (!(b.permissions[x] & 2)) {
        if (is_write) throw Fault{"write to an input", "the launch may only read this buffer", lane};
        continue;
      }
      Byte& byte = shadow.at(x);
      const bool is_same = is_write && written[x - first] == b.memory[x];
      order(byte, is_write, is_same, lane, "global", b.address + x);
      if (is_write && !is_same && byte.copies)
        throw Fault{"asynchronous copy", "a write to the source of a copy that its thread has not waited for", lane};
    }
    return b.memory + first;
  }

  // The width of a vector is the number of its registers.
  void load(uint32_t lanes) {
    const int size = size_of(i->type), count = i->results;
    each(lanes, [&](int lane) {
      const uint64_t address = get<uint64_t>(0, lane) + uint64_t(i->offset);
      const unsigned char* from = memory(i->space, address, size * count, nullptr, lane);
      for (int k = 0; k < count; ++k) {
        if (i->type == ty::f32 || i->type == ty::f64 || i->type == ty::f16 || i->type == ty::bf16) {
          uint64_t bits = 0;
          std::memcpy(&bits, from + k * size, size_t(size));
          put(k, lane, bits);
        } else {
          with_integer(i->type, [&](auto v) {
            std::memcpy(&v, from + k * size, sizeof v);
            put(k, lane, v);
          });
        }
      }
    });
  }
  void store(uint32_t lanes) {
    const int size = size_of(i->type), count = i->operands - 1;
    each(lanes, [&](int lane) {
      const uint64_t address = get<uint64_t>(0, lane) + uint64_t(i->offset);
      unsigned char written[8 * kOperands];
      for (int k = 0; k < count; ++k) {
        const uint64_t bits = get<uint64_t>(1 + k, lane);
        std::memcpy(written + k * size, &bits, size_t(size));
      }
      std::memcpy(memory(i->space, address, size * count, written, lane), written, size_t(size * count));
    });
  }
};

}  // namespace ptx
