// What the forward pass leaves to the backward pass, and how large it is, from shapes alone: a compiled graph knows no
// more.
#pragma once
#include "../launchers.h"
#include "kernels.h"

namespace sb::cpu {

// The shape of a call that is computed in `dtype`.
AttentionShape shape_of(const AttentionArguments& a, ScalarType dtype);

// Whether a call is computed in float64: float64 inputs, and narrow heads of any dtype.
inline bool in_double(const AttentionShape& s) { return s.dtype == ScalarType::Double || s.head_dim < kNarrowHead; }

// The states of one key/value head: a slot before every segment of keys, and one behind the last.
struct StateLayout {
  int64_t segment, slots, features, slot_size;
};
StateLayout state_layout(const AttentionShape& s);

// Causal states are not saved: one for every 64 keys, they would double what a call saves.
inline bool saves_state(const AttentionShape& s) { return s.low_rank != int64_t(LowRank::kNone) && !s.is_causal; }

// The scores of one query head: `keys` for every query slot, 0 where none are saved, in tiles of `lanes` slots; and
// behind them exponents of `clusters`, 0 where none are.
struct ScoreLayout {
  int64_t lanes, slots, keys, clusters;
};
ScoreLayout score_layout(const AttentionShape& s);

SavedSizes saved_sizes(const AttentionShape& s);

}  // namespace sb::cpu
