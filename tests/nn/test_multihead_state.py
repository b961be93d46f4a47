"""sb.MultiheadAttention: what it saves, loads, copies, converts and resets."""

from __future__ import annotations

import io
from typing import Any

import pytest
import testkit
import torch
from multihead_pairs import EVERY_KEY, INPUT, QUADRATIC, E, H, L, N, padding, pair
from testkit import COPIES, count_calls, low_ranks
from torch import nn

import scatterbrain as sb

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


LOW_RANKS = low_ranks(9, 16)
ARGUMENTS = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim": {"kdim": 20, "vdim": 12},
    "bias_kv": {"add_bias_kv": True},
}


@pytest.mark.parametrize("low_rank", LOW_RANKS)
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_torch_checkpoint_loads_strictly(arguments: str, low_rank: str, assign: bool):
    theirs = nn.Sequential(nn.MultiheadAttention(E, H, **ARGUMENTS[arguments]))
    ours = nn.Sequential(
        sb.MultiheadAttention(E, H, **ARGUMENTS[arguments], support=sb.Window(8), low_rank=LOW_RANKS[low_rank])
    )
    names = [name for name, _ in ours.named_parameters() if ".attention." not in name]
    assert names == [name for name, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=assign)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("low_rank", ["none", "input"])
def test_with_nothing_to_remember_a_checkpoint_loads_strictly_into_torchs_module(low_rank: str):
    theirs, ours = pair(sb.Window(8), LOW_RANKS[low_rank])
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("low_rank", LOW_RANKS)
def test_a_checkpoint_gives_the_same_output(low_rank: str):
    model = nn.Sequential(sb.MultiheadAttention(E, H, support=sb.Window(8), low_rank=LOW_RANKS[low_rank]))
    x = torch.randn(L, N, E)
    if low_rank in ("stored", "ema"):
        with sb.calibrate(model):
            model[0](x, x, x, need_weights=False)
    other = nn.Sequential(sb.MultiheadAttention(E, H, support=sb.Window(8), low_rank=LOW_RANKS[low_rank]))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(model[0](x, x, x, need_weights=False)[0], other[0](x, x, x, need_weights=False)[0])


def test_statistics_are_forgotten_with_the_weights_they_belong_to():
    ours = sb.MultiheadAttention(E, H, **QUADRATIC)
    x = torch.randn(L, N, E)
    with sb.calibrate(ours):
        ours(x, x, x, need_weights=False)
    ours.load_state_dict({}, strict=False)  # not this module's checkpoint
    assert ours.attention.is_calibrated
    ours.load_state_dict(nn.MultiheadAttention(E, H).state_dict())
    assert not ours.attention.is_calibrated


def test_a_part_of_the_statistics_is_a_missing_key():
    ours = sb.MultiheadAttention(E, H, **QUADRATIC)
    x = torch.randn(L, N, E)
    with sb.calibrate(ours):
        ours(x, x, x, need_weights=False)
    state = ours.state_dict()
    del state["attention.key_projection"]
    with pytest.raises(RuntimeError, match="Missing key.*attention.key_projection"):
        ours.load_state_dict(state)


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("low_rank", LOW_RANKS)
def test_copies_are_equal_and_stay_off_torchs_fast_path(low_rank: str, copied: Any):
    ours = sb.MultiheadAttention(E, H, support=sb.Window(8), low_rank=LOW_RANKS[low_rank])
    x = torch.randn(L, N, E)
    if low_rank == "stored":
        with sb.calibrate(ours):
            ours(x, x, x, need_weights=False)
    other = copied(ours)
    layer = testkit.encoder(E, H, 1).layers[0].eval()
    layer.self_attn, other.batch_first = other, True
    calls = count_calls(layer)
    with torch.no_grad():
        layer(x.transpose(0, 1))
        other.batch_first = False
        assert type(other) is sb.MultiheadAttention and calls == [other.attention]
        assert torch.equal(ours(x, x, x, need_weights=False)[0], other(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_converted_modules_work_in_their_dtype(dtype: torch.dtype):
    theirs, ours = pair(EVERY_KEY, sb.Quadratic(9, "learned"))
    theirs, ours, x = theirs.to(dtype), ours.to(dtype), torch.randn(L, N, E, dtype=dtype)
    got, expected = (m(x, x, x, key_padding_mask=padding(), need_weights=False)[0] for m in (ours, theirs))
    assert got.dtype == dtype
    valid = ~padding().T
    tolerance = 1e-5 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(got[valid], expected[valid], rtol=tolerance, atol=tolerance)
    made = sb.MultiheadAttention(E, H, dtype=dtype, support=sb.Window(8), low_rank=None)
    assert {p.dtype for p in made.parameters()} == {dtype} and made(x, x, x, need_weights=False)[0].dtype == dtype


def test_autocast_gives_the_autocast_dtype():
    _, ours = pair(sb.Window(8), INPUT)
    x = torch.randn(L, N, E)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x, x, x, need_weights=False)[0]
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_meta_modules_have_shapes_only():
    ours = sb.MultiheadAttention(E, H, device="meta", support=sb.Window(8), low_rank=sb.Quadratic(9, "learned"))
    assert all(p.is_meta for p in (*ours.parameters(), *ours.buffers()))


def test_resetting_parameters_draws_the_same_distribution_as_torch():
    ours = sb.MultiheadAttention(E, H)
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(E, H)
    torch.manual_seed(5)
    nn.Linear(E, E)  # torch's constructor draws its output projection before it resets
    ours._reset_parameters()
    torch.testing.assert_close(ours.in_proj_weight, theirs.in_proj_weight)


@pytest.mark.parametrize("low_rank", [sb.Quadratic(4, "learned"), sb.Favor(8)], ids=str)
def test_an_exact_module_loads_the_checkpoint_of_an_approximating_one(low_rank: object):
    approximate = sb.MultiheadAttention(32, 2, support=sb.Window(8), low_rank=low_rank)
    assert any(name.startswith("attention.") for name in approximate.state_dict())
    exact = sb.MultiheadAttention(32, 2, support=sb.Full())
    exact.load_state_dict(approximate.state_dict())
    assert torch.equal(exact.in_proj_weight, approximate.in_proj_weight)
