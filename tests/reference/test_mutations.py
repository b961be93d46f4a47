"""Tests of the tests: a mistake in what is judged fails the parity table."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from oracle import CASES, Case, assert_parity_in_float32, draw
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import scatterbrain as sb
from scatterbrain.low_rank import input_statistics, quadratic
from scatterbrain.padding import EVERYTHING

# -------------------- where mistakes are put


def mutate_function(patch: pytest.MonkeyPatch, name: str, mutant: Callable) -> None:
    """``mutant(original, *args, **kwargs)`` in place of the package's function of this name, wherever modules hold it.
    The definition is no part of what is judged."""
    judged = {n: m for n, m in sys.modules.items() if n.startswith("scatterbrain.") and ".reference" not in n}
    places = [module for module in judged.values() if callable(vars(module).get(name))]
    assert places, f"no module of scatterbrain holds a function {name}: name the one that took its place"
    for module in places:
        patch.setattr(module, name, functools.partial(mutant, getattr(module, name)))


class MutatedArguments(TorchDispatchMode):
    """Changes arguments of the package's operators, by name, forward and backward."""

    def __init__(self, changes: dict[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.changes = changes

    def __torch_dispatch__(
        self, operator: torch._ops.OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if operator.namespace != "scatterbrain":
            return operator(*args, **(kwargs or {}))
        names = [argument.name for argument in operator._schema.arguments]
        given = dict(zip(names, args)) | (kwargs or {})
        for name in self.changes.keys() & given.keys():
            if given[name] is not None:
                given[name] = self.changes[name](given[name])
        return operator(**given)


# -------------------- the mistakes


@dataclass
class Mutation:
    """A mistake, and the cases that could show it: a function of the package with a mutant in its place, or arguments
    of the operators with what changes them. ``composed``: in what other devices than the CPU run."""

    shows: Callable[[Case], bool]
    function: str = ""
    mutant: Callable | None = None
    arguments: dict[str, Callable] = field(default_factory=dict)
    composed: bool = False


def offset_plus_one(padding_info: Callable, *args: object) -> object:
    *rest, offset = args
    return padding_info(*rest, offset if type(offset) is int and offset == 0 else offset + 1)


def no_default(padding_info: Callable, query: Tensor, key: Tensor, key_mask: Tensor | None, *rest: object) -> object:
    query_mask, offset = rest
    nothing = torch.zeros(query.shape[0], query.shape[2], dtype=torch.bool)
    return padding_info(query, key, key_mask, nothing if query_mask is None else query_mask, offset)


def half_key_mean(moments: Callable, *args: object, **kwargs: object) -> object:
    result = moments(*args, **kwargs)
    halved = {"key_mean": result.key_mean * 0.5}
    return result._replace(**halved) if isinstance(result, tuple) else replace(result, **halved)


def upside_down(start: Callable, *args: object) -> Tensor:
    return start(*args).flip(0)


def without_mask(samples: Callable, tokens: Tensor, mask: Tensor | None) -> tuple:
    return samples(tokens, None if mask is None else torch.zeros_like(mask))


def of_everything(fitted: Callable, query: Tensor, key: Tensor, _: object, *settings: object) -> object:
    return fitted(query, key, EVERYTHING, *settings)


def other_directions(fitted: Callable, *args: object) -> object:
    projection = fitted(*args)
    return projection._replace(
        key_weight=torch.cat([projection.key_weight[:, :, :-1].flip(2), projection.key_weight[:, :, -1:]], 2)
    )


def later_first_key(span: Tensor) -> Tensor:
    low, high = span.unbind(-1)
    return torch.stack([torch.where(high > low, low + 1, low), high], -1)


def without_log_scale(key_map: Tensor) -> Tensor:
    key_map = key_map.clone()
    key_map[:, :, 2, -1] = 0
    return key_map


def has_lists(case: Case) -> bool:
    return isinstance(case.support, sb.Blocks) and not case.is_causal and case.queries > case.support.block_q


def is_fitted(case: Case) -> bool:
    return isinstance(case.low_rank, sb.Quadratic) and case.low_rank.statistics in ("stored", "input")


MUTATIONS = {
    "query offset + 1": Mutation(
        lambda c: isinstance(c.query_offset, Tensor) or c.query_offset != 0,
        "padding_info",
        offset_plus_one,
    ),
    "query mask does not default to the key mask": Mutation(
        lambda c: c.padding not in ("none", "all") and c.queries == c.keys > 0,
        "padding_info",
        no_default,
    ),
    "key mean x 0.5, stored": Mutation(
        lambda c: is_fitted(c) and c.low_rank.statistics == "stored" and min(c.queries, c.keys) > 2,
        "moments",
        half_key_mean,
    ),
    "key mean x 0.5, of the input": Mutation(
        lambda c: is_fitted(c) and c.low_rank.statistics == "input" and min(c.queries, c.keys) > 2,
        "sampled_moments",
        half_key_mean,
        composed=True,
    ),
    "subspace iteration starts elsewhere": Mutation(
        lambda c: is_fitted(c) and c.low_rank.statistics == "input" and min(c.queries, c.keys) > 2,
        "_start",
        upside_down,
        composed=True,
    ),
    "samples of the padding": Mutation(
        lambda c: (
            is_fitted(c)
            and c.low_rank.statistics == "input"
            and c.padding not in ("none", "all")
            and min(c.queries, c.keys) > 2
        ),
        "_samples",
        without_mask,
        composed=True,
    ),
    "statistics of the padding": Mutation(
        lambda c: (
            is_fitted(c)
            and c.low_rank.statistics == "input"
            and c.padding not in ("none", "all")
            and min(c.queries, c.keys) > 2
        ),
        "fitted_projection",
        of_everything,
    ),
    "directions of the keys in another order": Mutation(
        lambda c: is_fitted(c) and c.low_rank.statistics == "input" and min(c.queries, c.keys) > 2,
        "fitted_projection",
        other_directions,
    ),
    "window starts one key later": Mutation(
        lambda c: isinstance(c.support, sb.Window) and c.keys > c.support.keys and c.queries > 0,
        arguments={"span": later_first_key},
    ),
    "one sink fewer": Mutation(
        lambda c: (
            isinstance(c.support, sb.Window) and c.support.sinks > 0 and c.keys > c.support.keys and c.queries > 0
        ),
        arguments={"span_sinks": lambda sinks: max(sinks - 1, 0)},
    ),
    "lists in reversed order": Mutation(
        has_lists, arguments={"index": lambda index: index.flip(2), "count": lambda count: count.flip(2)}
    ),
    "one key without kappa": Mutation(
        lambda c: c.low_rank is not None and c.padding == "none" and min(c.queries, c.keys) > 2,
        arguments={"key_map": without_log_scale},
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_fails_the_parity_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one of the first six cases that could show it; without the mistake they pass in the same harness."""
    mutation = MUTATIONS[name]
    seeds = list(itertools.islice((seed for seed in range(CASES) if mutation.shows(draw(seed))), 6))

    def fails(seed: int, mutant: Callable | None, arguments: dict[str, Callable]) -> bool:
        with monkeypatch.context() as patch, MutatedArguments(arguments):
            if mutation.composed:
                patch.setattr(quadratic, "fitted_projection", input_statistics.composed_projection)
            if mutation.function:
                mutate_function(patch, mutation.function, mutant)
            try:
                assert_parity_in_float32(seed)
            except AssertionError:
                return True
            return False

    def unchanged(function: Callable, *args: object, **kwargs: object) -> object:
        return function(*args, **kwargs)

    assert len(seeds) == 6
    assert not any(fails(seed, unchanged, dict.fromkeys(mutation.arguments, lambda t: t)) for seed in seeds[:2])
    assert any(fails(seed, mutation.mutant, mutation.arguments) for seed in seeds)
