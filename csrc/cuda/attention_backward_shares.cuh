// Backward pass of listed blocks' keys on tensor cores, for bfloat16, float16 and float32. A warp takes a tile of 16
// query slots and writes, for every key of the list that they share, what the tile adds to its gradients: a share,
// which sum_shares.cuh adds up. Where slots have lists of their own the list is the union of these (union_lists.cuh);
// there, and with a causal edge, tiles are ragged: every key has a pattern of the slots that list it.
//
// Keys are the rows of all products, so that gradients of scores are left operands as they come.
#pragma once
#include "attention_backward.cuh"
#include "attention_backward_tile_products.cuh"
#include "attention_tile_rows.cuh"
#include "share_words.cuh"

namespace sb::cuda {

inline constexpr int kSharesThreads = 128;

// Shared memory of a warp, in bytes: q and dO of its slots, then two stages of K and V with the coordinates of keys.
// Behind them the coordinates of queries, or the exponents of clusters by slot.
template <class E, int D, LowRank kKind>
struct SharesLayout {
  static constexpr int64_t kMatrix = TokenRows<E, D>::kBytes, kGradients = kMatrix, kStages = 2 * kMatrix,
                           kCoordinates = kKind == LowRank::kQuadratic ? kStage * 64 : 0,
                           kStageBytes = 2 * kMatrix + kCoordinates, kOfQueries = kStages + 2 * kStageBytes,
                           kQueries = kOfQueries + kCoordinates, kExponents = kQueries + kTile * 4;
  static SB_HD int32_t width(const ForwardParams& p) { return int32_t(p.rank) | 1; }  // of a slot's exponents
  static SB_HD int64_t bytes(const ForwardParams& p) {
    return kKind == LowRank::kCentroid ? pad_to(kExponents + width(p) * kTile * 4, 16) : kExponents;
  }
};

template <class E, int D, LowRank kKind, bool kIsRagged>
class TileShares {
  typedef SharesLayout<E, D, kKind> Layout;
  typedef TokenRows<E, D> Rows;
  typedef CoordinateRows<E> Coordinates;
  static constexpr bool kIsWide = kIsFloat<E>, kHasQuadratic = kKind == LowRank::kQuadratic,
                        kHasClusters = kKind == LowRank::kCentroid, kHasLowRank = kKind != LowRank::kNone,
                        kIsHalf = std::is_same_v<E, Half>;
  static constexpr int kStepsAtOnce = kIsWide ? 1 : D / 16;  // of SB_UNROLL_STEPS
  static constexpr int kChunks = D / 8, kSteps = D / 16, kSlotTiles = kTile / 8;
  static constexpr uint32_t kAllSlots = (1u << kTile) - 1;

 public:
  SB_DEVICE TileShares(const BackwardSharesParams& p, int64_t base, int64_t b, int64_t h, int64_t tile)
      : p(p),
        base(int32_t(base)),
        b(int32_t(b)),
        h(int32_t(h)),
        kv(int32_t(p.kv_head(h))),
        head(int32_t(b * p.kv_heads + kv)),
        first_slot(int32_t(tile * kTile)),
        first_row(((b * p.q_heads + h) * p.tiles() + tile - p.first_tile) * p.keys_of_list),
        lane(lane_index()),
        g(lane / 4),
        t(lane % 4),
        queries(shared_array<int32_t>(base + Layout::kQueries)),
        exponents(shared_array<float>(base + Layout::kExponents)) {}

  SB_DEVICE void run() {
    const RowRange range = load(p.rows + b);
    if (first_slot >= slots_of_row(p, range) || range.k_first >= range.k_end) return;
    first_key = range.k_first;
    if (kIsRagged) edges = TileEdges(p, range, first_slot);
    const int column = lane % Rows::kRowChunks * Rows::kNumbers;
    keys_from = p.k.at<const E>(b, kv, first_key) + (column < p.head_dim ? column : 0);
    values_from = p.v.at<const E>(b, kv, first_key) + (column < p.value_pad ? column : 0);
    find_queries(range);
    read_queries();
    find_list(range);
    go_through();
  }

