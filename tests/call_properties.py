"""What must hold for every call of ``sb.attention``: :func:`check` runs a drawn one in all ways that matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from drawn_calls import DrawnCall
from oracle import low_rank_share, row_error
from testkit import assert_same_bits, rand, weights
from torch import Tensor
from torch.nn.functional import pad

import scatterbrain as sb
from scatterbrain.execution import covers_every_key

# Times the error of the same formula in torch: the README's promise.
MARGIN = 2
# Errors that are always allowed, relative to a row. float32: the README's promise. float64 accumulates in float64. Half
# types: two roundings of a result whose parts are rounded too.
FLOORS = {torch.float32: 1e-5, torch.float64: 1e-10}
SHARES = {torch.float64: 1e-14}
ORDERS = 4  # of sums, in which torch's own error is measured
NAMES = ("q", "k", "v")
WITHOUT_DIMENSION = (
    "query_log_scale",
    "index",
    "log_mass",
    "scale",
)  # fields of coefficients that have no dimension of the head


class Checked:
    """A drawn call with its tensors."""

    def __init__(self, call: DrawnCall) -> None:
        self.call = call
        self.tokens, self.arguments = call.tokens(), call.arguments()

    @cached_property
    def definition(self) -> dict[str, Any]:
        """Arguments of the definition: content that chooses keys is judged at the lists that it came to."""
        support = self.arguments["support"]
        if not support.depends_on_content:
            return self.arguments
        with torch.autocast("cpu", getattr(torch, self.call.autocast or "bfloat16"), enabled=bool(self.call.autocast)):
            lists = sb.route(*self.tokens[:2], **self.arguments)
        lists = sb.Blocks(lists.index, lists.count, lists.block_q, lists.block_k, lists.query_order)  # checks content
        return self.arguments | {"support": lists}

    @cached_property
    def gradient_of_out(self) -> Tensor:
        return rand(*self.tokens[0].shape[:3], self.call.value_dim, seed=10 * self.call.seed + 8, dtype=torch.float64)

    @cached_property
    def gradient_of_lse(self) -> Tensor | None:
        if not self.call.return_lse:
            return None
        return rand(*self.tokens[0].shape[:3], seed=10 * self.call.seed + 9, dtype=torch.float64)

    # -------------------- runs

    def run(
        self,
        tokens: Sequence[Tensor] | None = None,
        arguments: dict[str, Any] | None = None,
        d_out: Tensor | None = None,
        d_lse: Tensor | None = None,
        threads: int = 2,
        return_lse: bool = True,
    ) -> dict[str, Tensor]:
        """Results and gradients by name; by default of the call as it was drawn."""
        torch.set_num_threads(threads)
        with torch.autocast("cpu", getattr(torch, self.call.autocast or "bfloat16"), enabled=bool(self.call.autocast)):
            return self._run(
                partial(sb.attention, return_lse=return_lse),
                self.tokens if tokens is None else tokens,
                self.arguments if arguments is None else arguments,
                self.gradient_of_out if d_out is None else d_out,
                self.gradient_of_lse if d_lse is None else d_lse,
            )

    def defined(self, dtype: torch.dtype = torch.float64, order: int = 0) -> dict[str, Tensor]:
        """The same by the definition, computed in ``dtype``; with another ``order`` it rounds otherwise: sums over the
        head's dimensions run in another order, and sums over keys and over queries are of two halves drawn at random,
        since results are linear in the values and gradients in what arrives."""
        statistics, head_dim = self.arguments["statistics"], self.call.head_dim
        generator = torch.Generator().manual_seed(order)
        permutation = torch.randperm(head_dim, generator=generator) if order else torch.arange(head_dim)
        query, key, value = (t.to(self.call.precision).to(dtype) for t in self.tokens)
        query, key = query[..., permutation], key[..., permutation]
        if isinstance(statistics, sb.Projections):
            statistics = statistics.to(torch.float64 if dtype == torch.float64 else torch.float32)
        if statistics is not None:
            by_dimension = {n: t[..., permutation] for n, t in vars(statistics).items() if n not in WITHOUT_DIMENSION}
            statistics = replace(statistics, **by_dimension)
        function = partial(sb.reference.attention, return_lse=True, dtype=dtype)
        arguments = self.definition | {"statistics": statistics}
        d_out, d_lse = self.gradient_of_out, self.gradient_of_lse
        if not order or torch.finfo(dtype).bits == 16:  # which would round the halves once more
            results = self._run(function, (query, key, value), arguments, d_out, d_lse)
        else:
            first = torch.rand(d_out.shape[2], generator=generator) < 0.5
            parts = [
                self._run(
                    function,
                    (query, key, value),
                    arguments,
                    d_out * half[:, None],
                    None if d_lse is None else d_lse * half,
                )
                for half in (first, ~first)
            ]
            results = {n: t + parts[1][n] if n.startswith("d") else t for n, t in parts[0].items()}
            first = torch.rand(value.shape[2], generator=generator) < 0.5
            halves = [value * half[:, None] for half in (first, ~first)]
            results["out"] = sum(function(query, key, half, **arguments)[0].detach() for half in halves)
        back = permutation.argsort()
        return {n: t if n in ("out", "lse", "dv", "dc") else t[..., back] for n, t in results.items()}

    def _run(
        self, function: Any, tokens: Sequence[Tensor], arguments: dict[str, Any], d_out: Tensor, d_lse: Tensor | None
    ) -> dict[str, Tensor]:
        wanted = self.call.needs_gradient
        leaves = [t.detach().requires_grad_(name in wanted) for name, t in zip(NAMES, tokens)]
        named = {f"d{name}": leaf for name, leaf in zip(NAMES, leaves)}
        if isinstance(arguments["statistics"], sb.Projections):
            learned = [t.detach().requires_grad_("p" in wanted) for t in weights(arguments["statistics"])]
            arguments = arguments | {"statistics": sb.Projections(*learned)}
            named |= dict(zip(("dPq", "db", "dc", "dPk", "da"), learned))
        results = function(*leaves, **arguments)
        results = dict(zip(("out", "lse"), results if isinstance(results, tuple) else (results,)))
        named = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
        # What reaches out is what the kernels' precision holds of the drawn gradient, in every run.
        upstream = {"out": d_out.to(self.call.precision), "lse": d_lse}
        ends = [name for name, t in results.items() if upstream[name] is not None and t.requires_grad]
        gradients: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in named.values()]
        if named and ends:
            given = [upstream[name].to(results[name].dtype) for name in ends]
            gradients = torch.autograd.grad(
                [results[name] for name in ends], list(named.values()), given, allow_unused=True, materialize_grads=True
            )
        return {name: t.detach() for name, t in results.items()} | dict(zip(named, gradients))


def check(call: DrawnCall) -> None:
    """Raises AssertionError with the property that does not hold."""
    checked = Checked(call)
    base = checked.run()
    _same(checked.run(threads=1), base, "on one thread")
    if call.layout != "contiguous":
        _same(checked.run([t.contiguous() for t in checked.tokens]), base, "from contiguous memory")
    judged = base
    if not call.return_lse:
        judged = checked.run(return_lse=False)
        if not _is_computed_by_torch(checked):
            _same(judged, {name: base[name] for name in judged}, "without return_lse")
            _same(checked.run(return_lse=False, threads=1), judged, "a second time, without return_lse, on one thread")
    check_accuracy(checked, judged)
    if call.is_causal and call.queries:
        check_causality(checked, base)
    check_padding(checked, base)


def _same(got: dict[str, Tensor], want: dict[str, Tensor], how: str) -> None:
    assert got.keys() == want.keys(), how
    for name in want:
        try:
            assert_same_bits([got[name].nan_to_num(1e30)], [want[name].nan_to_num(1e30)], [name])
        except AssertionError as error:
            raise AssertionError(f"other bits {how}: {error}") from None


def _is_computed_by_torch(checked: Checked) -> bool:
    call, arguments = checked.call, checked.arguments
    masked = arguments["key_padding_mask"] is not None or arguments["query_padding_mask"] is not None
    return not masked and covers_every_key(arguments["support"], call.queries, call.keys, call.is_causal)


# -------------------- accuracy


def check_accuracy(checked: Checked, got: dict[str, Tensor]) -> None:
    """At most the floor, MARGIN times the same formula in torch at the call's precision, or 1e-6 of the low-rank part's
    share (README). A few rows say little about torch's error: it is the largest over some orders of its sums."""
    call, exact, plain = checked.call, checked.defined(), None
    precision = call.precision
    for name, mine in got.items():
        want = exact[name]
        assert mine.shape == want.shape, f"{name}: expected shape {tuple(want.shape)}, got {tuple(mine.shape)}"
        if want.numel() == 0 or not want[want.isfinite()].abs().lt(torch.finfo(mine.dtype).max / 2).all():
            continue
        error, floor = _error(name, mine, want), max(FLOORS.get(t, torch.finfo(t).eps) for t in (precision, mine.dtype))
        if error <= floor:
            continue
        plain = plain or [checked.defined(precision, order) for order in range(ORDERS)]
        tokens = [t.to(precision).double() for t in checked.tokens]
        share = SHARES.get(precision, 1e-6) * low_rank_share(*tokens, **checked.definition)
        torchs = max(_error(name, run[name], want) for run in plain)
        allowed = max(floor, MARGIN * torchs, share)
        assert error <= allowed, (
            f"{name}: error {error:.2e}, allowed {allowed:.2e} (torch's {torchs:.1e}, share {share:.1e})"
        )


