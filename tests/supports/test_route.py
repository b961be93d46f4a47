"""The routing operator against its dense definition, and what every list must satisfy."""

import math
from dataclasses import dataclass

import pytest
import torch
from operator_cases import operator_arguments
from testkit import projections, rand, run_python
from torch import Tensor

import scatterbrain as sb
from scatterbrain.hilbert import hilbert_order, inverse_order
from scatterbrain.operators.arguments import RouteArguments
from scatterbrain.padding import valid_range
from scatterbrain.reference import Coordinates
from scatterbrain.reference.routing import choices

POOLED = [{"keys": 24, "block_q": 8}, {"keys": 32, "block_q": 16}, {"keys": 48, "block_q": 32}]
TWO_POOLS = [{"keys": 32, "block_q": 16, "pools": 2}, {"keys": 48, "block_q": 32, "pools": 2}]
PER_QUERY = [{"keys": 24 + window, "block_q": 1, "block_k": 8, "window": window} for window in (0, 8, 16)]
# Keys that are listed whatever the scores: a window, sinks, both, and nothing else.
ALWAYS = [
    {"keys": 40, "block_q": 16, "window": 24},
    {"keys": 48, "block_q": 32, "sinks": 4},
    {"keys": 40, "block_q": 8, "window": 16, "sinks": 5},
    {"keys": 41, "block_q": 16, "window": 33, "sinks": 8},
    {"keys": 80, "block_q": 32, "window": 40, "sinks": 3, "pools": 2},
    {"keys": 40, "block_q": 1, "block_k": 8, "window": 16, "sinks": 4},
    {"keys": 40, "block_q": 1, "block_k": 8, "window": 0, "sinks": 11},
    {"keys": 40, "block_q": 1, "block_k": 8, "window": 16, "sinks": 4, "pools": 2},
    {"keys": 40, "block_q": 1, "block_k": 8, "window": 16, "sinks": 4, "pools": 0},
]
PER_QUERY_IN_TWO = [form | {"pools": 2} for form in PER_QUERY[::2]]
BY_SKETCH = [form | {"pools": 0} for form in PER_QUERY[::2]]
FORMS = [POOLED[1], TWO_POOLS[1], PER_QUERY[2], PER_QUERY_IN_TWO[1], BY_SKETCH[1], ALWAYS[2], ALWAYS[5]]


def ids(form: dict) -> str:
    return "-".join(f"{name}{value}" for name, value in form.items())


@dataclass(frozen=True, eq=False)
class Given:
    """A low-rank kernel for the definition whose coordinates are given, as the operator takes them: x and rho of each
    query, y and kappa of each key."""

    query_map: Tensor
    key_map: Tensor
    is_quadratic: bool


@sb.reference.coordinates.register
def _(low_rank: Given, inputs: sb.reference.Inputs) -> Coordinates:
    (x, rho), (y, kappa) = ((m[..., :-1].double(), m[..., -1].double()) for m in (low_rank.query_map, low_rank.key_map))
    return Coordinates(x, rho, y, kappa, low_rank.is_quadratic)