 private:
  // -------------------- the tile's queries

  // Of slots without a record none: they have weight 0.
  SB_DEVICE void find_queries(const RowRange& range) {
    int32_t query = -1;
    const int64_t slot = first_slot + lane;
    if (lane < kTile && slot < slots_of_row(p, range) && kind_of(p, b, h, slot) != SlotKind::kNone)
      query = int32_t(query_of_slot(p, range, b, h, slot));
    sync_warp();  // the last tile is done with them
    if (lane < kTile) queries.set(lane, query);
    computed = ballot(query >= 0);
    sync_warp();
  }

  SB_DEVICE void read_queries() {
    for (int i = lane; i < kTile * Rows::kRowChunks; i += kWarp) {
      const int row = i / Rows::kRowChunks, chunk = i % Rows::kRowChunks, column = chunk * Rows::kNumbers;
      const int64_t query = queries.get(row), from = query < 0 ? 0 : query;
      const bool in_query = query >= 0 && column < p.head_dim, in_value = query >= 0 && column < p.value_pad;
      copy_async(base + Rows::place(row, chunk), p.q.at<const E>(b, h, from) + (in_query ? column : 0), in_query);
      copy_async(base + Layout::kGradients + Rows::place(row, chunk),
                 p.d_out.at<const E>(b, h, from) + (in_value ? column : 0), in_value);
    }
    commit_copies();
    if (kIsRagged) look_at_queries();
    if (kHasQuadratic) write_coordinates();
    if (kHasClusters) {
      const int32_t width = Layout::width(p);
      for (int64_t i = lane; i < kTile * p.rank; i += kWarp) {
        const int64_t row = i / p.rank, c = i % p.rank, query = queries.get(row);
        const float largest = load(static_cast<const float*>(p.cluster_log) + head * p.rank + c);
        float exponent = float(kLowestLog);
        if (query >= 0 && largest > float(kNoKeyLog)) {
          const float product = load(p.cluster_scores + ((b * p.q_heads + h) * p.q_tokens + query) * p.rank + c);
          exponent = product * float(p.scale * kLog2e) + largest;
        }
        exponents.set(row * width + c, exponent);
      }
    }
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * n + 2 * t + i;
      log[n][i] = inverse[n][i] = shift[n][i] = correction[n][i] = state_weight[n][i] = 0;
      if (queries.get(column) < 0) continue;
      const auto record = load(record_of<float>(p, b, h, first_slot + column));
      log[n][i] = record.log, inverse[n][i] = record.inverse;
      shift[n][i] = kIsWide ? record.delta : record.delta + record.correction;
      if (kIsWide) correction[n][i] = record.correction;
      state_weight[n][i] = record.state_weight;
      if (kIsRagged && has_no_number >> column & 1) log[n][i] = shift[n][i] = state_weight[n][i] = no_number();
    }
    wait_copies<0>();
    sync_warp();
  }

