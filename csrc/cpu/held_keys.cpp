#include "held_keys.h"

#include "../profile.h"
#include "parallel.h"

#include <algorithm>
#include <cmath>

namespace sb::cpu {
namespace {

constexpr double kNothing = -1e30;  // log2 of no weight

double add_logs(double a, double b) {
  const double top = std::max(a, b);
  return top <= kNothing ? kNothing : top + std::log2(std::exp2(a - top) + std::exp2(b - top));
}

struct WeighedKey {
  double log;
  int32_t key;
};

// The keys of one head that its states hold out.
class HeadChoice {
 public:
  HeadChoice(const AttentionParams& p, const AttentionKernels& kernel, int64_t b, int64_t kv, const void* zero_row)
      : p(p), kernel(kernel), b(b), kv(kv), zero_row(zero_row), scratch(bytes(p, kernel)) {
    choose();
  }

  std::vector<std::vector<int32_t>> held, late;  // of every slot, ascending; without elements where no slot has any
  std::vector<int32_t> never;                    // keys that no state holds

  bool any() const { return !held.empty(); }
  // Writes the slot that each key enters.
  void write_slots(int32_t* enters) const {
    const RowRange& row = p.rows[b];
    for (int64_t j = row.k_first; j < row.k_end; ++j) enters[j] = int32_t((j - row.k_first) / p.segment + 1);
    if (!any()) return;
    for (int32_t key : never) enters[key] = kNeverEnters;
    for (size_t slot = 0; slot < late.size(); ++slot)
      for (int32_t key : late[slot]) enters[key] = int32_t(slot);
  }

 private:
  static int64_t bytes(const AttentionParams& p, const AttentionKernels& kernel) {
    ChunkWeights none;
    return kernel.chunk_weights(p, 0, 0, 0, nullptr, nullptr, none);
  }
  static double log_of(const ChunkWeights& w) { return w.mass > 0 ? w.top + std::log2(w.mass) : kNothing; }

  // The largest number of leading `keys`, heaviest first, of which the last has a kHeldShare of what the others and
  // `rest`, all below it, weigh together.
  static size_t count_held(const std::vector<WeighedKey>& keys, double rest, int64_t limit) {
    for (size_t n = keys.size(); n > 0; --n) {
      if (int64_t(n) <= limit && keys[n - 1].log >= rest + std::log2(kHeldShare)) return n;
      rest = add_logs(rest, keys[n - 1].log);
    }
    return 0;
  }
  static bool is_heavier(const WeighedKey& a, const WeighedKey& b) {
    return a.log != b.log ? a.log > b.log : a.key < b.key;
  }

  // Goes through the chunks in order. What a state holds out depends on what the state before held out and on the keys
  // of its last chunk alone: no later token has a say, and no state gives a key back. Without a causal edge the last
  // state is the only one that is read; no key that was let in before would be held out of it.
  void choose() {
    const RowRange& row = p.rows[b];
    // What is in the state weighs in_state.mass 2^in_state.top.
    ChunkWeights in_state{kNothing, 0, 0}, chunk;
    std::vector<WeighedKey> keys;  // held so far, then the candidates of a chunk
    const auto let_in = [&](double top, double mass) {
      if (top > in_state.top) in_state.mass *= std::exp2(in_state.top - top), in_state.top = top;
      in_state.mass += mass * std::exp2(top - in_state.top);
    };
    for (int64_t first = row.k_first, slot = 1; first < row.k_end; first += kChunk, ++slot) {
      kernel.chunk_weights(p, b, kv, first, scratch.data(), zero_row, chunk);
      in_state.count += chunk.count;
      const std::vector<WeighedKey> before = keys;
      // Whether the heaviest has its share of the state; NaN has not.
      if (chunk.count > 0 && std::exp2(chunk.top - in_state.top) >= kHeldShare * in_state.mass) {
        const double least = log_of(in_state) + std::log2(kHeldShare);
        double log[kChunk];
        const bool any = kernel.key_weights(p, b, kv, first, log_of(in_state), scratch.data(), zero_row, log);
        if (!any && keys.empty()) {
          let_in(chunk.top, chunk.mass);
          continue;
        }
        for (int64_t i = 0; i < kChunk; ++i) {
          if (log[i] <= kNothing) continue;
          if (log[i] >= least)
            keys.push_back({log[i], int32_t(first + i)});
          else
            let_in(log[i], 1);
        }
      } else if (chunk.count > 0) {
        let_in(chunk.top, chunk.mass);
      }
      if (keys.empty()) continue;
      std::sort(keys.begin(), keys.end(), is_heavier);
      const size_t n = count_held(keys, log_of(in_state), std::min(p.most_held, in_state.count - kLeastInState));
      for (size_t i = n; i < keys.size(); ++i) let_in(keys[i].log, 1);
      keys.resize(n);
      if (p.is_causal && (n > 0 || !before.empty())) note(slot, keys, before);
    }
    if (!p.is_causal && !keys.empty()) note(p.slots - 1, keys, {});
    for (const WeighedKey& key : keys) never.push_back(key.key);
  }

  // The state of `slot` holds out `keys`; of those `before`, which the state before it held out, the others enter.
  void note(int64_t slot, const std::vector<WeighedKey>& keys, const std::vector<WeighedKey>& before) {
    if (held.empty()) held.resize(size_t(p.slots)), late.resize(size_t(p.slots));
    std::vector<int32_t>&held_here = held[size_t(slot)], &late_here = late[size_t(slot)];
    for (const WeighedKey& key : keys) held_here.push_back(key.key);
    std::sort(held_here.begin(), held_here.end());
    for (const WeighedKey& key : before)
      if (!std::binary_search(held_here.begin(), held_here.end(), key.key)) late_here.push_back(key.key);
    std::sort(late_here.begin(), late_here.end());
  }

  const AttentionParams& p;
  const AttentionKernels& kernel;
  int64_t b, kv;
  const void* zero_row;
  Scratch scratch;
};

}  // namespace

void HeldKeys::set(AttentionParams& p, const AttentionKernels& kernel, const void* zero_row) {
  const Stage stage("held keys");
  const int64_t rows = p.batch * p.kv_heads;
  std::vector<std::unique_ptr<HeadChoice>> choices(static_cast<size_t>(rows));
  parallel_ranges(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      choices[size_t(row)] = std::make_unique<HeadChoice>(p, kernel, row / p.kv_heads, row % p.kv_heads, zero_row);
  });
  if (std::none_of(choices.begin(), choices.end(), [](const auto& choice) { return choice->any(); })) return;
  enters.resize(size_t(rows * p.k_tokens));
  const auto append = [&](const std::vector<std::vector<int32_t>>& of_slot, std::vector<int32_t>& keys,
                          std::vector<int64_t>& begin) {
    for (int64_t slot = 0; slot < p.slots; ++slot) {
      begin.push_back(int64_t(keys.size()));
      if (!of_slot.empty()) keys.insert(keys.end(), of_slot[size_t(slot)].begin(), of_slot[size_t(slot)].end());
    }
    begin.push_back(int64_t(keys.size()));
  };
  for (int64_t row = 0; row < rows; ++row) {
    const HeadChoice& choice = *choices[size_t(row)];
    choice.write_slots(&enters[size_t(row * p.k_tokens)]);
    append(choice.held, held, held_begin), append(choice.late, late, late_begin);
    for (const auto& keys : choice.held) most = std::max(most, int64_t(keys.size()));
  }
  p.held = held.data(), p.held_begin = held_begin.data(), p.enters = enters.data();
  p.late = late.data(), p.late_begin = late_begin.data();
}

}  // namespace sb::cpu
