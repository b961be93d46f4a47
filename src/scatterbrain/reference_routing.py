"""Routed lists by definition: dense, one block of queries at a time, in the dtype of the inputs. The oracle of the
routing operator.

Notation. A key's position is counted from its row's first valid key. Scores compare what the low-rank part would get
wrong: |exp(s_j) - L_j| with s_j = q.k_j + v/4 |k_j|^2, where q and v are the mean and the mean (over coordinates)
variance of the block's scaled queries. The variance term is half of the second-order correction of log mean
exp(q_i.k_j) for a variance that is equal in all directions. Measured, it selects as well as one variance per coordinate
and, in the causal form, better, for one multiply-add per pair instead of head_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LEAF = 32  # keys of a candidate block (pooled)
SUPER = 16  # candidate blocks of a superblock (pooled)
LONG_ROW = 16384  # valid keys from which superblocks are used (pooled)
GROUP = 4  # neighbouring query blocks that share candidate blocks (pooled)
BRANCH = 8  # listed blocks of a superblock (per query)


def candidate_blocks(keys: int) -> int:
    """How many candidate blocks of 32 keys the pooled form keeps for a budget of `keys`."""
    return max(16, -(-3 * keys // 16))


def candidate_superblocks(routed: int) -> int:
    """How many superblocks the per-query form keeps for `routed` listed blocks."""
    return max(16, 2 * routed)


@dataclass
class Row:
    """One (batch row, key/value head): the valid keys by position, and their low-rank coordinates."""

    key: Tensor  # (Mv, d); ignored keys are zero
    valid: Tensor  # (Mv,)
    y: Tensor | None  # (Mv, r)
    kappa: Tensor | None

    def means(self, size: int, low_rank: int) -> "Row":
        """Every run of `size` keys as one key: the mean key, and the mean of the low-rank features (1, y / 2) exp(kappa
        / 2), or y exp(kappa).
        """
        count = -(-len(self.valid) // size)
        member = torch.zeros(count, len(self.valid), dtype=self.key.dtype)
        position = torch.arange(len(self.valid))
        member[position // size, position] = self.valid.to(self.key.dtype)
        total = member.sum(1)
        share = member / total.clamp_min(1)[:, None]
        if self.y is None:
            return Row(share @ self.key, total > 0, None, None)
        power = 2 if low_rank == 1 else 1
        log_share = torch.log(share) + self.kappa / power
        mean = torch.logsumexp(log_share, 1)
        y = torch.exp(log_share - mean[:, None]).nan_to_num(0.0) @ self.y
        return Row(share @ self.key, total > 0, y, power * mean)


@dataclass
class Pool:
    """What stands for a block of queries."""

    mean: Tensor
    variance: Tensor
    x: Tensor | None
    rho: Tensor | None

    def log_residual(self, row: Row, low_rank: int) -> Tensor:
        s = row.key @ self.mean + self.variance / 4 * row.key.square().sum(-1)
        if low_rank == 0:
            return s
        t = row.y @ self.x
        log_l = self.rho + row.kappa + (2 * torch.log((1 + t / 2).abs()) if low_rank == 1 else torch.log(t))
        larger, smaller = torch.maximum(s, log_l), torch.minimum(s, log_l)
        return larger + torch.log(-torch.expm1(smaller - larger))


def routed_lists(
    query: Tensor,
    key: Tensor,
    keys: int,
    block_q: int = 16,
    block_k: int = 1,
    window: int = 0,
    *,
    query_map: Tensor | None = None,
    key_map: Tensor | None = None,
    low_rank: int = 0,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_range: Tensor | None = None,
    key_range: Tensor | None = None,
    query_offset: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    stages: bool = True,
) -> tuple[Tensor, Tensor]:
    """The lists of `Routed(keys, block_q, block_k, window)`.

    query (B, Hq, N, d) and key (B, Hkv, M, d), any floating dtype. query_map (B, Hq, N, r + 1) holds x and rho, key_map
    (B, Hkv, M, r + 1) y and kappa; low_rank is 0 (no maps), 1 (quadratic) or 2 (general features). Masks are True where
    a token is ignored; ranges (B, 2) are [first valid, last valid + 1); query i stands at key i + query_offset.
    stages=False drops the candidate stages: every key is scored. Returns index (B, Hq, ceil(N / block_q), capacity) and
    count, int32.
    """
    (B, Hq, N, d), (Hkv, M) = query.shape, key.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    blocks = -(-N // block_q)
    index = torch.full((B, Hq, blocks, keys if block_k == 1 else keys // block_k + 1), -1, dtype=torch.int32)
    count = torch.zeros(B, Hq, blocks, dtype=torch.int32)
    for b in range(B):
        q_first, q_end = (0, N) if query_range is None else query_range[b].tolist()
        k_first, k_end = (0, M) if key_range is None else key_range[b].tolist()
        offset = 0 if query_offset is None else int(query_offset[b])
        q_valid = torch.ones(N, dtype=torch.bool) if query_mask is None else ~query_mask[b]
        k_valid = (torch.ones(M, dtype=torch.bool) if key_mask is None else ~key_mask[b])[k_first:k_end]
        q_valid = q_valid & (torch.arange(N) >= q_first) & (torch.arange(N) < q_end)
        for h in range(Hq):
            kv = h // (Hq // Hkv)

            maps = None if key_map is None else zeroed(key_map[b, kv, k_first:k_end], k_valid)
            row = Row(
                zeroed(key[b, kv, k_first:k_end], k_valid),
                k_valid,
                *((None, None) if maps is None else (maps[:, :-1], maps[:, -1])),
            )
            q = zeroed(query[b, h], q_valid) * scale
            q_map = None if query_map is None else zeroed(query_map[b, h], q_valid)
            grid = Grid(
                q_first, q_end, block_q, keys, (offset if is_causal else 0) - k_first, N == M, is_causal, q_valid
            )
            if block_k == 1:
                lists = pooled_lists(q, q_map, row, grid, low_rank, stages)
            else:
                lists = per_query_lists(q, row, grid, block_k, window, stages)
            for t, chosen in lists:
                index[b, h, t, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
                count[b, h, t] = len(chosen)
    return index, count


def zeroed(tokens: Tensor, valid: Tensor) -> Tensor:
    """Ignored tokens hold zeros, whatever they held."""
    return tokens.where(valid[:, None], 0)


@dataclass
class Grid:
    """Where the blocks of queries of one row lie; `shift` takes a query's slot to its position."""

    q_first: int
    q_end: int
    block_q: int
    keys: int
    shift: int
    same_tokens: bool
    is_causal: bool
    q_valid: Tensor

    def slots(self, t: int) -> list[int]:
        begin = self.q_first + t * self.block_q
        return list(range(begin, min(begin + self.block_q, self.q_end)))

    def valid_slots(self, t: int) -> list[int]:
        return [i for i in self.slots(t) if self.q_valid[i]]