def _error(name: str, got: Tensor, want: Tensor) -> float:
    if name != "lse":
        return row_error(got, want)
    got, seen = got.double(), want.isfinite()
    if not torch.equal(got.isneginf(), want.isneginf()):
        return float("inf")
    return float(((got - want).abs() / want.abs().clamp(min=1))[seen].max()) if seen.any() else 0.0


# -------------------- causality and padding


def check_causality(checked: Checked, base: dict[str, Tensor]) -> None:
    """Other tokens after a query change no bit of the past, of its gradients, or of the projections' gradients."""
    call = checked.call
    t = call.seed % call.queries
    offset = torch.as_tensor(checked.arguments["query_offset"]).expand(call.batch)[:, None]
    later_query = (torch.arange(call.queries) > t).expand(call.batch, -1)[:, None, :, None]
    later_key = (torch.arange(call.keys) > t + offset)[:, None, :, None]
    others = replace(call, seed=call.seed + 100_000).tokens()
    changed = [
        torch.where(later, other, mine)
        for later, other, mine in zip((later_query, later_key, later_key), others, checked.tokens)
    ]
    d_out = checked.gradient_of_out.masked_fill(later_query, 0)
    d_lse = None if checked.gradient_of_lse is None else checked.gradient_of_lse.masked_fill(later_query[..., 0], 0)
    want = checked.run(d_out=d_out, d_lse=d_lse)
    got = checked.run(changed, d_out=d_out, d_lse=d_lse)
    for name in ("out", "lse"):
        got[name], want[name] = got[name][:, :, : t + 1], want[name][:, :, : t + 1]
        _same({name: want[name]}, {name: base[name][:, :, : t + 1]}, "of the past, by another upstream gradient")
    for name, later in (("dq", later_query), ("dk", later_key), ("dv", later_key)):
        assert name not in want or not want[name].masked_select(later).any(), (
            f"{name}: a gradient to what follows query {t}"
        )
    _same(got, want, f"by tokens after query {t}")


