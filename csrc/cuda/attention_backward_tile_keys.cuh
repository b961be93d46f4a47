// Backward pass of keys on tensor cores: a warp computes a tile of 16 keys, its pairs with query slots whose window or
// sinks they are, or whose state ends before them, and what reaches them through the state; for bfloat16, float16 and
// float32.
// Pairs of listed blocks are left to attention_backward_keys.cuh or attention_backward_shares.cuh, which add to these
// sums.
//
// Query slots come in stages of 16, in the order of heads and slots. Keys are the rows of all products, so that
// gradients of scores are left operands as they come. dk with the gradient of the map, and dv, are tasks of their own:
// the sums of both would not fit into registers. With a kernel nor would those of more than 64 columns, so each half of
// 128 is a task too; they form the same scores. Stages are parts of one block, whose slots list the same keys up to
// their edge; or ragged, with a pattern of keys for each slot, and a state of their own if it is causal.
#pragma once
#include "attention_backward.cuh"
#include "attention_backward_tile_products.cuh"
#include "attention_backward_tile_slots.cuh"

namespace sb::cuda {

inline constexpr int kTileKeysThreads = 128;

// Shared memory of a warp, in bytes: K and V of its keys, then two stages of q and dO with the coordinates of queries,
// or their products with the representatives of the keys' clusters, each where the lane that needs it reads it.
// Before the first stage F(y) or dH v passes through them. `small`: y and its gradients.
template <class E, int D, LowRank kKind>
struct TileKeysLayout {
  static constexpr bool kHasQuadratic = kKind == LowRank::kQuadratic;
  static constexpr int64_t kMatrix = TokenRows<E, D>::kBytes, kCoordinates = kHasQuadratic ? kTile * 64 : 0,
                           kProducts = kKind == LowRank::kCentroid ? kTile * kTile * 4 : 0, kValues = kMatrix,
                           kStages = 2 * kMatrix, kStageBytes = 2 * kMatrix + kCoordinates + kProducts,
                           kTokens = kStages + 2 * kStageBytes, kOwnCoordinates = kTokens + kTile * 4,
                           kWidth = kTileFeatures + 1, kRowWidth = 17,
                           kSmall = kHasQuadratic ? 2 * kTile * kRowWidth * 4 : 0,
                           kBytes = kOwnCoordinates + kCoordinates + kSmall;
  static constexpr int kSums = kKind != LowRank::kNone && D > 64 ? 64 : D,
                       kTasks = 2 * D / kSums;  // columns of one; of a tile
  static_assert(!kHasQuadratic || kTile * kWidth * 4 <= 2 * kStageBytes);
};

// How many blocks a multiprocessor has registers for, where none need be spilled for it.
template <class E, int D, LowRank kKind, bool kIsRagged>
inline constexpr int kTileKeysBlocks = sizeof(E) == 2 && D <= 64 && kKind != LowRank::kQuadratic &&
                                               !(std::is_same_v<E, Half> && kKind == LowRank::kCentroid && !kIsRagged)
                                           ? 3
                                           : 1;

template <class E, int D, LowRank kKind, bool kIsRagged, bool kOfValues>
class TileKeys {
  typedef TileKeysLayout<E, D, kKind> Layout;
  static constexpr bool kHasQuadratic = kKind == LowRank::kQuadratic, kHasClusters = kKind == LowRank::kCentroid;
  typedef TokenRows<E, D> Rows;
  typedef CoordinateRows<E> Coordinates;
  static constexpr bool kIsHalf = std::is_same_v<E, Half>, kIsWide = kIsFloat<E>;
  // Of SB_UNROLL_COPIES and SB_UNROLL_STEPS: where registers are few.
  static constexpr bool kIsSlim = kTileKeysBlocks<E, D, kKind, kIsRagged> > 1;
  static constexpr int kCopiesAtOnce = kIsRagged || kIsSlim ? 1 : 2,
                       kStepsAtOnce = (kIsWide && kHasQuadratic) || kIsSlim                ? 1
                                      : !kIsRagged || (kKind == LowRank::kNone && D <= 64) ? D / 16
                                                                                           : 2;
  static constexpr int kChunks = Layout::kSums / 8, kRowChunks = D / 8, kSteps = D / 16, kSlotTiles = kTile / 8,
                       kWidth = Layout::kWidth, kRowWidth = Layout::kRowWidth;
  static_assert(!kIsWide || kChunks == kRowChunks);

 public:
  // `part`: which columns, kSums at a time.
  SB_DEVICE TileKeys(const BackwardTileKeysParams& p, int64_t base, int64_t head, int64_t first, int part)
      : p(p),
        base(int32_t(base)),
        b(quotient(head, p.kv_heads)),
        kv(int32_t(head - b * p.kv_heads)),
        head(int32_t(head)),
        first(int32_t(first)),
        first_chunk(Layout::kTasks == 2 ? 0 : part * kChunks),
        lane(lane_index()),
        g(lane / 4),
        t(lane % 4) {}

  SB_DEVICE void run() {
    range = load(p.rows + b);
    if (8 * first_chunk >= width() || !find_keys()) return;
    read_keys();
    do {
      for (int i = lane; kHasQuadratic && i < kTile * kRowWidth; i += kWarp) dy().set(i, 0.0f);
      SB_UNROLL
      for (int c = 0; c < kChunks; ++c) SB_UNROLL
      for (int i = 0; i < 4; ++i) sum[c][i] = 0;
      SB_UNROLL
      for (int c = 0; c < 2; ++c) SB_UNROLL
      for (int i = 0; i < 4; ++i) d_pairs[c][i] = 0;
      SB_UNROLL
      for (int r = 0; r < 2; ++r) scales[r] = 0x1p125f;
      if (kHasQuadratic && (kOfValues || is_first_part())) add_state();
      if constexpr (kHasClusters) add_state_of_clusters();
      go_through();
    } while (has_to_be_careful());
    finish();
  }

