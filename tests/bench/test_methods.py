"""Methods of the benchmark by name."""

from __future__ import annotations

import pytest
import torch
from testkit import fitted, qkv

import scatterbrain as sb
from scatterbrain.bench.methods import parse_method

PRESETS = ["drop_in", "quality", "fast", "quadratic"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_name_of_a_preset_is_its_pair_with_that_many_keys(name: str) -> None:
    preset = getattr(sb.presets, name)
    assert parse_method(f"{name}-48").pair() == preset(48)
    assert parse_method(f"{name}-48+none").pair() == (preset(48)[0], None)
    assert (parse_method(f"{name}-48").refusal(is_causal=True) is None) == (name == "quadratic")
    with pytest.raises(ValueError, match=f"expected {name}-KEYS"):
        parse_method(name)


def test_a_support_with_the_centroid_kernel_is_built_without_statistics() -> None:
    inputs = qkv(90)
    run = parse_method("window-16+centroid").build(fitted(), rank=3, is_causal=False)
    assert torch.equal(run(*inputs), sb.attention(*inputs, sb.Window(16), sb.Centroid()))
    assert parse_method("window-16").pair() == (sb.Window(16), sb.Quadratic(9))
