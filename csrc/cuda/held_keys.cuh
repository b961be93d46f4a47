// Keys that states hold out because they outweigh the others (docs/algorithm.md, section 5): what every key weighs, and
// the choice, by a warp per head that goes through the chunks in order. What a state holds out depends on what the
// state before held out and on the keys of its last chunk alone, so no later token has a say.
#pragma once
#include "kv_state.cuh"

namespace sb::cuda {

// log2 of |F(y_j)| exp(kappa_j), and the slot that each key enters if no state holds it out.
template <class M>
SB_KERNEL key_weights(ForwardParams p) {
  for_each_element(p.batch * p.kv_heads * p.k_tokens, [&](int64_t at) {
    const int64_t head = at / p.k_tokens, j = at % p.k_tokens, b = head / p.kv_heads;
    if (is_unwanted(p, head)) return;
    const RowRange range = load(p.rows + b);
    if (j < range.k_first || j >= range.k_end || (p.k_mask && load(p.k_mask + b * p.k_tokens + j))) return;
    const MapRow<M, double> y(p.y_map, b, head % p.kv_heads, j);
    double square = 0;
    for (int64_t a = 0; a < p.rank; ++a) square += y(a) * y(a);
    const double norm =
        p.low_rank == LowRank::kQuadratic ? QuadraticKernel::norm_of_features(square) : square_root(square);
    store(p.weight_log + at, y.log() + log2_of(norm));
    store(p.first_slot + at, int32_t((j - range.k_first) / p.segment + 1));
  });
}

inline constexpr double kLogOfHeldShare = -1;
static_assert(kHeldShare == 0.5);

// The keys of one head that are held so far, heaviest first, and behind them candidates of a chunk, in shared memory.
class HeldKeys {
 public:
  static constexpr int64_t kRoom = 512;
  static constexpr int64_t kBytes = kRoom * int64_t(sizeof(double) + sizeof(int32_t));
  static_assert(kRoom >= kMostHeld + kChunk);

  SB_DEVICE HeldKeys(const ForwardParams& p, int64_t head)
      : p(p),
        head(head),
        b(head / p.kv_heads),
        lane(lane_index()),
        range(load(p.rows + b)),
        log(shared_array<double>(0)),
        key(shared_array<int32_t>(kRoom * int64_t(sizeof(double)))) {}

  SB_DEVICE void choose() {
    if (p.is_causal) write_counts(0, 0, 0);
    int64_t slot = 1;
    for (int64_t first = range.k_first; first < range.k_end; first += kChunk, ++slot) {
      const int64_t listed = held + take_candidates(first);
      if (listed > 0) held = count_held(listed);
      write(slot, first, listed);
    }
    if (!p.is_causal) return write_held(0);
    for (; slot < p.slots; ++slot) write_counts(slot, 0, 0);
  }

 private:
  // Puts keys of the chunk that may be held behind those that are, sorted, and lets the others into the state. Returns
  // how many may be held: each has kHeldShare of the state.
  SB_DEVICE int64_t take_candidates(int64_t first) {
    constexpr int kOwn = int(kChunk) / kWarp;
    double own[kOwn], top = kLowestLog;
    bool is_valid[kOwn];
    int32_t count = 0;
    for (int i = 0; i < kOwn; ++i) {
      const int64_t j = first + lane + i * kWarp;
      is_valid[i] = j < range.k_end && !(p.k_mask && load(p.k_mask + b * p.k_tokens + j));
      own[i] = is_valid[i] ? load(p.weight_log + head * p.k_tokens + j) : kLowestLog;
      top = larger(top, own[i]), count += is_valid[i];
    }
    top = warp_max(top), seen += warp_sum(count);
    const double least = in_state + kLogOfHeldShare;
    double mass = 0;
    int32_t candidates = 0;
    for (int i = 0; i < kOwn; ++i) {
      const bool may_be_held = is_valid[i] && own[i] >= least;  // NaN may not
      if (is_valid[i] && !may_be_held) mass += exp2_of(own[i] - top);
      candidates += may_be_held;
      log.set(held + lane + i * kWarp, may_be_held ? own[i] : kLowestLog);
      key.set(held + lane + i * kWarp, may_be_held ? int32_t(first + lane + i * kWarp) : kNeverEnters);
    }
    mass = warp_sum(mass), candidates = warp_sum(candidates);
    if (mass != 0) let_in(top, mass);
    sync_warp();
    if (candidates > 0) sort(held + kChunk);
    return candidates;
  }