 private:
  SB_DEVICE Shared<float> y() const {
    return shared_array<float>(base + Layout::kOwnCoordinates + Layout::kCoordinates);
  }
  SB_DEVICE Shared<float> dy() const {
    return shared_array<float>(base + Layout::kOwnCoordinates + Layout::kCoordinates + Layout::kSmall / 2);
  }

  // Of a row of sums. The gradient of the map is the first part's.
  SB_DEVICE int64_t width() const { return kOfValues ? p.value_pad : p.head_dim; }
  SB_DEVICE bool is_first_part() const { return Layout::kTasks == 2 || first_chunk == 0; }
  // Whether what pairs have of clusters is asked for: values need it, and the gradients of log masses, the first
  // part's.
  SB_DEVICE bool needs_clusters() const { return kOfValues || is_first_part(); }

  // -------------------- the tile's keys

  // Whether there are any. Keys count from the row's first one; -1 is none.
  SB_DEVICE bool find_keys() {
    const int64_t j = range.k_first + first + lane;
    const bool is_valid = lane < kTile && j < range.k_end && !(p.k_mask && load(p.k_mask + b * p.k_tokens + j));
    keys = ballot(is_valid);
    return keys != 0;
  }
  SB_DEVICE bool is_key(int row) const { return keys >> row & 1; }
  SB_DEVICE int64_t token(int64_t row) const { return int64_t(range.k_first) + first + row; }

  SB_DEVICE void read_keys() {
    sync_warp();  // the last tile is done with them
    for (int i = lane; i < kTile * Rows::kRowChunks; i += kWarp) {
      const int row = i / Rows::kRowChunks, chunk = i % Rows::kRowChunks, column = chunk * Rows::kNumbers;
      const int64_t j = is_key(row) ? token(row) : 0;
      const bool in_key = is_key(row) && column < p.head_dim, in_value = is_key(row) && column < p.value_pad;
      copy_async(base + Rows::place(row, chunk), p.k.at<const E>(b, kv, j) + (in_key ? column : 0), in_key);
      copy_async(base + Layout::kValues + Rows::place(row, chunk), p.v.at<const E>(b, kv, j) + (in_value ? column : 0),
                 in_value);
    }
    if (kHasQuadratic) {
      for (int i = lane; i < kTile * 4; i += kWarp) {
        const int row = i / 4, chunk = i % 4;
        const int64_t of_key = head * p.k_tokens + (is_key(row) ? token(row) : 0);
        const void* from = nullptr;
        if constexpr (kIsWide)
          from = p.key_rows + of_key * 16 + chunk * 4;
        else
          from = p.key_coordinates + of_key * 32 + chunk * 8;
        copy_async(base + Layout::kOwnCoordinates + Coordinates::place(row, chunk), from, is_key(row));
      }
      for (int i = lane; i < kTile * kRowWidth; i += kWarp) {
        const int row = i / kRowWidth, a = i % kRowWidth;
        y().set(i, is_key(row) && a < p.rank ? MapRow<float, float>(p.y_map, b, kv, token(row))(a) : 0.0f);
      }
    }
    commit_copies(), wait_copies<0>();
    sync_warp();
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = g + 8 * r;
      kappa[r] = float(kLowestLog);
      if (kKind != LowRank::kNone && is_key(row)) kappa[r] = load(p.key_log + head * p.k_tokens + token(row));
      if (kHasClusters) {
        cluster[r] = is_key(row) ? int32_t(cluster_of(p, head, token(row))) : 0;
        of_cluster[r] = log_of_cluster(p, head, cluster[r]);
        if (!kIsWide && of_cluster[r] > float(kNoKeyLog)) of_cluster[r] += kappa[r];
      }
    }
    if (kHasClusters) set_share(0.0f);
  }

  // The first state slot that holds the keys.
  SB_DEVICE int64_t state_of_keys() const { return p.is_causal ? first / kChunk + 1 : p.slots - 1; }
  // What a state holds of the keys.
  SB_DEVICE void set_share(float state_log) {
    SB_UNROLL
    for (int r = 0; r < 2; ++r) share[r] = is_key(g + 8 * r) ? exp2_of(kappa[r] - state_log) : 0.0f;
  }

  // -------------------- the state