  // What is no number in a slot must not meet the zeros of keys that it does not list: zeros take its place, and the
  // keys that it does list get no number. In float16 the weights of a row have a power of two, in which slots without a
  // gradient have no say: so that no bit of the past depends on later queries that nothing is asked of.
  SB_DEVICE void look_at_queries() {
    // Carries into signs. Of float32 what has no parts of bfloat16 is none.
    constexpr uint32_t kToNoNumber = kIsWide   ? 0x00808000u
                                     : kIsHalf ? 0x04000400u
                                               : 0x00800080u,
                       kSigns = kIsWide ? 0x80000000u : 0x80008000u;
    const int row = lane % kTile, half = lane / kTile;
    wait_copies<0>();
    sync_warp();
    const auto chunk_of = [&](int64_t from, int c) {
      return shared_array<FourWords>(base + from + Rows::place(row, half * (Rows::kRowChunks / 2) + c));
    };
    uint32_t carries = 0, any = 0;
    SB_UNROLL_BY_2
    for (int c = 0; c < Rows::kRowChunks / 2; ++c) {
      const FourWords of_query = chunk_of(0, c).get(0), of_gradient = chunk_of(Layout::kGradients, c).get(0);
      SB_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = of_gradient.at[i] & ~kSigns;
        carries |= ((of_query.at[i] & ~kSigns) + kToNoNumber) | (bits + kToNoNumber), any |= bits;
      }
    }
    bool are_numbers = (carries & kSigns) == 0;
    const int64_t query = queries.get(row);
    if (kHasQuadratic && query >= 0) {
      const MapRow<float, float> x(p.x_map, b, h, query);
      for (int64_t a = half; a < p.rank; a += 2) are_numbers = are_numbers && x(a) * 0.0f == 0.0f;
    }
    const auto of_slots = [&](bool of_half) {
      const uint32_t both = ballot(of_half);
      return (both | both >> kTile) & kAllSlots;
    };
    has_no_number = of_slots(!are_numbers), has_gradient = of_slots(any != 0);
    if (has_no_number == 0) return;
    if (has_no_number >> row & 1) SB_NO_UNROLL
    for (int c = 0; c < Rows::kRowChunks / 2; ++c)
      chunk_of(0, c).set(0, FourWords{}), chunk_of(Layout::kGradients, c).set(0, {});
    sync_warp();
  }
  SB_DEVICE static float no_number() { return same_bits<float>(0x7fffffffu); }

  // Half of a query's coordinates, then 1, as rows of 16 in two parts: a lane has half of a row.
  SB_DEVICE void write_coordinates() {
    const int row = lane % kTile, half = lane / kTile;
    const int64_t query = queries.get(row);
    const MapRow<float, float> x(p.x_map, b, h, query < 0 ? 0 : query);
    const auto to = shared_array<uint32_t>(base + Layout::kOfQueries);
    for (int a = 8 * half; a < 8 * half + 8; a += 2) {
      const auto coordinate = [&](int64_t i) {
        const bool is_none = query < 0 || i > p.rank || (kIsRagged && has_no_number >> row & 1);
        return is_none ? 0.0f : i < p.rank ? 0.5f * x(i) : 1.0f;
      };
      if constexpr (kIsWide) {
        SB_UNROLL
        for (int i = 0; i < 2; ++i)
          to.set(Coordinates::place(row, (a + i) / 4) / 4 + (a + i) % 4, same_bits<uint32_t>(coordinate(a + i)));
      } else {
        uint32_t parts[2];
        split(coordinate(a), coordinate(a + 1), parts, Bfloat16{});
        SB_UNROLL
        for (int i = 0; i < 2; ++i) to.set(Coordinates::place(row, 2 * i + half) / 4 + a % 8 / 2, parts[i]);
      }
    }
  }

  // -------------------- the list's keys

  // This lane's key of a stage, lane % kStage; -1: none. A position without a key has a share too.
  struct Fetched {
    bool is_there = false;
    int32_t key = -1, cluster = 0;
    uint32_t slots = 0;  // of ragged tiles: those that list the key
    float log = 0;       // of what the state holds of the key, without the query's share
  };

  SB_DEVICE void find_list(const RowRange& range) {
    const BlockList list(p, b, h * p.list_heads / p.q_heads, first_slot / p.block_q);
    entries = list.entries, count = uint32_t(list.count), last_key = uint32_t(range.k_end - range.k_first - 1);
    if (kIsRagged && p.slots_of_entries) slots_of_entries = p.slots_of_entries + (list.entries - p.index);
    keys = uint32_t(p.block_k <= last_key ? p.block_k : last_key + 1), last_entry = last_key / keys;
    entry = uint32_t(lane) % kStage / keys, offset = uint32_t(lane) % kStage % keys;
    if (!p.span) return;
    // Of this lane's slot, lane % kTile: all have one, but in unions.
    const int64_t behind = slots_of_row(p, range), slot = first_slot + lane % kTile;
    const Span span(p, range, b, (slot < behind ? slot : behind - 1) / p.span_queries);
    const int64_t all = int64_t(last_key) + 1;
    const auto inside = [&](int64_t key) { return int32_t(key < 0 ? 0 : key > all ? all : key); };
    sinks = inside(p.span_sinks), lo = inside(span.lo), hi = inside(span.hi);
  }

  // The key at this lane's position, with those of its slots that see it and whose window does not have it. Entries of
  // any content are safe: what no key matches lists nothing.
  SB_DEVICE void find_key(Fetched& to) const {
    if (computed != 0 && to.is_there) {
      const auto named = uint32_t(load(entries + entry));
      const uint32_t key = named * keys + offset;
      if (named <= last_entry && key <= last_key && !(entry > 0 && load(entries + entry - 1) >= int32_t(named)))
        to.key = int32_t(key);
    }
    if (kIsRagged && to.key >= 0) {
      to.slots = slots_of_entries ? uint32_t(load(slots_of_entries + entry)) : kAllSlots;
      to.slots &= bits_between(to.key - edges.first, kTile) & computed;
    }
    if (p.span) {
      if (to.key < sinks) to.key = -1;
      if (kIsRagged && slots_of_entries) {
        uint32_t in_span = 0;
        SB_UNROLL
        for (int i = 0; i < kTile / 2; ++i) {
          const int row = lane / kTile * (kTile / 2) + i;
          const int32_t first = shuffle_from(lo, row), behind = shuffle_from(hi, row);
          in_span |= to.key >= first && to.key < behind ? 1u << row : 0u;
        }
        to.slots &= ~(in_span | shuffle_xor(in_span, kTile));
      } else if (to.key >= lo && to.key < hi) {
        to.key = -1;
      }
    }
    if (kIsRagged && to.slots == 0) to.key = -1;
    if (to.key >= 0 && p.k_mask && load(p.k_mask + b * p.k_tokens + first_key + to.key)) to.key = -1;
    if (kIsRagged && to.key < 0) to.slots = 0;
  }

  // The next stage.
  SB_DEVICE Fetched fetch(int buffer) {
    Fetched of_lane;
    of_lane.is_there = entry < count;
    find_key(of_lane);
    entry += kStage / keys, offset += kStage % keys;
    if (offset >= keys) offset -= keys, ++entry;
    if (kHasLowRank && of_lane.key >= 0) {
      of_lane.log = load(p.key_log + head * p.k_tokens + first_key + of_lane.key);
      if (kHasQuadratic) of_lane.log -= log_of_state<float>(p, head, state_slot());
      if (kHasQuadratic && kIsRagged && of_lane.key >= edges.state_end) of_lane.log = float(kLowestLog);
      if (kHasClusters) of_lane.cluster = int32_t(cluster_of(p, head, first_key + of_lane.key));
    }
    const int64_t to = stage(buffer);
    SB_UNROLL_BY_2
    for (int j = 0; j < kStage * Rows::kRowChunks / kWarp; ++j) {
      const int row = lane / Rows::kRowChunks + j * (kWarp / Rows::kRowChunks), chunk = lane % Rows::kRowChunks,
                column = chunk * Rows::kNumbers;
      const int32_t key = shuffle_from(of_lane.key, row);
      const int64_t at = key < 0 ? 0 : key;
      copy_async(to + Rows::place(row, chunk), keys_from + at * p.k.row, key >= 0 && column < p.head_dim);
      copy_async(to + Layout::kMatrix + Rows::place(row, chunk), values_from + at * p.v.row,
                 key >= 0 && column < p.value_pad);
    }
    if (kHasQuadratic) SB_UNROLL
    for (int j = 0; j < kStage * 4 / kWarp; ++j) {
      const int i = lane + j * kWarp, row = i / 4, chunk = i % 4;
      const int32_t key = shuffle_from(of_lane.key, row);
      const int64_t of_key = head * p.k_tokens + first_key + (key < 0 ? 0 : key);
      const void* from = nullptr;
      if constexpr (kIsWide)
        from = p.key_rows + of_key * 16 + chunk * 4;
      else
        from = p.key_coordinates + of_key * 32 + chunk * 8;
      copy_async(to + 2 * Layout::kMatrix + Coordinates::place(row, chunk), from, key >= 0);
    }
    return of_lane;
  }
  SB_DEVICE int64_t stage(int buffer) const { return base + Layout::kStages + buffer * Layout::kStageBytes; }
  SB_DEVICE int64_t state_slot() const { return kIsRagged ? edges.state_slot : p.slots - 1; }

  SB_DEVICE void go_through() {
    bool has_next = count > 0;
    Fetched next;
    if (has_next) next = fetch(0);
    commit_copies();
    int buffer = 0;
    for (int64_t row = first_row; has_next; row += kStage) {
      const Fetched of_lane = next;
      has_next = ballot(entry < count) != 0;
      if (has_next) next = fetch(1 - buffer);
      commit_copies();
      wait_copies<1>();
      sync_warp();
      add_stage(of_lane, stage(buffer), row);
      sync_warp();  // before the buffer is filled again
      buffer = 1 - buffer;
    }
    wait_copies<0>();
  }

  // -------------------- shares

  // `row`: of the stage's first share.
  SB_DEVICE void add_stage(const Fetched& of_lane, int64_t from, int64_t row) const {
    const uint32_t valid = ballot(of_lane.key >= 0), there = ballot(of_lane.is_there);  // of the keys twice
    float score[kSlotTiles][4], value[kSlotTiles][4], root[kSlotTiles][4];              // q.k; dO.v; 1 + x.y / 2
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) score[n][i] = value[n][i] = root[n][i] = 0;
    if constexpr (kIsWide) {
      multiply_rows<false, D, kStepsAtOnce>(int(from), base, p.head_steps, score);
      multiply_rows<false, D, kStepsAtOnce>(int(from + Layout::kMatrix), base + int(Layout::kGradients), p.value_steps,
                                            value);
      if (kHasQuadratic)
        multiply_coordinates<false>(int(from + 2 * Layout::kMatrix), base + int(Layout::kOfQueries), root);
    } else {
      multiply_in_16_bits(from, score, value, root);
    }

    // In place of products: the gradient of a score, the weight, and the gradient of x.y. By a key's log scale that is
    // what the state holds of a pair.
    float by_log[2] = {0, 0};
    const float scale = float(p.scale * kLog2e), own_share = kHasLowRank ? exp2_of(of_lane.log) : 0.0f;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int key = g + 8 * r;
      const float share = kHasLowRank ? shuffle_from(own_share, key) : 0.0f;
      const int32_t cluster = kHasClusters ? shuffle_from(of_lane.cluster, key) : 0;
      // Of this lane's slots: those that list the key, and of these those that a state gives it for.
      uint32_t slots = valid >> key & 1 ? computed >> 2 * t : 0;
      if (kIsRagged) slots = shuffle_from(of_lane.slots, key) >> 2 * t;
      const uint32_t holding = kIsRagged && kHasQuadratic && share == 0.0f ? 0 : slots;
      SB_UNROLL
      for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int at = 2 * r + i, bit = 1 << (8 * n + i);
        const bool is_listed = slots & bit, is_held = holding & bit;
        const float gradient = kIsWide ? (value[n][at] - shift[n][i]) - correction[n][i] : value[n][at] - shift[n][i];
        float weight = is_listed ? exp2_of(score[n][at] * scale - log[n][i]) * inverse[n][i] : 0.0f;
        score[n][at] = is_listed ? weight * gradient : 0.0f;
        if (kHasQuadratic) {
          const float held = is_held ? state_weight[n][i] * share * root[n][at] : 0.0f;
          weight -= is_held ? held * root[n][at] : 0.0f;
          by_log[r] += is_held ? -held * gradient * root[n][at] : 0.0f;
          root[n][at] = is_held ? -held * gradient : 0.0f;
        }
        if (kHasClusters) {
          const float exponent = exponents.get((8 * n + 2 * t + i) * Layout::width(p) + cluster);
          const float held = is_listed ? share * exp2_of(exponent - log[n][i]) * inverse[n][i] : 0.0f;
          weight -= held;
          by_log[r] += is_listed ? -held * gradient : 0.0f;
        }
        if (kIsRagged && kIsHalf) weight = has_gradient >> 2 * t & bit ? weight : 0.0f;
        value[n][at] = weight;
      }
    }
    const bool is_there[2] = {bool(there >> g & 1), bool(there >> (g + 8) & 1)};
    row += g;
    if constexpr (kIsWide) {
      write_float_rows<0>(score, row, is_there);
      write_float_rows<1>(value, row, is_there);
    } else {
      write_rows<0>(score, row, is_there);
      write_rows<1>(value, row, is_there);
    }
    if (kHasQuadratic) write_coordinates_of(root, row, is_there);
    if (kHasLowRank) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum = by_log[r];
      sum += shuffle_xor(sum, 1), sum += shuffle_xor(sum, 2);
      if (t == 0 && is_there[r]) store(p.share_numbers + (row + 8 * r + 1) * p.numbers - 1, sum);
    }
  }

  SB_DEVICE void multiply_in_16_bits(int64_t from, float (&score)[kSlotTiles][4], float (&value)[kSlotTiles][4],
                                     float (&root)[kSlotTiles][4]) const {
    SB_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      const int64_t place = swizzled<2 * D>(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
      uint32_t rows[4], slots[4];
      if (k < p.head_steps) {
        load_left<2 * D>(from, k, rows), load_matrices(base + place, slots);
        multiply_add(score[0], rows, slots[0], slots[1], E{});
        multiply_add(score[1], rows, slots[2], slots[3], E{});
      }
      if (k < p.value_steps) {
        load_left<2 * D>(from + Layout::kMatrix, k, rows), load_matrices(base + Layout::kGradients + place, slots);
        multiply_add(value[0], rows, slots[0], slots[1], E{});
        multiply_add(value[1], rows, slots[2], slots[3], E{});
      }
    }
    if (!kHasQuadratic) return;
    uint32_t high[4], low[4];
    load_left<64>(from + 2 * Layout::kMatrix, 0, high), load_left<64>(from + 2 * Layout::kMatrix, 1, low);
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) {
      uint32_t x[4];  // the two halves of the first part, then of the second
      load_matrices(base + Layout::kOfQueries + swizzled<64>(n * 8 + lane % 8, lane / 8), x);
      multiply_add(root[n], low, x[0], x[1], Bfloat16{});
      multiply_add(root[n], high, x[2], x[3], Bfloat16{});
      multiply_add(root[n], high, x[0], x[1], Bfloat16{});
    }
  }

  // Of every key the slots' q, or dO, each times its number.
  template <int kPart>
  SB_DEVICE void write_float_rows(const float (&numbers)[kSlotTiles][4], int64_t row, const bool (&is_there)[2]) const {
    const int64_t width = kPart == 0 ? p.head_dim : p.value_pad;
    float sum[kChunks][4];
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) sum[c][i] = 0;
    add_product_with_rows<D>(numbers, int(base + kPart * Layout::kGradients), width, sum);
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) sum[c][i] *= kPart == 0 ? float(p.scale) : 1.0f;
    SB_UNROLL
    for (int r = 0; r < 2; ++r)
      if (is_there[r])
        store_float_sums(
            sum, r, reinterpret_cast<float*>(p.shares) + (row + 8 * r) * p.share_words + kPart * p.head_dim, width);
  }

  // The same of 16 bits. A lane has pairs of neighbouring columns, and those of
  // four chunks stand side by side (ShareColumn).
  template <int kPart>
  SB_DEVICE void write_rows(float (&numbers)[kSlotTiles][4], int64_t row, const bool (&is_there)[2]) const {
    const int64_t width = kPart == 0 ? p.head_dim : p.value_pad, from = base + kPart * Layout::kGradients;
    float back[2] = {1, 1};
    if (kIsHalf) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      float largest = 0;
      SB_UNROLL
      for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
      for (int i = 2 * r; i < 2 * r + 2; ++i)
        largest = larger(largest, numbers[n][i] < 0.0f ? -numbers[n][i] : numbers[n][i]);
      largest = larger(largest, shuffle_xor(largest, 1));
      largest = larger(largest, shuffle_xor(largest, 2));
      const float factor = Scale::of(largest);
      back[r] = Scale::inverse(factor);
      SB_UNROLL
      for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
      for (int i = 2 * r; i < 2 * r + 2; ++i) numbers[n][i] *= factor;
    }
    // Gradients of scores are what cancels. The CPU's kernel rounds no weights of merged lists.
    constexpr int kParts = kIsHalf || kIsRagged || kPart == 0 ? 2 : 1;
    uint32_t left[kParts][4];
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t parts[kParts];
      split(numbers[n][2 * r], numbers[n][2 * r + 1], parts, E{});
      SB_UNROLL
      for (int i = 0; i < kParts; ++i) left[i][2 * n + r] = parts[i];
    }
    float sum[kChunks][4];
    uint32_t largest[2] = {0, 0};  // bits of the largest number of a row; behind those of all numbers if it is none
    SB_UNROLL
    for (int c = 0; c < kChunks; c += 2) {
      SB_UNROLL
      for (int i = 0; i < 4; ++i) sum[c][i] = sum[c + 1][i] = 0;
      if (c * 8 >= width) continue;
      uint32_t rows[4];
      load_transposed(from + swizzled<2 * D>(lane % 16, c + lane / 16), rows);
      SB_UNROLL
      for (int i = kParts - 1; i >= 0; --i) {
        multiply_add(sum[c], left[i], rows[0], rows[1], E{});
        multiply_add(sum[c + 1], left[i], rows[2], rows[3], E{});
      }
      SB_UNROLL
      for (int i = 0; i < 8; ++i) {
        const uint32_t bits = same_bits<uint32_t>(sum[c + i / 4][i % 4]) & 0x7fffffffu;
        uint32_t& most = largest[i % 4 / 2];
        most = bits > most ? bits : most;
      }
    }
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t most = largest[r];
      SB_UNROLL
      for (int mask = 1; mask <= 2; ++mask) {
        const uint32_t other = shuffle_xor(most, mask);
        most = other > most ? other : most;
      }
      // What would be rounded to 2^15 counts as that.
      float of_units;
      const float factor = scale_to_half(same_bits<float>(most + 0x100u), of_units);
      const bool is_finite = most < 0x7f800000u;
      if (!is_there[r]) continue;
      auto* to = reinterpret_cast<FourWords*>(p.shares + (row + 8 * r) * p.share_words) +
                 (kPart == 0 ? 0 : p.words_of_keys() / 4) + t;
      SB_UNROLL
      for (int c = 0; c < kChunks; c += 4) {
        if (c * 8 >= width) continue;
        FourWords words;
        SB_UNROLL
        for (int i = 0; i < 4; ++i) words.at[i] = fixed_pair(sum[c + i][2 * r], sum[c + i][2 * r + 1], factor);
        store(to + c, words);
      }
      if (t != 0) continue;
      const float whole = of_units * back[r] * (kPart == 0 ? float(p.scale) : 1.0f);
      store(p.share_numbers + (row + 8 * r) * p.numbers + kPart, is_finite ? whole : no_number());
    }
  }

  // Gradients by y, from half of the queries' coordinates.
  SB_DEVICE void write_coordinates_of(const float (&root)[kSlotTiles][4], int64_t row,
                                      const bool (&is_there)[2]) const {
    float sum[2][4];
    SB_UNROLL
    for (int c = 0; c < 2; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) sum[c][i] = 0;
    if constexpr (kIsWide)
      add_product_with_coordinates(root, int(base + Layout::kOfQueries), sum);
    else
      add_coordinates_of_queries(root, sum);
    SB_UNROLL
    for (int c = 0; c < 2; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int a = 8 * c + 2 * t + i % 2, r = i / 2;
      if (a < p.rank && is_there[r])
        store(p.share_numbers + (row + 8 * r) * p.numbers + p.factors + a, 2.0f * sum[c][i]);
    }
  }
  SB_DEVICE void add_coordinates_of_queries(const float (&root)[kSlotTiles][4], float (&sum)[2][4]) const {
    uint32_t high[4], low[4], first_part[4], second_part[4];
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t of_pair[2];
      split(root[n][2 * r], root[n][2 * r + 1], of_pair, Bfloat16{});
      high[2 * n + r] = of_pair[0], low[2 * n + r] = of_pair[1];
    }
    load_transposed(base + Layout::kOfQueries + swizzled<64>(lane % 16, lane / 16), first_part);
    load_transposed(base + Layout::kOfQueries + swizzled<64>(lane % 16, 2 + lane / 16), second_part);
    SB_UNROLL
    for (int c = 0; c < 2; ++c) {
      multiply_add(sum[c], low, first_part[2 * c], first_part[2 * c + 1], Bfloat16{});
      multiply_add(sum[c], high, second_part[2 * c], second_part[2 * c + 1], Bfloat16{});
      multiply_add(sum[c], high, first_part[2 * c], first_part[2 * c + 1], Bfloat16{});
    }
  }

  const BackwardSharesParams& p;
  const int32_t base, b, h, kv;
  const int32_t head;
  const int32_t first_slot;
  const int64_t first_row;  // of the tile's shares
  const int lane, g, t;
  const Shared<int32_t> queries;
  const Shared<float> exponents;
  int32_t first_key = 0;
  const E *keys_from = nullptr, *values_from = nullptr;  // this lane's chunk of the row's first key
  uint32_t computed = 0;                                 // slots with a query
  TileEdges edges;
  uint32_t has_no_number = 0, has_gradient = 0;  // patterns of slots
  const int32_t* entries = nullptr;              // of the list, and what lists each
  const int32_t* slots_of_entries = nullptr;
  uint32_t count = 0, keys = 1, last_entry = 0, last_key = 0;  // entries, keys of one, and the last that there are
  uint32_t entry = 0, offset = 0;                              // this lane's next position
  int32_t sinks = 0, lo = 0, hi = 0;                           // keys that windows have
  float log[kSlotTiles][2], inverse[kSlotTiles][2], shift[kSlotTiles][2], correction[kSlotTiles][2],
      state_weight[kSlotTiles][2];
};

// How many blocks a multiprocessor has registers for, where none need be spilled for it.
template <class E, int D, LowRank kKind, bool kIsRagged>
inline constexpr int kSharesBlocks =
    sizeof(E) == 2 && D <= 64 && !(std::is_same_v<E, Half> && kKind == LowRank::kQuadratic && !kIsRagged) ? 3 : 1;

template <class E, int D, LowRank kKind, bool kIsRagged>
SB_KERNEL SB_THREADS_AND_BLOCKS(kSharesThreads, (kSharesBlocks<E, D, kKind, kIsRagged>))
    attention_backward_shares(BackwardSharesParams p) {
  const int64_t all = p.end_tile - p.first_tile, warps = block_threads() / kWarp;
  const int64_t base = warp_index() * SharesLayout<E, D, kKind>::bytes(p);
  for_each_task(ceil_div(all, warps), [&](int64_t task) {
    const int64_t at = task * warps + warp_index(), tile = p.first_tile + at, row = tile / p.tiles();
    if (at < all) TileShares<E, D, kKind, kIsRagged>(p, base, row / p.q_heads, row % p.q_heads, tile % p.tiles()).run();
  });
}

}  // namespace sb::cuda
