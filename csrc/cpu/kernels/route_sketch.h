// Routing per query by sketches: blocks that have a key whose sketch agrees with the query's in many bits, and of these
// the ones that the query weighs most, by their keys themselves.
#pragma once
#include "../../math/sketch.h"
#include "arena.h"
#include "route_groups.h"
#include "route_windows.h"
#include "transpose.h"

namespace sb::SB_ISA {

typedef uint64_t SketchVec __attribute__((vector_size(SB_VECTOR_BYTES)));
typedef uint64_t UnalignedSketches __attribute__((vector_size(SB_VECTOR_BYTES), aligned(8), may_alias));
typedef int32_t AgreementVec __attribute__((vector_size(SB_VECTOR_BYTES / 2), aligned(4), may_alias));
constexpr int kSketchWidth = int(SB_VECTOR_BYTES / sizeof(uint64_t));

// Of kBranch^2 keys: sketches as [key of its block][block], those of masked keys replaced by another one of the block.
struct SketchPanel {
  static constexpr int32_t kNoKeys = -1, kNumbers = 0;
  uint64_t word[kBranch][kBranch];
  int32_t state[kBranch];   // of a block: kNoKeys, kNumbers, or kMostAgreement where a key is not finite
  int32_t unused[kBranch];  // whole lines of cache
};
static_assert(sizeof(SketchPanel) == kSketchPanelFloats * sizeof(float));

// The bits of 64 vectors: bit i of a lane says whether is_set(vector i).
template <class IsSet>
SB_INLINE void write_bits(const float* rows, const IsSet& is_set, uint64_t* out) {
  RouteInts half[2]{};
  for (int h = 0; h < 2; ++h)
    for (int i = 0; i < kSketchBits / 2; ++i)
      half[h] |= is_set(load_lanes(rows + (h * (kSketchBits / 2) + i) * kLeaf)) & int32_t(uint32_t(1) << i);
  for (int i = 0; i < kRouteWidth; ++i) out[i] = uint64_t(uint32_t(half[0][i])) | uint64_t(uint32_t(half[1][i])) << 32;
}

// Sketches of kLeaf rows, which end in zeros, and whether their projections are finite; `counts`, if not null: which
// bits of theirs count as queries. work: (sketch_width(), kLeaf).
SB_INLINE void sketch_rows(const float* const* rows, int64_t head_dim, float* work, uint64_t* sketch, bool* is_finite,
                           uint64_t* counts) {
  const int64_t width = sketch_width(head_dim);
  transpose_rows<float, kLeaf>(rows, head_dim, 1.0f, work);
  for (int64_t i = head_dim * kLeaf; i < width * kLeaf; ++i) work[i] = 0;
  for (int round = 0; round < kSketchRounds; ++round) {
    for (int64_t e = 0; e < width; ++e)
      if (is_sign_negative(round, e))
        for (int lane = 0; lane < kLeaf; lane += kRouteWidth)
          store<float, kRouteWidth>(work + e * kLeaf + lane, -load_lanes(work + e * kLeaf + lane));
    for (int64_t half = 1; half < width; half *= 2)
      for (int64_t begin = 0; begin < width; begin += 2 * half)
        for (int64_t i = begin * kLeaf; i < (begin + half) * kLeaf; i += kRouteWidth) {
          const RouteVec a = load_lanes(work + i), b = load_lanes(work + half * kLeaf + i);
          store<float, kRouteWidth>(work + i, a + b), store<float, kRouteWidth>(work + half * kLeaf + i, a - b);
        }
  }
  for (int lane = 0; lane < kLeaf; lane += kRouteWidth) {
    RouteInts odd{};
    RouteVec largest{};
    for (int i = 0; i < kSketchBits; ++i) {
      const RouteVec y = load_lanes(work + i * kLeaf + lane), size = max_lanes(y, -y);
      odd |= ~(size <= -kLowest<float>), largest = max_lanes(size, largest);
    }
    for (int i = 0; i < kRouteWidth; ++i) is_finite[lane + i] = odd[i] == 0;
    write_bits(work + lane, [](RouteVec y) SB_INLINE_LAMBDA { return y < RouteVec{}; }, sketch + lane);
    if (!counts) continue;
    write_bits(
        work + lane, [&](RouteVec y) SB_INLINE_LAMBDA { return (max_lanes(y, -y) * kSmallShare > largest) & ~odd; },
        counts + lane);
  }
}

// Fills the panel of the kBranch^2 keys from position `first` on. Masked keys are not read. work: as above.
SB_INLINE void sketch_panel(const RouteParams& p, int64_t b, int64_t kv, int64_t first, const float* zero_row,
                            float* work, SketchPanel& panel) {
  const RowRange& range = p.rows[b];
  // A row of so few blocks that all are candidates is not searched.
  const bool is_searched =
      ceil_div(int64_t(range.k_end) - range.k_first, kBranch) > candidates_per_query(p.keys, p.window);
  for (int block = 0; block < kBranch; block += kLeaf / kBranch) {
    const float* rows[kLeaf];
    uint64_t sketch[kLeaf] = {};
    bool is_valid[kLeaf], is_finite[kLeaf] = {};
    for (int i = 0; i < kLeaf; ++i) {
      const int64_t j = range.k_first + first + block * kBranch + i;
      is_valid[i] = j < range.k_end && !(p.k_mask && p.k_mask[b * p.k_tokens + j]);
      rows[i] = is_valid[i] ? p.k.at<const float>(b, kv, j) : zero_row;
    }
    if (is_searched) sketch_rows(rows, p.head_dim, work, sketch, is_finite, nullptr);
    for (int i = 0; i < kLeaf; i += kBranch) {
      int any = kBranch;
      int32_t state = SketchPanel::kNumbers;
      for (int key = kBranch - 1; key >= 0; --key)
        if (is_valid[i + key]) any = key, state = is_finite[i + key] ? state : kMostAgreement;
      const int of_block = block + i / kBranch;
      panel.state[of_block] = any < kBranch ? state : SketchPanel::kNoKeys;
      for (int key = 0; key < kBranch; ++key)
        panel.word[key][of_block] = any == kBranch ? 0 : sketch[i + (is_valid[i + key] ? key : any)];
    }
  }
}

// Bits that are set, of every lane.
SB_INLINE SketchVec bits_set(SketchVec word) {
#if defined(__x86_64__) && SB_VECTOR_BYTES >= 32
  // A table of the bits of four, in every 16 bytes.
  typedef char Bytes __attribute__((vector_size(SB_VECTOR_BYTES)));
  const uint64_t low = 0x0302020102010100u, high = 0x0403030203020201u;
  SketchVec table;
  SB_EACH (i, kSketchWidth) table[i] = i % 2 ? high : low;
  const SketchVec nibble = SketchVec{} + 0x0f0f0f0f0f0f0f0fu;
#if SB_VECTOR_BYTES == 64
  const auto looked_up = [&](SketchVec of) SB_INLINE_LAMBDA {
#if defined(__clang__)
    return __builtin_ia32_pshufb512((Bytes)table, (Bytes)(of & nibble));
#else
    return __builtin_ia32_pshufb512_mask((Bytes)table, (Bytes)(of & nibble), Bytes{}, ~uint64_t(0));
#endif
  };
  return (SketchVec)__builtin_ia32_psadbw512(looked_up(word) + looked_up(word >> 4), Bytes{});
#else
  const auto looked_up = [&](SketchVec of)
                             SB_INLINE_LAMBDA { return __builtin_ia32_pshufb256((Bytes)table, (Bytes)(of & nibble)); };
  return (SketchVec)__builtin_ia32_psadbw256(looked_up(word) + looked_up(word >> 4), Bytes{});
#endif
#else
  word -= (word >> 1) & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
  word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  word += word >> 8, word += word >> 16, word += word >> 32;
  return word & 0x7fu;
#endif
}

// Writes in how many bits the key of every block of the panel that agrees best does with `sketch`, or does not count,
// or what the block's state says.
SB_INLINE void write_agreements(const SketchPanel& panel, uint64_t sketch, uint64_t counts, int32_t* out) {
  const SketchVec query = SketchVec{} + sketch, counted = SketchVec{} + counts;
  for (int block = 0; block < kBranch; block += kSketchWidth) {
    SketchVec apart = SketchVec{} + uint64_t(kSketchBits);
    for (int key = 0; key < kBranch; ++key) {
      const SketchVec bits =
          bits_set((*reinterpret_cast<const UnalignedSketches*>(panel.word[key] + block) ^ query) & counted);
      apart = bits < apart ? bits : apart;
    }
    const auto shared = kSketchBits - __builtin_convertvector(apart, AgreementVec);
    const auto state = *reinterpret_cast<const AgreementVec*>(panel.state + block);
    *reinterpret_cast<AgreementVec*>(out + block) = state == SketchPanel::kNumbers ? shared : state;
  }
}

// As take_top, of agreements from 0 to kMostAgreement; what is less is never taken.
SB_INLINE int64_t take_agreeing(const int32_t* agreement, int64_t count, int64_t n, int32_t* out, int32_t& guess) {
  if (n <= 0) return 0;
  int64_t hits = count_from(agreement, count, guess), above = 0;
  // At least n are `guess` or more, or all that there are, and fewer than n are more. None is more than kMostAgreement.
  for (; hits < n && guess > 0; --guess) above = hits, hits = count_from(agreement, count, guess - 1);
  for (int64_t next = 0; hits >= n && guess < kMostAgreement; ++guess, hits = next) {
    next = count_from(agreement, count, guess + 1);
    if (next < n) {
      above = next;
      break;
    }
  }
  return write_top(agreement, count, n, guess, hits, above, out);
}

struct SketchScratch {
  float *work, *query, *zeros, *product;           // (sketch_width(), kLeaf), (16, head_pad), (head_pad), (kept, 8)
  int32_t *agreement, *candidate, *score, *taken;  // of all blocks; blocks, their sortable scores, the best ones
  int64_t bytes;
  int32_t guess[2] = {kSketchBits / 2 + 8, 0};