def check_padding(checked: Checked, base: dict[str, Tensor]) -> None:
    """What padded slots hold, how many there are and on which side changes no bit of valid tokens; what arrives at the
    output of padded queries is ignored."""
    call, arguments = checked.call, checked.arguments
    masks = [arguments["query_padding_mask"], arguments["key_padding_mask"]]
    if masks[0] is None and call.queries == call.keys:
        masks[0] = masks[1]
    masks = [
        torch.zeros(call.batch, n, dtype=torch.bool) if mask is None else mask
        for mask, n in zip(masks, (call.queries, call.keys))
    ]
    left, right = call.seed % 3 * 7, call.seed % 4 * 5
    support, low_rank = arguments["support"], arguments["low_rank"]
    if getattr(low_rank, "reads_input", False) or getattr(support, "query_order", None) is not None:
        left = right = 0  # a fit is a sum over all tokens; an order names them by number
    if call.support["kind"] == "blocks":
        more = -(-(left + call.queries + right) // support.block_q) - support.index.shape[2]
        lists = [pad(support.index, (0, 0, 0, more), value=-1), pad(support.count, (0, more))]
        support = sb.Blocks(*lists, support.block_q, support.block_k, support.query_order)

    def padded(t: Tensor, mask: Tensor, value: float) -> Tensor:
        wide = torch.full((*t.shape[:2], left + t.shape[2] + right, *t.shape[3:]), value, dtype=t.dtype)
        inside = wide[:, :, left : left + t.shape[2]]
        shape = (call.batch, 1, mask.shape[1], *[1] * (t.dim() - 3))
        inside.copy_(t.masked_fill(mask.view(shape), value))
        return wide

    of_token = (masks[0], masks[1], masks[1])
    tokens = [padded(t, mask, torch.nan) for t, mask in zip(checked.tokens, of_token)]
    wide_masks = [pad(mask, (left, right), value=True) for mask in masks]
    d_out = padded(checked.gradient_of_out, masks[0], 3.0)
    d_lse = None if checked.gradient_of_lse is None else padded(checked.gradient_of_lse, masks[0], 3.0)
    given = arguments | dict(support=support, query_padding_mask=wide_masks[0], key_padding_mask=wide_masks[1])
    got, want = checked.run(tokens, given, d_out, d_lse), dict(base)
    for name, t in got.items():
        mask = {"dk": masks[1], "dv": masks[1]}.get(name, masks[0])
        if name in ("out", "lse", "dq", "dk", "dv"):
            inner = slice(left, left + mask.shape[1])
            outside = t.clone()
            outside[:, :, inner] = 0
            assert name == "lse" or not outside.any(), (
                f"{name}: expected zero in padding, got {outside.abs().max():.2e}"
            )
            got[name] = t[:, :, inner]
        elif left or right:  # a projection's gradient is a sum over all tokens, in blocks that count from the first
            got[name] = want[name]
    _same(got, want, f"by the content of padding, {left} slots more before and {right} after")