class Inputs:
    """Queries, keys and coordinates in float32, and everything else that the operator takes."""

    def __init__(
        self,
        n: int,
        m: int | None = None,
        heads: int = 2,
        kv_heads: int = 1,
        d: int = 16,
        low_rank: int = 1,
        batch: int = 2,
        seed: int = 0,
    ) -> None:
        m = n if m is None else m
        self.query, self.key = (
            1.5 * rand(batch, heads, n, d, seed=seed),
            1.5 * rand(batch, kv_heads, m, d, seed=seed + 1),
        )
        self.query_map = self.key_map = None
        self.low_rank = low_rank
        if low_rank:
            self.query_map = 0.7 * rand(batch, heads, n, 6, seed=seed + 2)
            self.key_map = 0.7 * rand(batch, kv_heads, m, 6, seed=seed + 3)
        if low_rank == 2:  # features are not negative
            self.query_map[..., :-1].abs_(), self.key_map[..., :-1].abs_()
        self.query_mask = self.key_mask = self.query_range = self.key_range = self.query_offset = None
        self.is_causal = False

    def mask(self, key_mask: Tensor, query_mask: Tensor | None = None) -> "Inputs":
        self.key_mask, self.query_mask = key_mask, key_mask if query_mask is None else query_mask
        self.key_range, self.query_range = valid_range(self.key_mask), valid_range(self.query_mask)
        return self

    def causal(self, offset: list[int] | None = None) -> "Inputs":
        self.is_causal = True
        self.query_offset = None if offset is None else torch.tensor(offset, dtype=torch.int32)
        return self

    def route(self, **form: int) -> tuple[Tensor, Tensor]:
        given = {name: value for name, value in vars(self).items() if name in RouteArguments._fields}
        scale = self.query.shape[-1] ** -0.5
        return torch.ops.scatterbrain.route(*operator_arguments(RouteArguments, **given, **form, scale=scale))

    def definition(self) -> sb.reference.Inputs:
        """For the definition, which finds padding's ranges by itself."""
        low_rank = Given(self.query_map, self.key_map, self.low_rank == 1) if self.low_rank else None
        return sb.reference.Inputs.of(
            self.query,
            self.key,
            low_rank,
            self.key_mask,
            self.is_causal,
            query_padding_mask=self.query_mask,
            query_offset=0 if self.query_offset is None else self.query_offset,
        )


