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
      : p(p),
        kernel(kernel),
        b(b),
        kv(kv),
        zero_row(zero_row),
        scratch(kernel.key_weights(p, 0, 0, 0, nullptr, nullptr, chunk)) {
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
  void weigh(int64_t first) { kernel.key_weights(p, b, kv, first, scratch.data(), zero_row, chunk); }

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
    double in_state = kNothing;
    int64_t seen = 0;
    std::vector<WeighedKey> keys;  // held so far, then the candidates of a chunk
    for (int64_t first = row.k_first, slot = 1; first < row.k_end; first += kChunk, ++slot) {
      kernel.key_weights(p, b, kv, first, scratch.data(), zero_row, chunk);
      const double least = in_state + std::log2(kHeldShare), mass = chunk.top + std::log2(chunk.mass);
      for (double log : chunk.log) seen += log > kNothing;
      std::vector<WeighedKey> before = keys;
      if (chunk.top >= least) {  // NaN is not
        for (int64_t i = 0; i < kChunk; ++i) {
          if (chunk.log[i] <= kNothing) continue;
          if (chunk.log[i] >= least)
            keys.push_back({chunk.log[i], int32_t(first + i)});
          else
            in_state = add_logs(in_state, chunk.log[i]);
        }
      } else {
        in_state = add_logs(in_state, mass);
      }
      if (keys.empty()) continue;
      std::sort(keys.begin(), keys.end(), is_heavier);
      const size_t n = count_held(keys, in_state, std::min(p.most_held, seen - kLeastInState));
      for (size_t i = n; i < keys.size(); ++i) in_state = add_logs(in_state, keys[i].log);
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
  ChunkWeights chunk{};
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
