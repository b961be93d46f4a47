// Gradients of listed blocks' keys from the shares that attention_backward_shares.cuh wrote: a warp per key adds them
// up in the order of heads and tiles, found by the transposed lists.
#pragma once
#include "naming_blocks.cuh"
#include "share_words.cuh"

namespace sb::cuda {

// Adds up the shares of a key, by a warp: lanes are words of a share, kWords each.
template <int kWords, bool kIsWide>
class KeyShares {
  static constexpr int kNumbers = kIsWide ? 1 : 2;  // of a word
  typedef ShareColumn<kIsWide> Column;

 public:
  SB_DEVICE KeyShares(const BackwardSharesParams& p, int64_t head, int64_t j)
      : p(p),
        b(uint32_t(head) / uint32_t(p.kv_heads)),
        kv(head - b * p.kv_heads),
        head(head),
        j(j),
        lane(lane_index()) {}

  SB_DEVICE void run() {
    range = load(p.rows + b);
    if (j < range.k_first || j >= range.k_end || (p.k_mask && load(p.k_mask + b * p.k_tokens + j))) return;
    key = j - range.k_first;
    const int64_t group = p.q_heads / p.kv_heads, tiles = p.tiles(), first = head * group * tiles;
    has_sums = p.has_sums || p.first_tile > first;
    read_sums();
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) add_head(h);
    write_sums();
  }

 private:
  SB_DEVICE float* sum_at(const Column& column) const {
    const int64_t width = column.is_value ? p.value_pad : p.head_dim;
    return static_cast<float*>(column.is_value ? p.dv_sum : p.dk_sum) + (head * p.k_tokens + j) * width + column.first;
  }
  // Lanes behind the factors have the numbers of maps or of the log mass.
  SB_DEVICE bool has_number() const { return lane >= p.factors && lane < p.numbers; }
  SB_DEVICE float* number_at() const {
    return static_cast<float*>(p.dy_sum) + (head * p.k_tokens + j) * (p.numbers - p.factors) + lane - p.factors;
  }
  SB_DEVICE void read_sums() {
    SB_UNROLL
    for (int w = 0; w < kWords; ++w) {
      const Column column(p, lane + w * kWarp);
      SB_UNROLL
      for (int i = 0; i < kNumbers; ++i) sum[w][i] = has_sums && column.is_there ? load(sum_at(column) + i) : 0.0f;
    }
    of_map = has_sums && has_number() ? load(number_at()) : 0.0f;
  }

  // The shares of the tiles that are in this round.
  SB_DEVICE void add_head(int64_t h) {
    const int64_t before = (b * p.q_heads + h) * p.tiles(), used = ceil_div(slots_of_row(p, range), kTile);
    int64_t first = p.first_tile - before, end = p.end_tile - before;
    first = first < 0 ? 0 : first, end = end < used ? end : used;
    if (first >= end) return;
    const NamingBlocks naming(p, p.of_index, b, h, key, 0);
    const int64_t of_block = p.block_q / kTile,
                  first_block = first > 0 ? lower_bound(naming.blocks, naming.count, first / of_block) : 0;
    // Tiles of a head, and keys of a row, are fewer than 2^31.
    const auto at_once = uint32_t(of_block < used ? of_block : used);
    const uint32_t pairs = uint32_t(naming.count - first_block) * at_once;
    const uint32_t length = uint32_t(range.k_end - range.k_first),
                   keys = p.block_k < length ? uint32_t(p.block_k) : length,
                   in_block = p.block_k < length ? uint32_t(key) % keys : uint32_t(key);
    for (uint32_t begin = 0; begin < pairs; begin += kWarp) {
      const uint32_t i = begin + uint32_t(lane), block = at_once == 1 ? i : i / at_once;
      int64_t row = -1;
      bool is_behind = false;
      if (i < pairs) {
        const int64_t tile = load(naming.blocks + first_block + block) * of_block + (i - block * at_once);
        const int32_t position = load(naming.positions + first_block + block);
        is_behind = tile >= end;
        if (tile >= first && tile < end && position >= 0 && position < p.capacity)
          row = (before + tile - p.first_tile) * p.keys_of_list + int64_t(position) * keys + in_block;
      }
      const int count = pairs - begin < uint32_t(kWarp) ? int(pairs - begin) : kWarp;
      SB_NO_UNROLL
      for (int k = 0; k < count; k += kAtOnce) add_rows(row, k);
      if (ballot(is_behind) != 0) return;  // tiles ascend
    }
  }

  // The shares of kAtOnce lanes, whose loads are under way together.
  SB_DEVICE void add_rows(int64_t row, int k) {
    uint32_t words[kAtOnce][kWords];
    float number[kAtOnce];
    int64_t rows[kAtOnce];
    SB_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      rows[i] = shuffle_from(row, k + i);
      number[i] = rows[i] >= 0 && lane < p.numbers ? load(p.share_numbers + rows[i] * p.numbers + lane) : 0.0f;
      SB_UNROLL
      for (int w = 0; w < kWords; ++w)
        words[i][w] = rows[i] >= 0 && lane + w * kWarp < p.share_words
                          ? load(p.shares + rows[i] * p.share_words + lane + w * kWarp)
                          : 0;
    }
    SB_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (rows[i] < 0) continue;
      has_any = true;
      of_map += number[i];
      if constexpr (kIsWide) {
        SB_UNROLL
        for (int w = 0; w < kWords; ++w) sum[w][0] += same_bits<float>(words[i][w]);
      } else {
        const float of_key = shuffle_from(number[i], 0), of_value = shuffle_from(number[i], 1);
        SB_UNROLL
        for (int w = 0; w < kWords; ++w) {
          const float factor = lane + w * kWarp < p.words_of_keys() ? of_key : of_value;
          sum[w][0] += factor * from_fixed(words[i][w] & 0xffff), sum[w][1] += factor * from_fixed(words[i][w] >> 16);
        }
      }
    }
  }

  SB_DEVICE void write_sums() {
    if (has_sums && !has_any) return;
    SB_UNROLL
    for (int w = 0; w < kWords; ++w) {
      const Column column(p, lane + w * kWarp);
      SB_UNROLL
      for (int i = 0; i < kNumbers; ++i)
        if (column.is_there) store(sum_at(column) + i, sum[w][i]);
    }
    if (has_number()) store(number_at(), of_map);
  }

  static constexpr int kAtOnce = 4;
  const BackwardSharesParams& p;
  const int64_t b, kv, head, j;
  const int lane;
  RowRange range;
  int64_t key = 0;
  bool has_sums = false, has_any = false;
  float sum[kWords][kNumbers], of_map = 0;
};

template <int kWords, bool kIsWide>
SB_KERNEL sum_shares(BackwardSharesParams p) {
  const int64_t of_head = p.q_heads / p.kv_heads * p.tiles(), first = p.first_tile / of_head,
                keys = (ceil_div(p.end_tile, of_head) - first) * p.k_tokens, warps = block_threads() / kWarp;
  for_each_task(ceil_div(keys, warps), [&](int64_t task) {
    const int64_t at = task * warps + warp_index();
    if (at < keys) KeyShares<kWords, kIsWide>(p, first + at / p.k_tokens, at % p.k_tokens).run();
  });
}

}  // namespace sb::cuda