def random_mask(batch: int, tokens: int, seed: int) -> Tensor:
    """Padding on both sides and holes between."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, tokens, generator=generator) < 0.2
    mask[0, : tokens // 5] = True
    mask[-1, tokens - tokens // 3 :] = True
    return mask


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[0], expected[0])


def assert_near(got: tuple[Tensor, Tensor], support: sb.Routed, inputs: sb.reference.Inputs) -> None:
    """The lists of the definition, but float32 may order two nearly equal scores otherwise: one entry of at most one
    list in 500."""
    (index, count), (expected, expected_count) = got, sb.reference.routed_lists(support, inputs)
    assert torch.equal(count, expected_count)
    other = {tuple(at) for at in (index != expected).any(-1).nonzero().tolist()}
    assert len(other) <= count.numel() / 500
    for choice in choices(support, inputs) if other else ():
        at = choice[:3]
        if at in other:
            swapped = list(set(index[at].tolist()) ^ set(expected[at].tolist()))
            one, two = choice.score[swapped].tolist()
            assert abs(one - two) <= 1e-5 * max(1, abs(one)), f"{at}: {swapped} score {one} and {two}"


def assert_as_defined(inputs: Inputs, **form: int) -> None:
    assert_near(inputs.route(**form), sb.Routed(**form), inputs.definition())


# ----------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("n, m", [(0, 0), (1, 1), (9, 9), (77, 77), (700, 700), (130, 900), (640, 63), (5, 0)])
@pytest.mark.parametrize("form", POOLED + TWO_POOLS + PER_QUERY + PER_QUERY_IN_TWO + BY_SKETCH, ids=ids)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_lists_are_those_of_the_definition(form: dict, n: int, m: int, masked: bool, is_causal: bool) -> None:
    inputs = Inputs(n, m, low_rank=(n + m + form["keys"] // 8) % 3, d=24, seed=n + m)
    if masked:
        key_mask = random_mask(2, m, n)
        inputs.mask(key_mask, key_mask if n == m else random_mask(2, n, m + 1))
    if is_causal:
        inputs.causal()
    assert_as_defined(inputs, **form)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("form", ALWAYS, ids=ids)
def test_windows_and_sinks_are_those_of_the_definition(form: dict, is_causal: bool) -> None:
    for n, m, masked in (
        (1, 1, False),
        (5, 5, True),
        (77, 77, True),
        (700, 700, False),
        (130, 400, True),
        (200, 63, True),
    ):
        inputs = Inputs(n, m, low_rank=(n + form["keys"]) % 3, d=24, seed=n + m)
        if masked:
            key_mask = random_mask(2, m, n)
            inputs.mask(key_mask, key_mask if n == m else random_mask(2, n, m + 1))
        assert_as_defined(inputs.causal() if is_causal else inputs, **form)


def test_a_causal_list_holds_sinks_and_window_whatever_the_scores() -> None:
    """By hand: block 12 of 16 queries begins at 192; 24 keys that end with its last query, and the first 4."""
    index, count = Inputs(300).causal().route(keys=40, block_q=16, window=24, sinks=4)
    assert count[:, :, 12].eq(40).all()
    listed = index[:, :, 12, :40]
    assert torch.equal(listed[..., :4], torch.arange(4).expand(2, 2, 4))
    assert torch.equal(listed[..., -24:], torch.arange(184, 208).expand(2, 2, 24))
    assert listed[..., 4:-24].ge(4).all() and listed[..., 4:-24].lt(184).all()


def test_no_window_and_a_window_of_the_block_are_the_same_causal_lists() -> None:
    inputs = Inputs(700).causal()
    assert_same(inputs.route(keys=40, block_q=16), inputs.route(keys=40, block_q=16, window=16))


@pytest.mark.parametrize("low_rank", [0, 1, 2])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
def test_stages_choose_as_the_definition(low_rank: int, is_causal: bool) -> None:
    """More keys than all candidate blocks hold, so that the stages really drop some."""
    inputs = Inputs(1100, low_rank=low_rank, heads=1, batch=1, seed=low_rank)
    inputs.is_causal = is_causal
    assert_as_defined(inputs, **POOLED[1])
    every_key, _ = sb.reference.routed_lists(sb.Routed(**POOLED[1]), inputs.definition(), stages=False)
    assert (every_key != inputs.route(**POOLED[1])[0]).any()


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("form", FORMS, ids=ids)
@pytest.mark.parametrize(
    "low_rank",
    [None, sb.Quadratic(5), sb.Quadratic(5, "learned"), sb.Quadratic(5, "input"), sb.Favor(12, seed=3)],
    ids=str,
)
def test_route_takes_padding_scale_and_coordinates_as_the_definition(
    low_rank: object, form: dict, is_causal: bool
) -> None:
    """The public function, with everything that it derives: query padding, ranges, statistics, coordinates."""
    if is_causal and low_rank == sb.Quadratic(5, "input"):
        return
    inputs, support = Inputs(150, heads=4, kv_heads=2, d=12, seed=7), sb.Routed(**form)
    query, key, mask = inputs.query.double(), inputs.key.double(), random_mask(2, 150, 4)
    fitted = defined = None
    if low_rank == sb.Quadratic(5):
        fitted = sb.fit_statistics(query, key, 5, mask, scale=0.2)
        defined = sb.reference.fit_statistics(query, key, 5, mask, scale=0.2)
    if low_rank == sb.Quadratic(5, "learned"):
        fitted = defined = projections(5, heads=4, kv_heads=2, head_dim=12)
    arguments = dict(low_rank=low_rank, key_padding_mask=mask, is_causal=is_causal, scale=0.2)
    arguments["query_offset"] = torch.tensor([3, -4]) if is_causal else 0
    lists = sb.route(query, key, support, statistics=fitted, **arguments)
    definition = sb.reference.Inputs.of(query, key, statistics=defined, **arguments)
    assert_near((lists.index, lists.count), support, definition)
    mask = sb.reference.mask(support, query, key, statistics=defined, **arguments)
    assert mask.any() and not (mask & ~definition.visible()).any()


@pytest.mark.parametrize("form", FORMS, ids=ids)
@pytest.mark.parametrize("offset", [[-40, 3], [33, 200], [1000, 7]])
def test_offset_moves_queries_along_the_keys(form: dict, offset: list[int]) -> None:
    inputs = Inputs(50, 300).causal(offset)
    assert_as_defined(inputs, **form)
    masked = Inputs(50, 300).causal(offset).mask(random_mask(2, 300, 1), random_mask(2, 50, 2))
    assert_as_defined(masked, **form)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
def test_superblocks_of_long_rows_choose_as_the_definition(is_causal: bool) -> None:
    """20,480 keys in 640 blocks; the queries sit at the end, so that the dense definition stays cheap."""
    inputs = Inputs(70, 20480, heads=1, d=8, batch=1, seed=5)
    if is_causal:
        inputs.causal([20480 - 75])
    assert_as_defined(inputs, **POOLED[1])
    assert_as_defined(inputs, **ALWAYS[2])


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_grouped_heads_share_keys(form: dict) -> None:
    grouped = Inputs(200, heads=6, kv_heads=2)
    repeated = Inputs(200, heads=6, kv_heads=2)
    repeated.key, repeated.key_map = (t.repeat_interleave(3, 1) for t in (grouped.key, grouped.key_map))
    assert_same(grouped.route(**form), repeated.route(**form))


def test_equal_scores_go_to_the_lowest_keys() -> None:
    inputs = Inputs(64, 2000, low_rank=0, batch=1)
    inputs.key[:] = inputs.key[:, :, :1]
    index, _ = inputs.route(**POOLED[1])
    assert torch.equal(index[0, 0, 0], torch.arange(32, dtype=torch.int32))
    index, _ = inputs.route(keys=24, block_q=1, block_k=8)
    assert index[0, 0, 0].tolist() == [0, 1, 2, -1]


def test_half_precision_and_strided_inputs_are_routed_as_their_float_copies() -> None:
    inputs = Inputs(200, d=20)
    inputs.query, inputs.key = inputs.query.bfloat16(), inputs.key.bfloat16()
    expected = Inputs(200, d=20)
    expected.query, expected.key = inputs.query.float(), inputs.key.float()
    inputs.query = inputs.query.transpose(1, 2).contiguous().transpose(1, 2)
    inputs.key_map = torch.stack([inputs.key_map, inputs.key_map], -1)[..., 0]
    assert_same(inputs.route(**POOLED[1]), expected.route(**POOLED[1]))


# ----------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("n, m", [(100, 100), (10, 100), (100, 13), (3, 3)])
@pytest.mark.parametrize(
    "huge, all_of_them",
    [
        (sb.Routed(300_000), sb.Routed(128)),
        (sb.Routed(2**31 - 1, window=2**31 - 17), sb.Routed(128, window=112)),
        (sb.Routed(2**31 - 1, sinks=4), sb.Routed(128, sinks=4)),
        (sb.Routed(2**31 - 8, 1, 8, 16, sinks=4), sb.Routed(128 + 24, 1, 8, 16, sinks=4)),
        (sb.Routed(2**31 - 8, 1, 8, 16), sb.Routed(128 + 16, 1, 8, 16)),
        (sb.Routed(2**31 - 8, 1, 8, 2**31 - 8), sb.Routed(240, 1, 8, 240)),
        (sb.LSH(3_000, rounds=150), sb.LSH(200, rounds=1)),
        (sb.LSH(300_000, rounds=3_000), sb.LSH(200, rounds=1)),
    ],
    ids=str,
)
def test_memory_follows_the_keys_that_there_are_whatever_the_budget(
    huge: sb.Routed | sb.LSH, all_of_them: sb.Routed | sb.LSH, n: int, m: int
) -> None:
    """A budget of more keys than there are lists every one that may be seen, in lists of no more entries than keys."""
    query, key = rand(1, 2, n, 16), rand(1, 2, m, 16, seed=1)
    capacity = -(-m // getattr(huge, "block_k", 1))
    for is_causal in (False,) if huge.is_bidirectional_only else (False, True):
        lists, expected = (sb.route(query, key, support, None, is_causal=is_causal) for support in (huge, all_of_them))
        assert lists.index.shape[3] == capacity and lists.index.untyped_storage().nbytes() == 4 * lists.index.numel()
        assert torch.equal(lists.count, expected.count) and torch.equal(lists.index, expected.index)
        assert is_causal or (lists.count == capacity).all()


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_a_head_with_its_own_number_of_keys_lists_what_it_would_alone(form: dict, is_causal: bool) -> None:
    """Where all keys are candidates; the heads' numbers are in no order, and two heads share the keys of one."""
    keys = tuple(form["keys"] + 8 * more for more in (2, 0, 5, 2))
    inputs = Inputs(n=150, heads=4, kv_heads=2).mask(random_mask(2, 150, 3))
    low_rank = sb.Centroid(5) if not is_causal else None
    query, key, masks = inputs.query, inputs.key, dict(key_padding_mask=inputs.key_mask, is_causal=is_causal)
    lists = sb.route(query, key, sb.Routed(**form | {"keys": keys}), low_rank, **masks)
    assert lists.index.shape[3] == min(sb.Routed(**form | {"keys": max(keys)}).capacity, 150)
    for h in range(4):
        alone = sb.route(query, key, sb.Routed(**form | {"keys": keys[h]}), low_rank, **masks)
        used = alone.index.shape[3]
        assert torch.equal(lists.count[:, h], alone.count[:, h])
        assert torch.equal(lists.index[:, h, :, :used], alone.index[:, h]) and (lists.index[:, h, :, used:] == -1).all()