  // b dH^T F(y) of values, and b F'(y)^T (dH v + dhz) of the map, with b = exp(kappa - kappa_ref). Ragged kernels take
  // dH as it is, so that the gradients of all causal states need no second place.
  SB_DEVICE void add_state() {
    set_share(log_of_state<float>(p, head, state_of_keys()));
    const int64_t group = quotient(p.q_heads, p.kv_heads), columns = p.value_pad + 1,
                  state = (b * p.q_heads + kv * group) * p.query_segments + (p.is_causal ? state_of_keys() : 0);
    const float* d_state = static_cast<const float*>(p.d_kv_state) + state * p.slot_size;
    const auto entry = [&](int64_t f, int64_t e) {
      return f < p.features && e < p.value_pad ? load(d_state + f * columns + e) : 0.0f;
    };
    const auto of_features = shared_array<float>(base + Layout::kStages);
    if (!kOfValues) {
      float of_feature[kTileFeatures / 8][4];
      SB_UNROLL
      for (int n = 0; n < kTileFeatures / 8; ++n) SB_UNROLL
      for (int i = 0; i < 4; ++i) of_feature[n][i] = 0;
      const int64_t chunks = p.features_padded / 8;
      if constexpr (kIsWide)
        add_product_with_global_rows<D>(base + int(Layout::kValues), d_state, p.features, columns, p.value_pad,
                                        of_feature);
      else if constexpr (kIsRagged)
        add_product_of_tokens<E, D, 1>(
            base + Layout::kValues, p.value_steps, chunks,
            [&](int k, int n) { return right_words(16 * k, 8 * n, [&](int64_t e, int64_t f) { return entry(f, e); }); },
            of_feature);
      else
        add_product_of_tokens<E, D>(base + Layout::kValues, p.value_steps,
                                    p.state_by_value + head * p.value_steps * chunks * kWarp, chunks, 0, of_feature);
      SB_UNROLL
      for (int n = 0; n < kTileFeatures / 8; ++n) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t f = 8 * n + 2 * t + i;
        const float of_hz = f < p.features ? load(d_state + f * columns + p.value_pad) : 0.0f;
        SB_UNROLL
        for (int r = 0; r < 2; ++r) of_features.set((g + 8 * r) * kWidth + f, of_feature[n][2 * r + i] + of_hz);
      }
    } else {
      for (int64_t i = lane; i < kTile * kWidth; i += kWarp) of_features.set(i, 0.0f);
    }
    const float own[2] = {shuffle_from(share[0], lane % 8 * 4), shuffle_from(share[1], lane % 8 * 4)};
    sync_warp();
    if (lane < kTile) {
      const int64_t row = lane * kRowWidth, at = lane * kWidth;
      const float weight = lane < 8 ? own[0] : own[1];
      const auto coordinate = [&](int64_t a) { return y().get(row + a); };
      if (kOfValues)
        QuadraticKernel::expand(p.rank, weight, coordinate,
                                [&](int64_t f, float value) { of_features.set(at + f, value); });
      else
        QuadraticKernel::chain(
            p.rank, weight, coordinate, [&](int64_t f) { return of_features.get(at + f); },
            [&](int64_t a) { return dy().get(row + a); }, [&](int64_t a, float value) { dy().set(row + a, value); });
    }
    sync_warp();
    if constexpr (kIsWide && kOfValues)
      add_product_of_shared_numbers(of_features, kWidth, d_state, p.features, columns, p.value_pad, sum);
    for (int64_t step = 0; !kIsWide && kOfValues && step < p.features_padded / 16; ++step)
      if constexpr (kIsRagged)
        add_product_of_numbers(
            of_features, kWidth, step, 1.0f, p.value_pad / 8 - first_chunk,
            [&](int n) { return right_words(16 * step, 8 * (first_chunk + n), entry); }, sum);
      else
        add_product_of_numbers(
            of_features, kWidth, step, 1.0f, p.value_pad / 8 - first_chunk,
            [&](int n) {
              const int64_t row = head * (p.features_padded / 16) + step;
              return load(p.state_by_feature + (row * (p.value_pad / 8) + first_chunk + n) * kWarp + lane);
            },
            sum);
    set_scales_of_values();
    sync_warp();  // the stages' place is free
  }

  // b dH_c of values, and b (dH_c v + dhz_c) of the log mass, with the key's cluster c and b = exp(kappa - kappa_c):
  // lanes have the columns of their sums.
  SB_DEVICE void add_state_of_clusters() {
    const int64_t columns = p.value_pad + 1,
                  state = (b * p.q_heads + kv * quotient(p.q_heads, p.kv_heads)) * p.query_segments;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      d_log_mass[r] = 0;
      const int row = g + 8 * r;
      if (!is_key(row)) continue;
      const float* d_state = static_cast<const float*>(p.d_kv_state) + state * p.slot_size + cluster[r] * columns;
      if (kOfValues) {
        SB_UNROLL
        for (int c = 0; c < kChunks; ++c) SB_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int column = kIsWide ? column_of_float_sum(c, i) : 8 * (first_chunk + c) + 2 * t + i;
          if (column < p.value_pad) sum[c][2 * r + i] = share[r] * load(d_state + column);
        }
      } else if (is_first_part()) {
        float product = t == 0 ? load(d_state + p.value_pad) : 0.0f;
        SB_NO_UNROLL
        for (int c = 0; Rows::kNumbers * c < p.value_pad; ++c) {
          const uint32_t word = shared_array<uint32_t>(base + Layout::kValues + Rows::place(row, c)).get(t);
          const float* of_word = d_state + Rows::kNumbers * c + Rows::kNumbers / 4 * t;
          if constexpr (kIsWide)
            product += load(of_word) * same_bits<float>(word);
          else
            product += load(of_word) * low_of(word, E{}) + load(of_word + 1) * high_of(word, E{});
        }
        d_log_mass[r] = share[r] * product;
      }
    }
    set_scales_of_values();
  }

  // Of the sums so far, with the weights that follow, which are at most about one.
  SB_DEVICE void set_scales_of_values() {
    if (!kOfValues || !kIsHalf) return;
    SB_UNROLL
    for (int r = 0; r < 2; ++r) scales[r] = Scale::of(0.75f);
    SB_UNROLL
    for (int c = 0; c < kChunks; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) sum[c][i] *= scales[i / 2];
  }

  // -------------------- pairs

  // A stage of slots of one block, that sees sinks or whose window touches the tile. [lo, hi) are the keys that all of
  // them have, of those up to edge + i that slot i sees.
  struct StageOfBlock {
    int32_t slot = 0, lo = 0, hi = 0, edge = 0;
  };
  typedef std::conditional_t<kIsRagged, StageSlots, StageOfBlock> Stage;

  // Stages of head h: with the first level of the transposed lists those that see sinks, 16 by 16; then those of the
  // blocks whose window touches the tile.
  struct Walk {
    int32_t slots, of_sinks, of_block, stages;
    const int32_t* blocks;
    SB_DEVICE Walk(const TileKeys& tile, int64_t h, int64_t level) : slots(int32_t(slots_of_row(tile.p, tile.range))) {
      const NamingBlocks naming(tile.p, tile.p.of_span, tile.b, h, tile.first, level);
      const int64_t longest = tile.p.block_q < slots ? tile.p.block_q : slots;
      of_sinks = level == 0 && tile.first < tile.p.span_sinks ? int32_t(ceil_div(slots, kTile)) : 0;
      of_block = int32_t(ceil_div(longest, kTile));
      stages = of_sinks + int32_t(naming.count) * of_block, blocks = naming.blocks;
    }
  };
  SB_DEVICE StageOfBlock stage_of(const Walk& walk, int32_t i) const {
    const int32_t length = range.k_end - range.k_first, sinks = p.span_sinks < length ? int32_t(p.span_sinks) : length;
    if (i < walk.of_sinks) return {i * kTile, 0, sinks};
    i -= walk.of_sinks;
    const int64_t block = load(walk.blocks + i / walk.of_block);
    if (block < 0 || block >= p.blocks) return {};
    const Span span(p, range, b, block);
    const int64_t hi = span.hi < 0 ? 0 : span.hi;
    return {int32_t(block * p.block_q) + i % walk.of_block * kTile, span.lo < sinks ? sinks : int32_t(span.lo),
            hi > length ? length : int32_t(hi)};
  }
  // The first stage from i on with keys of the tile.
  SB_DEVICE int32_t next_stage(const Walk& walk, int32_t i, StageOfBlock& stage) const {
    for (; i < walk.stages; ++i) {
      stage = stage_of(walk, i);
      if (!(stage.lo < first + kTile && stage.hi > first && stage.lo < stage.hi && stage.slot < walk.slots)) continue;
      stage.edge = TileEdges::first_of(p, range, stage.slot);
      if (first < stage.edge + kTile) break;
    }
    return i;
  }

  // This lane's slot of a stage, lane % 16.
  // shift: of dO.v, with float32 less a correction. state_weight: behind the state, the log of what the slot gives to
  // its weights L. state_log: of what the slots read.
  struct Fetched {
    int32_t query;
    float log, inverse, state_weight, shift, correction;
    uint32_t pattern;
    float state_log;
  };

  template <bool kIsBehind>
  SB_DEVICE Fetched fetch(int64_t h, const Stage& stage, int buffer) const {
    const int32_t slot = stage.slot + lane % kTile;
    Fetched of_lane{-1, 0, 0, 0, 0, 0, 0, 0};
    bool has_slot = false;
    if constexpr (kIsRagged)
      has_slot = stage.pattern != 0;
    else
      has_slot = slot < slots_of_row(p, range);
    if (has_slot && kind_of(p, b, h, slot) != SlotKind::kNone) {
      const auto record = load(record_of<float>(p, b, h, slot));
      of_lane.query = int32_t(query_of_slot(p, range, b, h, slot));
      of_lane.log = record.log, of_lane.inverse = record.inverse, of_lane.state_weight = record.state_weight;
      of_lane.shift = kIsWide ? record.delta : record.delta + record.correction;
      of_lane.correction = record.correction;
      if constexpr (kIsRagged) of_lane.pattern = stage.pattern;
      if (kIsBehind) of_lane.state_weight = MapRow<float, float>(p.x_map, b, h, of_lane.query).log() - record.log;
    }
    if constexpr (kIsRagged && kHasQuadratic && !kIsBehind)
      of_lane.state_log = log_of_state<float>(p, head, stage.state_slot);
    const int64_t to = base + Layout::kStages + buffer * Layout::kStageBytes;
    SB_UNROLL_COPIES
    for (int j = 0; j < kTile * Rows::kRowChunks / kWarp; ++j) {
      const int i = lane + j * kWarp, row = i / Rows::kRowChunks, chunk = i % Rows::kRowChunks,
                column = chunk * Rows::kNumbers;
      const int32_t query = shuffle_from(of_lane.query, row);
      const int64_t at = query < 0 ? 0 : query;
      const bool in_query = query >= 0 && column < p.head_dim, in_value = query >= 0 && column < p.value_pad;
      copy_async(to + Rows::place(row, chunk), p.q.at<const E>(b, h, at) + (in_query ? column : 0), in_query);
      copy_async(to + Layout::kMatrix + Rows::place(row, chunk),
                 p.d_out.at<const E>(b, h, at) + (in_value ? column : 0), in_value);
    }
    if (kHasQuadratic) SB_UNROLL
    for (int j = 0; j < kTile * 4 / kWarp; ++j) {
      const int i = lane + j * kWarp, row = i / 4, chunk = i % 4;
      const int32_t query = shuffle_from(of_lane.query, row);
      const int64_t of_query = (b * p.q_heads + h) * p.q_tokens + (query < 0 ? 0 : query);
      const void* from = nullptr;
      if constexpr (kIsWide)
        from = p.query_rows + of_query * 16 + chunk * 4;
      else
        from = p.query_coordinates + of_query * 32 + chunk * 8;
      copy_async(to + 2 * Layout::kMatrix + Coordinates::place(row, chunk), from, query >= 0);
    }
    if (kHasClusters && needs_clusters()) SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int32_t query = shuffle_from(of_lane.query, 8 * n + 2 * t + i);
      const float* from = p.cluster_scores + ((b * p.q_heads + h) * p.q_tokens + (query < 0 ? 0 : query)) * p.rank;
      SB_UNROLL
      for (int r = 0; r < 2; ++r)
        copy_word_async(place_of_product(to, n, 2 * r + i), from + cluster[r], query >= 0 && is_key(g + 8 * r));
    }
    return of_lane;
  }
  // Byte of a product of this lane in the stage at `stage`.
  SB_DEVICE int64_t place_of_product(int64_t stage, int n, int i) const {
    return stage + 2 * Layout::kMatrix + ((4 * n + i) * kWarp + lane) * 4;
  }

  SB_DEVICE void go_through() {
    const int64_t group = quotient(p.q_heads, p.kv_heads);
    if constexpr (kIsRagged) {
      TileSlots slots(p, b, first, keys);
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        slots.enter_head(int32_t(h));
        if constexpr (kHasQuadratic)
          add_stages<true>(h, [&](Stage& to) SB_INLINE_LAMBDA { return slots.next_behind(to); });
        for (int64_t level = 0; level < p.of_span.levels; ++level) {
          slots.enter_level(level);
          add_stages<false>(h, [&](Stage& to) SB_INLINE_LAMBDA { return slots.next_listed(to); });
        }
      }
    } else if (p.span) {
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        for (int64_t level = 0; level < p.of_span.levels; ++level) {
          const Walk walk(*this, h, level);
          int32_t next = 0;
          add_stages<false>(h, [&](Stage& to) {
            next = next_stage(walk, next, to);
            return next++ < walk.stages;
          });
        }
    }
  }

  // next_stage(stage) gives the next one, or false behind the last. `kIsBehind`: of slots whose state ends before the
  // tile.
  template <bool kIsBehind, class Next>
  SB_DEVICE void add_stages(int64_t h, const Next& next_stage) {
    Stage next_place;
    bool has_next = next_stage(next_place);
    if (!has_next) return;
    Fetched next = fetch<kIsBehind>(h, next_place, 0);
    commit_copies();
    for (int buffer = 0; has_next; buffer = 1 - buffer) {
      const Stage place = next_place;
      const Fetched of_lane = next;
      has_next = next_stage(next_place);
      if (has_next) next = fetch<kIsBehind>(h, next_place, 1 - buffer);
      commit_copies();
      wait_copies<1>();
      sync_warp();
      add_stage<kIsBehind>(of_lane, place, base + Layout::kStages + buffer * Layout::kStageBytes);
      sync_warp();  // before the buffer is filled again
    }
    wait_copies<0>();
  }

  template <bool kIsBehind>
  SB_DEVICE void add_stage(const Fetched& of_lane, const Stage& stage, int64_t from) {
    const uint32_t valid = ballot(of_lane.query >= 0);                      // of the slots twice
    float score[kSlotTiles][4], value[kSlotTiles][4], root[kSlotTiles][4];  // q.k; dO.v; 1 + x.y / 2
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) score[n][i] = value[n][i] = root[n][i] = 0;
    if constexpr (kIsWide) {
      multiply_rows<false, D, kStepsAtOnce>(base, int(from), p.head_steps, score);
      if (!kOfValues)
        multiply_rows<false, D, kStepsAtOnce>(base + int(Layout::kValues), int(from + Layout::kMatrix), p.value_steps,
                                              value);
      if (kHasQuadratic)
        multiply_coordinates<false>(base + int(Layout::kOwnCoordinates), int(from + 2 * Layout::kMatrix), root);
    } else {
      multiply_in_16_bits(from, score, value, root);
    }

    // In place of products: the gradient of a score, the weight, and the gradient of x.y.
    const float scale = float(p.scale * kLog2e);
    uint32_t listing[2] = {};  // which slots list the key of a row, of the stage of a block
    if constexpr (!kIsRagged) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int32_t key = first + g + 8 * r;
      const bool has_row = is_key(g + 8 * r) && key >= stage.lo && key < stage.hi;
      listing[r] = has_row ? valid & bits_between(key - stage.edge, kTile) : 0;
    }
    if (kIsRagged && kHasQuadratic && !kIsBehind) set_share(of_lane.state_log);
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * n + 2 * t + i;
      const float log = shuffle_from(of_lane.log, column), inverse = shuffle_from(of_lane.inverse, column),
                  shift = kOfValues ? 0.0f : shuffle_from(of_lane.shift, column),
                  correction = kOfValues || !kIsWide ? 0.0f : shuffle_from(of_lane.correction, column),
                  state_weight = kHasQuadratic ? shuffle_from(of_lane.state_weight, column) : 0.0f;
      const uint32_t pattern = kIsRagged ? shuffle_from(of_lane.pattern, column) : 0;
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int at = 2 * r + i;
        const bool is_listed = kIsRagged ? pattern >> (g + 8 * r) & 1 : listing[r] >> column & 1,
                   has_low_rank = kIsBehind ? pattern >> (kTile + g + 8 * r) & 1 : is_listed;
        const float gradient = kIsWide ? (value[n][at] - shift) - correction : value[n][at] - shift;
        float weight = is_listed ? exp2_of(score[n][at] * scale - log) * inverse : 0.0f;
        score[n][at] = is_listed ? weight * gradient : 0.0f;
        if (kHasQuadratic) {
          // Of keys behind the state L itself, else what the list takes back.
          const float of_pair = kIsBehind ? exp2_of(state_weight + kappa[r]) * inverse : -(state_weight * share[r]),
                      low_rank = has_low_rank ? of_pair * root[n][at] : 0.0f;
          weight += has_low_rank ? low_rank * root[n][at] : 0.0f;  // 0 times what is no number is none either
          root[n][at] = has_low_rank ? low_rank * gradient : 0.0f;
        }
        if (kHasClusters && needs_clusters()) {  // what the list takes back
          const float product = shared_array<float>(place_of_product(from, n, at)).get(0),
                      of_pair = exp2_of(exponent_of_cluster(product * scale, of_cluster[r]) - log);
          const float held = is_listed ? (kIsWide ? share[r] * of_pair : of_pair) * inverse : 0.0f;
          weight -= held, root[n][at] = is_listed ? -held * gradient : 0.0f;
        }
        value[n][at] = weight;
      }
    }
    if (kIsCareful && is_careful) clear_what_is_no_number(of_lane, from, listing, kOfValues ? value : score, root);
    if (kHasClusters && !kOfValues && is_first_part()) SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i) d_log_mass[i / 2] += root[n][i];
    if constexpr (kIsWide) {
      add_product_with_rows<D>(kOfValues ? value : score, int(kOfValues ? from + Layout::kMatrix : from), width(), sum);
      if (kHasQuadratic && !kOfValues) add_product_with_coordinates(root, int(from + 2 * Layout::kMatrix), d_pairs);
    } else {
      uint32_t parts[kNumberParts][4];
      split_rows(kOfValues ? value : score, from + Layout::kMatrix, parts);
      add_rows(parts, kOfValues ? from + Layout::kMatrix : from, width());
      if (kHasQuadratic && !kOfValues && is_first_part()) add_coordinates(root, from + 2 * Layout::kMatrix);
    }
  }

  // Of a stage of 16-bit tokens.
  SB_DEVICE void multiply_in_16_bits(int64_t from, float (&score)[kSlotTiles][4], float (&value)[kSlotTiles][4],
                                     float (&root)[kSlotTiles][4]) const {
    SB_UNROLL_STEPS
    for (int k = 0; k < kSteps; ++k) {
      const int64_t place = swizzled<2 * D>(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
      uint32_t rows[4], slots[4];
      if (k < p.head_steps) {
        load_left<2 * D>(base, k, rows), load_matrices(from + place, slots);
        multiply_add(score[0], rows, slots[0], slots[1], E{});
        multiply_add(score[1], rows, slots[2], slots[3], E{});
      }
      if (!kOfValues && k < p.value_steps) {
        load_left<2 * D>(base + Layout::kValues, k, rows), load_matrices(from + Layout::kMatrix + place, slots);
        multiply_add(value[0], rows, slots[0], slots[1], E{});
        multiply_add(value[1], rows, slots[2], slots[3], E{});
      }
    }
    if (!kHasQuadratic) return;
    uint32_t high[4], low[4];
    load_left<64>(base + Layout::kOwnCoordinates, 0, high), load_left<64>(base + Layout::kOwnCoordinates, 1, low);
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) {
      uint32_t x[4];  // the two halves of the first part, then of the second
      load_matrices(from + 2 * Layout::kMatrix + swizzled<64>(n * 8 + lane % 8, lane / 8), x);
      multiply_add(root[n], low, x[0], x[1], Bfloat16{});
      multiply_add(root[n], high, x[2], x[3], Bfloat16{});
      multiply_add(root[n], high, x[0], x[1], Bfloat16{});
    }
  }

  // Queries and gradients that are no numbers must not meet the zeros of keys that they do not see: zeros take their
  // place, and what their keys have of them is no number. States without a causal edge, as those of clusters are, pass
  // them on to all keys.
  static constexpr bool kIsCareful = kKind == LowRank::kNone || (kHasQuadratic && kIsRagged);
  SB_DEVICE void clear_what_is_no_number(const Fetched& of_lane, int64_t from, const uint32_t (&listing)[2],
                                         float (&numbers)[kSlotTiles][4], float (&of_maps)[kSlotTiles][4]) const {
    typedef std::conditional_t<kIsWide, float, Bfloat16> Coordinate;
    constexpr int kWords = Rows::kRowBytes / 4;
    uint32_t bad = 0;  // slots
    sync_warp();
    SB_NO_UNROLL
    for (int slot = 0; slot < kTile; ++slot) {
      bool are_numbers = true;
      SB_NO_UNROLL
      for (int i = lane; i < 2 * kWords; i += kWarp) {  // of the query, then of its gradient
        const int64_t row = from + i / kWords * Layout::kMatrix + slot * Rows::kRowBytes;
        are_numbers = clear_without_number(shared_array<uint32_t>(row + i % kWords * 4), E{}) && are_numbers;
      }
      if (kHasQuadratic && lane < 16) {
        const int64_t chunk = from + 2 * Layout::kMatrix + Coordinates::place(slot, lane / 4);
        are_numbers = clear_without_number(shared_array<uint32_t>(chunk + lane % 4 * 4), Coordinate{}) && are_numbers;
      }
      if (ballot(!are_numbers) != 0) bad |= 1u << slot;
    }
    sync_warp();
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * n + 2 * t + i;
      const uint32_t pattern = kIsRagged ? shuffle_from(of_lane.pattern, column) : 0;
      SB_UNROLL
      for (int r = 0; r < 2; ++r) {
        const bool is_listed = kIsRagged ? pattern >> (g + 8 * r) & 1 : listing[r] >> column & 1,
                   has_pair = is_listed || (pattern >> (kTile + g + 8 * r) & 1);
        if (!(bad >> column & 1)) continue;
        if (kOfValues ? has_pair : is_listed) numbers[n][2 * r + i] = float(NAN);
        if (kHasQuadratic && has_pair) of_maps[n][2 * r + i] = float(NAN);
      }
    }
  }
  // Whether sums that are no numbers ask for a second, careful walk.
  SB_DEVICE bool has_to_be_careful() {
    if (!kIsCareful || is_careful) return false;
    bool are_numbers = true;
    SB_UNROLL
    for (int i = 0; i < 4; ++i) {
      float zero = 0;
      SB_UNROLL
      for (int c = 0; c < kChunks; ++c) zero += sum[c][i] * 0.0f;
      SB_UNROLL
      for (int c = 0; kHasQuadratic && c < 2; ++c) zero += d_pairs[c][i] * 0.0f;
      are_numbers = are_numbers && zero == 0.0f;
    }
    is_careful = ballot(!are_numbers) != 0;
    return is_careful;
  }

  static SB_DEVICE float largest_of_row(const float (&numbers)[kSlotTiles][4], int r) {
    float largest = 0;
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int i = 2 * r; i < 2 * r + 2; ++i)
      largest = larger(largest, numbers[n][i] < 0.0f ? -numbers[n][i] : numbers[n][i]);
    largest = larger(largest, shuffle_xor(largest, 1));
    return larger(largest, shuffle_xor(largest, 2));
  }
  // Weights of slots whose gradients, at `gradients`, are zeros become 0, but for what is no number.
  SB_DEVICE void clear_without_gradient(int64_t gradients, float (&numbers)[kSlotTiles][4]) const {
    const int row = lane % kTile, half = lane / kTile;
    uint32_t any = 0;
    SB_NO_UNROLL
    for (int c = 0; c < kRowChunks / 2; ++c) {
      const int64_t at = swizzled<2 * D>(row, half * (kRowChunks / 2) + c);
      const FourWords words = shared_array<FourWords>(gradients + at).get(0);
      SB_UNROLL
      for (int i = 0; i < 4; ++i) any |= words.at[i] & 0x7fff7fffu;
    }
    const uint32_t both = ballot(any != 0), slots = (both | both >> kTile) >> 2 * t;
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int i = 0; i < 4; ++i)
      if (!(slots >> (8 * n + i % 2) & 1) && numbers[n][i] * 0.0f == 0.0f) numbers[n][i] = 0;
  }

  // Numbers of float16 are in two parts, and with their row's sums over the same power of two: so that they stay inside
  // of it, and no small row is lost. Slots without a gradient have no say in it: so that no bit of the past depends on
  // later queries that nothing is asked of. Those of bfloat16 are in two where the CPU's kernel does not round them.
  static constexpr int kNumberParts = kIsHalf || kIsRagged ? 2 : 1;
  SB_DEVICE void split_rows(float (&numbers)[kSlotTiles][4], int64_t gradients, uint32_t (&to)[kNumberParts][4]) {
    float largest_of[2] = {};
    const auto grows = [&](int r) { return largest_of[r] * scales[r] > 0x1p14f; };
    if (kIsHalf) SB_UNROLL
    for (int r = 0; r < 2; ++r) largest_of[r] = largest_of_row(numbers, r);
    if (kIsHalf && kOfValues && ballot(grows(0) || grows(1)) != 0) {
      clear_without_gradient(gradients, numbers);
      SB_UNROLL
      for (int r = 0; r < 2; ++r) largest_of[r] = largest_of_row(numbers, r);
    }
    if (kIsHalf) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float largest = largest_of[r];
      if (grows(r)) {
        const float wider = Scale::of(largest), ratio = wider * Scale::inverse(scales[r]);
        SB_UNROLL
        for (int c = 0; c < kChunks; ++c) sum[c][2 * r] *= ratio, sum[c][2 * r + 1] *= ratio;
        scales[r] = wider;
      }
      SB_UNROLL
      for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
      for (int i = 2 * r; i < 2 * r + 2; ++i) numbers[n][i] *= scales[r];
    }
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t parts[kNumberParts];
      split(numbers[n][2 * r], numbers[n][2 * r + 1], parts, E{});
      SB_UNROLL
      for (int i = 0; i < kNumberParts; ++i) to[i][2 * n + r] = parts[i];
    }
  }
  // sum += numbers by slot times the slots' rows at `from`, `width` wide.
  SB_DEVICE void add_rows(const uint32_t (&numbers)[kNumberParts][4], int64_t from, int64_t width) {
    const bool has_rest = kIsHalf || p.by_groups;
    SB_UNROLL
    for (int c = 0; c < kChunks; c += 2) {
      if ((first_chunk + c) * 8 >= width) continue;
      uint32_t rows[4];
      load_transposed(from + swizzled<2 * D>(lane % 16, first_chunk + c + lane / 16), rows);
      SB_UNROLL
      for (int i = kNumberParts - 1; i >= 0; --i) {
        if (i > 0 && !has_rest) continue;
        multiply_add(sum[c], numbers[i], rows[0], rows[1], E{});
        multiply_add(sum[c + 1], numbers[i], rows[2], rows[3], E{});
      }
    }
  }

  // d_pairs += gradients of x.y times the slots' coordinates at `from`.
  SB_DEVICE void add_coordinates(const float (&numbers)[kSlotTiles][4], int64_t from) {
    uint32_t high[4], low[4], first_part[4], second_part[4];
    SB_UNROLL
    for (int n = 0; n < kSlotTiles; ++n) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t of_pair[2];
      split(numbers[n][2 * r], numbers[n][2 * r + 1], of_pair, Bfloat16{});
      high[2 * n + r] = of_pair[0], low[2 * n + r] = of_pair[1];
    }
    load_transposed(from + swizzled<64>(lane % 16, lane / 16), first_part);
    load_transposed(from + swizzled<64>(lane % 16, 2 + lane / 16), second_part);
    SB_UNROLL
    for (int c = 0; c < 2; ++c) {
      multiply_add(d_pairs[c], low, first_part[2 * c], first_part[2 * c + 1], Bfloat16{});
      multiply_add(d_pairs[c], high, second_part[2 * c], second_part[2 * c + 1], Bfloat16{});
      multiply_add(d_pairs[c], high, first_part[2 * c], first_part[2 * c + 1], Bfloat16{});
    }
  }

  // -------------------- results

  SB_DEVICE void finish() {
    SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = g + 8 * r;
      if (!is_key(row)) continue;
      const float scale = (kOfValues ? 1.0f : float(p.scale)) * (kIsHalf ? Scale::inverse(scales[r]) : 1.0f);
      float* to = static_cast<float*>(kOfValues ? p.dv_sum : p.dk_sum) + (head * p.k_tokens + token(row)) * width();
      SB_UNROLL
      for (int c = 0; c < kChunks; ++c) SB_UNROLL
      for (int i = 0; i < 2; ++i) {
        if constexpr (kIsWide)
          sum[c][2 * r + i] *= scale;
        else if (8 * (first_chunk + c) < width())
          store(to + 8 * (first_chunk + c) + 2 * t + i, sum[c][2 * r + i] * scale);
      }
      if constexpr (kIsWide) store_float_sums(sum, r, to, width());
    }
    if (kHasQuadratic && !kOfValues && is_first_part()) finish_map();
    if (kHasClusters && !kOfValues && is_first_part()) SB_UNROLL
    for (int r = 0; r < 2; ++r) {
      float of_row = d_log_mass[r];
      of_row += shuffle_xor(of_row, 1), of_row += shuffle_xor(of_row, 2);
      if (t == 0 && is_key(g + 8 * r))
        store(static_cast<float*>(p.dy_sum) + head * p.k_tokens + token(g + 8 * r), of_row);
    }
  }

  // Pairs were multiplied by half of the queries' coordinates, but for the 1 behind them.
  SB_DEVICE void finish_map() {
    SB_UNROLL
    for (int c = 0; c < 2; ++c) SB_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int a = 8 * c + 2 * t + i % 2, at = (g + i / 2 * 8) * kRowWidth + a;
      dy().set(at, dy().get(at) + (a < p.rank ? 2.0f : 1.0f) * d_pairs[c][i]);
    }
    sync_warp();
    if (lane < kTile) {
      float product = 0;
      for (int64_t a = 0; a < p.rank; ++a) product += y().get(lane * kRowWidth + a) * dy().get(lane * kRowWidth + a);
      const int64_t last = lane * kRowWidth + p.rank;
      dy().set(last, QuadraticKernel::log_gradient(product, dy().get(last)));
    }
    sync_warp();
    float* to = static_cast<float*>(p.dy_sum) + head * p.k_tokens * (p.rank + 1);
    for (int64_t i = lane; i < kTile * (p.rank + 1); i += kWarp) {
      const int64_t row = quotient(i, p.rank + 1), a = i - row * (p.rank + 1);
      if (is_key(int(row))) store(to + token(row) * (p.rank + 1) + a, dy().get(row * kRowWidth + a));
    }
  }

  const BackwardTileKeysParams& p;
  const int32_t base, b, kv;
  const int32_t head, first;
  const int first_chunk;  // of 8 columns
  const int lane, g, t;
  RowRange range;
  uint32_t keys = 0;    // of the tile, those that count
  float kappa[2];       // log scales of rows g and g + 8
  float share[2] = {};  // what a state holds of these keys, relative to its own log scale, or to the cluster's
  // Of these keys, with the log scale, in 16 bits that of the key in it; and gradients by log masses, of this lane.
  int32_t cluster[2] = {};
  float of_cluster[2] = {}, d_log_mass[2] = {};
  bool is_careful = false;  // some query or gradient is no number
  float scales[2];          // of rows of sums, in float16
  float sum[kChunks][4], d_pairs[2][4];
};

template <class E, int D, LowRank kKind, bool kIsRagged>
SB_KERNEL SB_THREADS_AND_BLOCKS(kTileKeysThreads, (kTileKeysBlocks<E, D, kKind, kIsRagged>))
    attention_backward_tile_keys(BackwardTileKeysParams p) {
  const int64_t tiles = ceil_div(p.k_tokens, kTile), all = p.batch * p.kv_heads * tiles,
                warps = block_threads() / kWarp;
  typedef TileKeysLayout<E, D, kKind> Layout;
  const int64_t base = warp_index() * Layout::kBytes;
  for_each_task(quotient(Layout::kTasks * all + warps - 1, warps), [&](int64_t task) {
    const int64_t at = task * warps + warp_index();
    if (at >= Layout::kTasks * all) return;
    const int32_t kind = quotient(at, all);
    const int64_t tile = at - kind * all, head = quotient(tile, tiles), first = (tile - head * tiles) * kTile;
    if (kind % 2 == 0)
      TileKeys<E, D, kKind, kIsRagged, false>(p, base, head, first, kind / 2).run();
    else
      TileKeys<E, D, kKind, kIsRagged, true>(p, base, head, first, kind / 2).run();
  });
}

}  // namespace sb::cuda
