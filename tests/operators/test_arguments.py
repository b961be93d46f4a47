"""Every argument of an operator's schema has its counterpart in Python, by name, in order and with the same default."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.operators.arguments import (
    TENSORS,
    AttentionArguments,
    CentroidArguments,
    ClusterArguments,
    ForwardResults,
    InputProjectionArguments,
    KeptResults,
    KernelInputs,
    QuadraticArguments,
    RouteArguments,
)
from scatterbrain.padding import PaddingInfo
from scatterbrain.supports import BlockLists
from scatterbrain.supports.base import OperatorRouting

TOKENS = ("query", "key", "value")
MADE_FROM = {
    "attention": AttentionArguments,
    "quadratic_attention": QuadraticArguments,
    "route": RouteArguments,
    "cluster": ClusterArguments,
    "prepare_centroid": CentroidArguments,
    "input_projection": InputProjectionArguments,
}
OPERATORS = {  # the others that take the same arguments
    "attention_with_state": (AttentionArguments,),
    "attention_backward": (ForwardResults, AttentionArguments, KeptResults),
    "quadratic_attention_with_state": (QuadraticArguments,),
}


def arguments_of(operator: str) -> list:
    return getattr(torch.ops.scatterbrain, operator).default._schema.arguments


def counterpart(groups: tuple) -> list[str]:
    return [name for group in groups for name in group._fields]


@pytest.mark.parametrize("operator", OPERATORS)
def test_named_tuples_list_the_arguments_of_the_schema_in_its_order(operator: str) -> None:
    assert counterpart(OPERATORS[operator]) == [argument.name for argument in arguments_of(operator)]


def test_a_prepared_call_takes_all_arguments_but_the_tokens() -> None:
    kept = [name for name in QuadraticArguments._fields if name not in TOKENS]
    assert [argument.name for argument in arguments_of("prepare")] == [*kept, "sources", "copies"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_defaults_are_those_of_the_schema(operator: str) -> None:
    groups = OPERATORS[operator]
    defaults = {name: value for group in groups for name, value in group._field_defaults.items()}
    assert defaults == {a.name: a.default_value for a in arguments_of(operator) if a.has_default_value()}


@pytest.mark.parametrize("operator", MADE_FROM)
def test_tensors_come_before_all_other_arguments(operator: str) -> None:
    kinds = ["Tensor" in str(argument.type) for argument in arguments_of(operator)]
    assert kinds == sorted(kinds, reverse=True) and sum(kinds) == TENSORS[MADE_FROM[operator]]


def test_lists_and_padding_are_named_as_the_arguments_that_they_become() -> None:
    """So that a new argument of either reaches the operators without being listed again."""
    lists, padding = BlockLists._fields, PaddingInfo._fields
    own = {*TOKENS, "is_causal", "scale", "packed_rank"}
    assert {*lists, *padding, *own, *KernelInputs._fields, "low_rank"} == set(AttentionArguments._fields)
    projection, routing = ("query_weight", "query_bias", "key_weight", "key_bias"), OperatorRouting._fields
    assert {*lists, *padding, *own, *projection, *routing} == set(QuadraticArguments._fields)
    assert {*lists, *padding, *own, *routing, "clusters"} - {*TOKENS} == set(CentroidArguments._fields)
    assert set(padding) < set(RouteArguments._fields)
    assert {*padding, "query", "key", "clusters", "scale"} == set(ClusterArguments._fields)
    assert ["query", "key", *padding, "rank", "scale"] == [*InputProjectionArguments._fields]


def test_every_schema_with_the_arguments_of_attention_is_compared() -> None:
    """A new operator that takes them joins the table above."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("scatterbrain::")}
    takes_lists = {name for name in names if "query_mask" in [argument.name for argument in arguments_of(name)]}
    assert takes_lists == {*MADE_FROM, *OPERATORS, "prepare"}