def best(score: Tensor, eligible: list[int], n: int) -> list[int]:
    """The n of `eligible` (ascending) with the highest scores, ascending; ties go to the lowest."""
    value = score.tolist()
    order = sorted(eligible, key=lambda i: -value[i])  # sorted() is stable
    return sorted(order[: max(n, 0)])


def shared_score(pools: list[Pool], means: Row, eligible: list[int], low_rank: int) -> Tensor:
    """The largest residual of each run of keys over some query blocks, each block's relative to its own largest."""
    scores = [pool.log_residual(means, low_rank) for pool in pools]
    return torch.stack([s - s[eligible].max() for s in scores]).amax(0) if eligible else scores[0]


def pooled_lists(q: Tensor, q_map: Tensor | None, row: Row, grid: Grid, low_rank: int, stages: bool):
    length = len(row.valid)
    leaf, coarse = row.means(LEAF, low_rank), row.means(LEAF * SUPER, low_rank)
    valid = row.valid.tolist()
    kept_blocks = candidate_blocks(grid.keys)

    def pool(t: int) -> Pool:
        members = grid.valid_slots(t)
        if grid.is_causal:
            members = [i for i in range(max(members[0] - 15, 0), members[0] + 1) if grid.q_valid[i]]
        rows = q[members]
        x, rho = (None, None) if q_map is None else (q_map[members, :-1].mean(0), q_map[members, -1].mean())
        return Pool(rows.mean(0), rows.var(0, correction=0).mean(), x, rho)

    def end(t: int) -> int:  # candidates are the keys before this position
        return min(max(grid.slots(t)[0] + grid.shift, 0), length) if grid.is_causal else length

    blocks = -(-(grid.q_end - grid.q_first) // grid.block_q)
    for first in range(0, blocks, GROUP):
        group = [t for t in range(first, min(first + GROUP, blocks)) if grid.valid_slots(t)]
        if not group:
            continue
        pools = {t: pool(t) for t in group}

        # The causal form may look at the group's first block only.
        judges = [pools[t] for t in (group[:1] if grid.is_causal else group)]

        # 1. Candidate blocks: all that are complete, or the best of those in the best superblocks. What follows the
        # last complete one always stays.
        if stages:
            size = LEAF * SUPER
            complete = end(first) // LEAF if grid.is_causal else -(-length // LEAF)
            blocks_left = list(range(complete))
            if length >= LONG_ROW:
                supers = end(first) // size if grid.is_causal else -(-length // size)
                eligible = [c for c in range(supers) if coarse.valid[c]]
                kept = set(best(shared_score(judges, coarse, eligible, low_rank), eligible, 2 * kept_blocks))
                blocks_left = [c for c in blocks_left if c // SUPER in kept or c // SUPER >= supers]
            eligible = [c for c in blocks_left if leaf.valid[c]]
            kept = set(best(shared_score(judges, leaf, eligible, low_rank), eligible, kept_blocks))
            candidates = [j for j in range(length) if valid[j] and (j // LEAF in kept or j // LEAF >= complete)]
        else:
            candidates = [j for j in range(length) if valid[j]]

        # 2. The block's own keys, and the best of the candidates.
        for t in group:
            begin = grid.slots(t)[0] + grid.shift
            own = set()
            if grid.is_causal or grid.same_tokens:
                own = {j for j in range(max(begin, 0), min(begin + len(grid.slots(t)), length)) if valid[j]}
            eligible = [j for j in candidates if j < end(t) and j not in own]
            score = pools[t].log_residual(row, low_rank)
            yield t, sorted(own | set(best(score, eligible, grid.keys - len(own))))


def per_query_lists(q: Tensor, row: Row, grid: Grid, block_k: int, window: int, stages: bool):
    length = len(row.valid)
    count = -(-length // block_k)
    routed = (grid.keys - window) // block_k
    kept_supers = candidate_superblocks(routed)

    def spread(means: Row, size: int) -> Tensor:  # mean squared distance of the run's valid keys to their mean
        square = Row(row.key.square().sum(-1, keepdim=True), row.valid, None, None).means(size, 0).key[:, 0]
        return (square - means.key.square().sum(-1)).clamp_min(0)

    fine, coarse = row.means(block_k, 0), row.means(block_k * BRANCH, 0)
    fine_spread, coarse_spread = spread(fine, block_k), spread(coarse, block_k * BRANCH)
    for i in range(grid.q_first, grid.q_end):
        if not grid.q_valid[i]:
            continue
        # 1. The window, whole blocks [low, high).
        if grid.is_causal:
            p = i + grid.shift
            low = max(p - window + 1, 0) // block_k
            high = min(p // block_k + 1, count)
        else:
            p = i + grid.shift if grid.same_tokens else (i - grid.q_first) * length // (grid.q_end - grid.q_first)
            low = max(p - window // 2, 0) // block_k
            high = min(-(-min(p + window // 2, length) // block_k), count) if window > 1 else low
        low, high = min(low, count), max(high, 0)
        nearby = [c for c in range(low, high) if fine.valid[c]]

        # 2. The best of the other blocks, from the best superblocks.
        spread_weight = q[i].square().mean() / 2
        elsewhere = [
            c for c in range(count) if fine.valid[c] and (c < low or (c >= max(high, low) and not grid.is_causal))
        ]
        if stages:
            supers = low // BRANCH if grid.is_causal else -(-count // BRANCH)
            if supers > kept_supers:
                eligible = [c for c in range(supers) if coarse.valid[c]]
                kept = set(best(coarse.key @ q[i] + spread_weight * coarse_spread, eligible, kept_supers))
                elsewhere = [c for c in elsewhere if c // BRANCH in kept or c // BRANCH >= supers]
        score = fine.key @ q[i] + spread_weight * fine_spread
        # A query before the row's first key sees nothing.
        yield i - grid.q_first, sorted(nearby + best(score, elsewhere, routed)) if not grid.is_causal or p >= 0 else []