  // Heaviest first, of equals the first; bitonic.
  SB_DEVICE void sort(int64_t count) {
    int64_t size = 2;
    while (size < count) size *= 2;
    for (int64_t i = count + lane; i < size; i += kWarp) log.set(i, kLowestLog), key.set(i, kNeverEnters);
    sync_warp();
    for (int64_t run = 2; run <= size; run *= 2)
      for (int64_t step = run / 2; step > 0; step /= 2) {
        for (int64_t i = lane; i < size / 2; i += kWarp) {
          const int64_t low = 2 * i - (i & (step - 1)), high = low + step;
          const double a = log.get(low), b = log.get(high);
          const int32_t of_a = key.get(low), of_b = key.get(high);
          const bool is_after = a < b || (a == b && of_a > of_b);
          if (is_after == ((low & run) == 0)) {
            log.set(low, b), log.set(high, a);
            key.set(low, of_b), key.set(high, of_a);
          }
        }
        sync_warp();
      }
  }

  // The largest number of leading keys of which the last has kHeldShare of what the others and the state weigh
  // together; the others go into the state.
  SB_DEVICE int64_t count_held(int64_t listed) {
    const double top = log.get(0);
    const int64_t left = seen - kLeastInState, limit = left < p.most_held ? left : p.most_held;
    double rest = exp2_of(in_state - top);
    int64_t n = listed;
    for (; n > 0; --n) {
      const double weight = exp2_of(log.get(n - 1) - top);
      if (n <= limit && weight >= kHeldShare * rest) break;
      rest += weight;
    }
    if (n < listed) in_state = top + log2_of(rest);
    return n;
  }
  SB_DEVICE void let_in(double top, double mass) {
    const double most = larger(in_state, top);
    in_state = most + log2_of(exp2_of(in_state - most) + mass * exp2_of(top - most));
  }

  // Notes where the listed keys are now: those that were held and are no longer enter this slot.
  SB_DEVICE void write(int64_t slot, int64_t first, int64_t listed) {
    for (int64_t i = lane; i < listed; i += kWarp) {
      const int32_t j = key.get(i);
      const int32_t enters = p.is_causal ? int32_t(slot) : int32_t((j - range.k_first) / p.segment + 1);
      store(p.first_slot + head * p.k_tokens + j, i < held ? kNeverEnters : enters);
      if (p.is_causal && i >= held)
        store(p.late_keys + (head * p.slots + slot) * (p.most_held + kChunk) + i - held, j < first ? j : -1);
    }
    if (p.is_causal) write_held(slot), write_counts(slot, held, listed - held);
    sync_warp();
  }
  SB_DEVICE void write_held(int64_t slot) {
    for (int64_t i = lane; i < held; i += kWarp)
      store(p.held_keys + (head * p.held_slots() + slot) * p.most_held + i, key.get(i));
    if (!p.is_causal) write_counts(slot, held, 0);
  }
  SB_DEVICE void write_counts(int64_t slot, int64_t of_held, int64_t of_late) {
    if (lane != 0) return;
    store(p.held_counts + head * p.held_slots() + slot, int32_t(of_held));
    if (p.is_causal) store(p.late_counts + head * p.slots + slot, int32_t(of_late));
  }

  const ForwardParams& p;
  const int64_t head, b;
  const int lane;
  const RowRange range;
  const Shared<double> log;
  const Shared<int32_t> key;
  double in_state = kLowestLog;  // what the state weighs, log2
  int64_t held = 0, seen = 0;    // keys that are held, and valid keys so far
};

SB_KERNEL held_keys(ForwardParams p) {
  for_each_task(p.batch * p.kv_heads, [&](int64_t head) {
    if (!is_unwanted(p, head)) HeldKeys(p, head).choose();
  });
}

}  // namespace sb::cuda