@pytest.mark.parametrize("form", [POOLED[1], PER_QUERY[2]], ids=ids)
def test_heads_with_their_own_numbers_of_keys_choose_among_the_candidates_of_the_largest(form: dict) -> None:
    """Rows so long that few runs are candidates: more keys of one head are more candidates of the others."""
    query, key = rand(1, 2, 1100, 8), rand(1, 1, 1100, 8, seed=1)
    keys = form["keys"], form["keys"] + 120
    support = sb.Routed(**form | {"keys": keys})
    lists = sb.route(query, key, support, None)
    assert_near((lists.index, lists.count), support, sb.reference.Inputs.of(query, key))
    alone = sb.route(query, key, sb.Routed(**form), None)
    assert not torch.equal(lists.index[:, 0, :, : alone.index.shape[3]], alone.index[:, 0])


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("form", POOLED + TWO_POOLS + PER_QUERY + PER_QUERY_IN_TWO + BY_SKETCH, ids=ids)
def test_lists_are_ascending_within_the_budget_and_hold_valid_keys(form: dict, is_causal: bool) -> None:
    n, block_k = 333, form.get("block_k", 1)
    inputs = Inputs(n).mask(random_mask(2, n, 3))
    inputs.is_causal = is_causal
    index, count = inputs.route(**form)
    assert index.shape == (2, 2, -(-n // form["block_q"]), sb.Routed(**form).capacity)
    slot = torch.arange(index.shape[-1])
    used = slot < count[..., None]
    assert (index[~used] == -1).all() and (index[used] >= 0).all()
    assert (index.diff(dim=-1) > 0)[used[..., 1:]].all()
    for b in range(2):
        first = int(inputs.key_range[b, 0])
        valid = ~torch.nn.functional.pad(inputs.key_mask[b, first:], (0, first + block_k), value=True)
        entries = index[b][used[b]].long()
        assert valid[entries[:, None] * block_k + torch.arange(block_k)].any(-1).all()
    if form["block_q"] > 1 and not is_causal:
        assert (count.amax() == form["keys"]).item()


@pytest.mark.parametrize("form", POOLED, ids=ids)
def test_own_keys_are_always_listed(form: dict) -> None:
    index, _ = Inputs(203, heads=1, batch=1).route(**form)
    for t, listed in enumerate(index[0, 0].tolist()):
        assert set(range(t * form["block_q"], min((t + 1) * form["block_q"], 203))) <= set(listed)


def test_a_window_start_is_rounded_down_to_a_block() -> None:
    index, count = Inputs(100, heads=1, batch=1).causal().route(keys=16, block_q=1, block_k=8, window=16)
    for i in range(100):
        assert index[0, 0, i, : count[0, 0, i]].tolist() == list(range(max(i - 15, 0) // 8, i // 8 + 1))


# -------------------------------------------------------------------------------------------------------------- padding


def padded(inputs: Inputs, left: int, right: int, fill: float) -> Inputs:
    """The same tokens with `left` and `right` ignored ones around them; holes stay, and everything ignored holds
    `fill`.
    """
    out = Inputs(1)
    out.is_causal, out.low_rank = inputs.is_causal, inputs.low_rank
    pad = torch.nn.functional.pad
    for name, mask in (("query", inputs.query_mask), ("key", inputs.key_mask)):
        wide = pad(mask, (left, right), value=True)
        for part in (name, f"{name}_map"):
            setattr(
                out, part, pad(getattr(inputs, part), (0, 0, left, right)).masked_fill(wide[:, None, :, None], fill)
            )
        setattr(out, f"{name}_mask", wide)
        setattr(out, f"{name}_range", valid_range(wide))
    return out


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("form", FORMS + [POOLED[0]], ids=ids)
@pytest.mark.parametrize("left, right", [(0, 45), (13, 0), (70, 3)])
@pytest.mark.parametrize("fill", [math.nan, 1e4])
def test_padding_changes_no_list(form: dict, is_causal: bool, left: int, right: int, fill: float) -> None:
    n = 650
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(0)) < 0.1
    mask[:, 0] = mask[:, -1] = False
    inputs = Inputs(n).mask(mask)
    inputs.is_causal = is_causal
    index, count = inputs.route(**form)
    wide_index, wide_count = padded(inputs, left, right, fill).route(**form)
    blocks = index.shape[2]
    assert torch.equal(wide_index[:, :, :blocks], index) and torch.equal(wide_count[:, :, :blocks], count)
    assert (wide_count[:, :, blocks:] == 0).all() and (wide_index[:, :, blocks:] == -1).all()


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_a_row_without_keys_or_queries_lists_nothing(form: dict) -> None:
    mask = torch.zeros(2, 80, dtype=torch.bool)
    mask[1] = True
    for inputs in (
        Inputs(80).mask(mask),
        Inputs(80).mask(mask).causal(),
        Inputs(80).mask(mask, torch.zeros_like(mask)),
    ):
        _, count = inputs.route(**form)
        assert (count[1] == 0).all() and (count[0] > 0).all()


# ------------------------------------------------------------------------------------------------------------ causality


# The per-query form reads no coordinates.
@pytest.mark.parametrize(
    "form, low_rank",
    [(form, low_rank) for form in POOLED for low_rank in (0, 1, 2)] + [(form, 0) for form in PER_QUERY],
)
@pytest.mark.parametrize(
    "n, cuts", [(701, (1, 7, 8, 31, 32, 33, 128, 300, 575, 576, 577, 700)), (1500, (1023, 1024, 1161))]
)
def test_lists_read_nothing_after_the_first_query(form: dict, low_rank: int, n: int, cuts: tuple[int, ...]) -> None:
    before = Inputs(n, heads=1, batch=1, low_rank=low_rank).causal()
    index, count = before.route(**form)
    for cut in cuts:  # tokens from `cut` on change
        after = Inputs(n, heads=1, batch=1, low_rank=low_rank, seed=99).causal()
        for name in ("query", "key", "query_map", "key_map"):
            if getattr(before, name) is not None:
                changed = getattr(after, name).mul(3)
                changed[:, :, :cut] = getattr(before, name)[:, :, :cut]
                setattr(after, name, changed)
        new_index, new_count = after.route(**form)
        # Blocks whose first query comes before the cut; their own keys are listed by position.
        unchanged = -(-cut // form["block_q"])
        assert torch.equal(new_index[:, :, :unchanged], index[:, :, :unchanged])
        assert torch.equal(new_count[:, :, :unchanged], count[:, :, :unchanged])


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_causality_holds_for_shifted_queries_and_long_rows(form: dict) -> None:
    offset, n, m = 16700, 90, 17000
    before = Inputs(n, m, heads=1, d=8, batch=1).causal([offset])
    index, count = before.route(**form)
    for cut in (16703, 16735, 16736, 16760):
        after = Inputs(n, m, heads=1, d=8, batch=1).causal([offset])
        after.key[:, :, cut:] *= -2
        after.key_map[:, :, cut:] += 5
        after.query[:, :, cut - offset :] += 1
        new_index, new_count = after.route(**form)
        unchanged = -(-(cut - offset) // form["block_q"])
        assert torch.equal(new_index[:, :, :unchanged], index[:, :, :unchanged])
        assert torch.equal(new_count[:, :, :unchanged], count[:, :, :unchanged])


@pytest.mark.parametrize("form", POOLED + TWO_POOLS + PER_QUERY + PER_QUERY_IN_TWO + BY_SKETCH, ids=ids)
def test_no_listed_key_is_after_the_block(form: dict) -> None:
    index, _ = Inputs(300).causal().route(**form)
    block_q, block_k = form["block_q"], form.get("block_k", 1)
    last_query = (torch.arange(index.shape[2]) + 1) * block_q - 1
    assert (index * block_k <= last_query[:, None]).all()


# ---------------------------------------------------------------------------------------------- threads, memory, errors


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_threads_change_no_bit(form: dict, is_causal: bool) -> None:
    inputs = Inputs(3000, heads=2, kv_heads=2)
    inputs.is_causal = is_causal
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(inputs.route(**form))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_memory_is_linear(form: dict) -> None:
    """65,536 tokens in a process that may grow by 160 MB; scores of all pairs of blocks of 16 queries and keys would
    take 1 GB.
    """
    program = f"""
import resource, torch
from operator_cases import operator_arguments
from scatterbrain.operators.arguments import RouteArguments
q = torch.randn(1, 1, 65536, 32)
coordinates = torch.randn(1, 1, 65536, 10) * .3
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def route(n):
    x = coordinates[:, :, :n]
    torch.ops.scatterbrain.route(*operator_arguments(RouteArguments, query=q[:, :, :n], key=q[:, :, :n], query_map=x,
                                                     key_map=x, low_rank=1, **{form}))
route(1024)
before = peak()
route(65536)
grown = (peak() - before) / 1024
assert grown < 160, f"routing took {{grown:.0f}} MB"
"""
    run = run_python("-c", program)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "form",
    [
        {"keys": 8, "block_q": 16},
        {"keys": 64, "block_q": 4},
        {"keys": 64, "block_q": 16, "window": 15},
        {"keys": 64, "block_q": 16, "window": 64, "sinks": 1},
        {"keys": 64, "block_q": 16, "block_k": 8},
        {"keys": 8, "block_q": 1, "block_k": 8, "window": 16},
        {"keys": 64, "block_q": 1, "block_k": 4},
        {"keys": 60, "block_q": 1, "block_k": 8, "window": 16},
        {"keys": 64, "block_q": 1, "block_k": 8, "window": 12},
    ],
    ids=ids,
)
def test_forms_that_do_not_exist_are_refused(form: dict) -> None:
    with pytest.raises(RuntimeError, match="route: expected (block_q|window)"):
        Inputs(64).route(**form)


# -------------------------------------------------------------------------------------------------------- Hilbert order


@pytest.mark.parametrize("side", [2, 8, 32])
def test_hilbert_order_steps_from_cell_to_neighbour(side: int) -> None:
    order = hilbert_order(side, side)
    row, column = order // side, order % side
    assert ((row.diff().abs() + column.diff().abs()) == 1).all()


@pytest.mark.parametrize("height, width", [(1, 1), (37, 37), (3, 50), (14, 14)])
def test_hilbert_order_visits_every_cell_once_and_can_be_undone(height: int, width: int) -> None:
    order = hilbert_order(height, width)
    assert torch.equal(order.sort()[0], torch.arange(height * width))
    assert torch.equal(torch.arange(height * width)[order][inverse_order(order)], torch.arange(height * width))


def test_hilbert_order_keeps_runs_compact() -> None:
    """Runs of 16 cells of a 37 x 37 grid: their mean extent is below that of a 6 x 6 square, where raster order makes
    strips of 16.
    """
    order = hilbert_order(37, 37)[: 37 * 37 // 16 * 16].view(-1, 16)
    extent = (
        torch.maximum((order // 37).amax(1) - (order // 37).amin(1), (order % 37).amax(1) - (order % 37).amin(1)) + 1
    )
    assert extent.double().mean() < 6


def test_hilbert_order_refuses_an_empty_grid() -> None:
    with pytest.raises(ValueError, match="height and width must be at least 1"):
        hilbert_order(0, 3)