  SB_INLINE SketchScratch(const RouteParams& p, void* memory) {
    const int64_t blocks = pad_to(ceil_div(p.k_tokens, kBranch), kBranch * kRouteWidth),
                  kept = pad_to(candidates_per_query(p.keys, p.window), kRouteWidth) + kRouteWidth;
    Arena arena{static_cast<char*>(memory), 0};
    work = arena.take<float>(sketch_width(p.head_dim) * kLeaf);
    query = arena.take<float>(kRoutedQueries * p.head_pad), zeros = arena.take<float>(p.head_pad);
    product = arena.take<float>(kept * kBranch);
    agreement = arena.take<int32_t>(blocks), candidate = arena.take<int32_t>(kept);
    score = arena.take<int32_t>(kept), taken = arena.take<int32_t>(kept);
    bytes = arena.used;
  }
};

// Writes log2 of what the query weighs the keys of every candidate block with, sortable. score: (kept, kBranch), room
// for products.
SB_INLINE void weigh_candidates(const RouteParams& p, int64_t b, int64_t kv, const float* query, int64_t candidates,
                                const SketchScratch& w) {
  const RowRange& range = p.rows[b];
  const uint8_t* mask = p.k_mask ? p.k_mask + b * p.k_tokens : nullptr;
  const float none = -__builtin_inff();
  // 1. Products with all keys, of as many blocks at a time as a vector has room for.
  const auto is_valid = [&](int64_t j) { return j < range.k_end && !(mask && mask[j]); };
  constexpr int kTogether = kRouteWidth < kBranch ? kRouteWidth : kBranch;
  for (int64_t first = 0; first < candidates * kBranch; first += kRouteWidth) {
    RouteVec sum[kRouteWidth]{};
    SB_EACH (part, kRouteWidth / kTogether) {
      const int64_t at = first + part * kTogether, block = at / kBranch;
      if (block >= candidates) continue;
      const int64_t j = range.k_first + w.candidate[block] * int64_t(kBranch) + at % kBranch;
      const float *const keys = p.k.at<const float>(b, kv, j), *row[kTogether];
      for (int i = 0; i < kTogether; ++i) row[i] = keys + i * p.k.row;
      if (mask || j + kTogether > range.k_end)
        for (int i = 0; i < kTogether; ++i) row[i] = is_valid(j + i) ? row[i] : w.zeros;
      for (int64_t e = 0; e < p.head_pad; e += kRouteWidth) {
        const RouteVec q = load_lanes(query + e);
        SB_EACH (i, kTogether) sum[part * kTogether + i] += q * load_lanes(row[i] + e);
      }
    }
    fold_rows<float, kRouteWidth>(sum);
    store<float, kRouteWidth>(w.product + first, sum[0]);
  }
  for (int64_t i = 0; i < candidates; ++i) {
    const int64_t first = range.k_first + w.candidate[i] * int64_t(kBranch);
    if (!mask && first + kBranch <= range.k_end) continue;
    for (int key = 0; key < kBranch; ++key)
      if (!is_valid(first + key)) w.product[i * kBranch + key] = none;
  }
  // 2. Sums over keys, blocks in lanes.
  for (int64_t first = 0; first < candidates; first += kBlockWidth) {
    BlockVec score[kBranch];
    SB_EACH (half, kBranch / kBlockWidth) {
      BlockVec* square = score + half * kBlockWidth;
      SB_EACH (i, kBlockWidth)
        square[i] = load_lanes<kBlockWidth>(w.product + (first + i) * kBranch + half * kBlockWidth);
      transpose_square<float, kBlockWidth>(square);
    }
    BlockVec top = score[0], sum{}, all{};
    SB_EACH (key, kBranch) top = max_lanes(score[key], top), all += score[key];
    const BlockInts is_finite = top - top == 0;
    SB_EACH (key, kBranch) sum += exp2v<kBlockWidth>(is_finite ? score[key] - top : BlockVec{});
    // Where a score is no number, so is the sum of all, but that of infinities may be.
    BlockInts odd{};
    SB_EACH (key, kBranch) odd |= score[key] != score[key];
    const BlockVec weight = odd ? all : is_finite ? top + log2_from_one(sum) : top;
    store_ints<kBlockWidth>(w.score + first, sortable<kBlockWidth>(weight));
  }
}

// The lists of kRoutedQueries queries.
inline void route_by_sketch(const RouteParams& p, int64_t b, int64_t h, int64_t group, const float* panels,
                            SketchScratch& w) {
  const QueryWindows windows(p, b, h, group);
  const auto* panel = reinterpret_cast<const SketchPanel*>(panels);
  const int64_t kv = h / (p.q_heads / p.kv_heads), kept = candidates_per_query(p.keys, p.window);
  const float* rows[kLeaf];
  uint64_t sketch[kLeaf], counts[kLeaf];
  bool is_finite[kLeaf];
  for (int64_t e = 0; e < p.head_pad; ++e) w.zeros[e] = 0;
  for (int r = 0; r < kLeaf; ++r) rows[r] = r < kRoutedQueries && windows.row[r] ? windows.row[r] : w.zeros;
  sketch_rows(rows, p.head_dim, w.work, sketch, is_finite, counts);
  for (int r = 0; r < kRoutedQueries; ++r)
    for (int64_t e = 0; e < p.head_pad; ++e) w.query[r * p.head_pad + e] = rows[r][e] * p.scale * float(kLog2e);

  for (int r = 0; r < kRoutedQueries; ++r) {
    if (!windows.row[r]) continue;
    // 1. How well the blocks agree that the query may choose; a negative scale turns the query around.
    const int64_t blocks = p.is_causal ? windows.low[r] : windows.count, padded = pad_to(blocks, kBranch * kRouteWidth);
    const uint64_t of_query = p.scale < 0 ? ~sketch[r] : sketch[r];
    const BlockInts none = BlockInts{} + SketchPanel::kNoKeys;
    for (int64_t block = 0; block < padded; block += kBranch) {
      int32_t* agreement = w.agreement + block;
      const bool is_there = block < blocks;
      if (is_there && blocks > kept)
        write_agreements(panel[block / kBranch], of_query, counts[r], agreement);
      else
        for (int i = 0; i < kBranch; ++i)
          agreement[i] = is_there ? panel[block / kBranch].state[i] : SketchPanel::kNoKeys;
      for (int lane = 0; lane < kBranch; lane += kBlockWidth)
        store_ints<kBlockWidth>(
            agreement + lane, windows.may_choose(p, r, block + lane) ? load_ints<kBlockWidth>(agreement + lane) : none);
    }
    // 2. The candidates that the query weighs most.
    const int64_t candidates = take_agreeing(w.agreement, padded, kept, w.candidate, w.guess[0]);
    weigh_candidates(p, b, kv, w.query + r * p.head_pad, candidates, w);
    for (int64_t i = candidates; i % kRouteWidth; ++i) w.score[i] = kNever;
    const int64_t taken = take_top(w.score, pad_to(candidates, kRouteWidth), windows.routed, w.taken, w.guess[1]);
    windows.write_list(
        p, b, h, group, r, taken, [&](int64_t i) { return int64_t(w.candidate[w.taken[i]]); },
        [&](int64_t block) { return panel[block / kBranch].state[block % kBranch] != SketchPanel::kNoKeys; });
  }
}

}  // namespace sb::SB_ISA
