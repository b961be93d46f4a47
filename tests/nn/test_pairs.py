"""Two supports and two kernels in one module: what bidirectional and causal calls run with, and what is kept."""

from __future__ import annotations

import pickle
import warnings
from functools import partial

import pytest
import testkit
import torch
from testkit import causal_mask, leaves, padding
from torch import Tensor, nn

import scatterbrain as sb

qkv = partial(testkit.qkv, 300, heads=4, kv_heads=4, head_dim=16)
CENTROID, QUADRATIC = sb.Centroid(8), sb.Quadratic(9)
WINDOW = sb.Window(16)


def module(low_rank: object = CENTROID, causal_low_rank: object = QUADRATIC, **arguments: object):
    return sb.ScatterbrainAttention(
        4, 16, support=WINDOW, low_rank=low_rank, causal_low_rank=causal_low_rank, **arguments
    )


# -------------------- what is chosen


def test_without_a_choice_bidirectional_calls_run_at_once_and_causal_ones_say_how_to_calibrate() -> None:
    core, inputs = sb.ScatterbrainAttention(4, 16), qkv()
    assert torch.equal(core(*inputs), sb.attention(*inputs, *sb.presets.drop_in()))
    assert not core.needs_calibration and core.lacks_statistics(True) and not core.lacks_statistics(False)
    with pytest.raises(ValueError, match=r"not calibrated.*sb.calibrate"):
        core(*inputs, is_causal=True)
    with sb.calibrate(core):
        core(*inputs, is_causal=True)
    statistics = sb.fit_statistics(*inputs[:2])
    assert torch.equal(core(*inputs, is_causal=True), sb.attention(*inputs, *sb.presets.causal(), is_causal=True,
                                                                   statistics=statistics))  # fmt: skip


@pytest.mark.parametrize(
    ("given", "bidirectional", "causal"),
    [
        ({}, sb.presets.drop_in(), sb.presets.causal()),
        ({"support": WINDOW}, (WINDOW, sb.Centroid(64)), (WINDOW, QUADRATIC)),
        ({"low_rank": CENTROID}, (sb.presets.drop_in()[0], CENTROID), (sb.presets.causal()[0], CENTROID)),
        ({"low_rank": None}, (sb.presets.drop_in()[0], None), (sb.presets.causal()[0], None)),
        ({"causal_low_rank": sb.Favor(8)}, sb.presets.drop_in(), (sb.presets.causal()[0], sb.Favor(8))),
        ({"support": WINDOW, "low_rank": QUADRATIC}, (WINDOW, QUADRATIC), (WINDOW, QUADRATIC)),
        ({"low_rank": CENTROID, "causal_low_rank": None}, (sb.presets.drop_in()[0], CENTROID),
         (sb.presets.causal()[0], None)),
        ({"support": sb.Full()}, (sb.Full(), None), (sb.Full(), None)),
        ({"support": WINDOW, "causal_support": sb.Full()}, (WINDOW, sb.Centroid(64)), (sb.Full(), None)),
        ({"support": sb.LSH(16)}, (sb.LSH(16), sb.Centroid(64)), (sb.LSH(16), sb.Centroid(64))),
    ],
)  # fmt: skip
def test_what_is_given_serves_both_kinds_of_calls_and_what_is_not_is_that_of_the_presets(
    given: dict, bidirectional: tuple, causal: tuple
) -> None:
    layer = sb.MultiheadAttention(64, 4, **given)
    for core in (sb.ScatterbrainAttention(4, 16, **given), layer.attention):
        if core is not None:  # exact
            assert (core.support, core.low_rank) == bidirectional
            assert (core.support_of(True), core.causal_low_rank) == causal
            has_state = any(kernel in (QUADRATIC, sb.Favor(8)) for _, kernel in (bidirectional, causal))
            assert bool(core.state_dict()) == core.has_state == has_state
    assert (layer.attention is None) == (bidirectional[0] == sb.Full())


def test_a_kernel_of_bidirectional_calls_that_is_given_alone_refuses_causal_ones_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"Centroid.*would see the future.*causal_low_rank=Quadratic\(\)"):
        sb.ScatterbrainAttention(4, 16, low_rank=CENTROID)(*qkv(), is_causal=True)


def test_heads_narrower_than_the_default_kernel_of_causal_calls_get_one_of_their_rank() -> None:
    core, inputs = sb.ScatterbrainAttention(4, 4), qkv(head_dim=4)
    assert core.causal_low_rank == sb.Quadratic(4)
    with sb.calibrate(core):
        core(*inputs, is_causal=True)
    assert core(*inputs, is_causal=True).isfinite().all() and core(*inputs).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((QUADRATIC, sb.Favor(8)), ValueError, "keeps the state of one low-rank kernel, got .*Quadratic.*Favor"),
        ((QUADRATIC, sb.Quadratic(9, "learned")), ValueError, "keeps the state of one low-rank kernel"),
        ((CENTROID, sb.Centroid(4)), ValueError, "causal_low_rank must be a kernel that causal attention can use"),
        ((CENTROID, CENTROID), ValueError, "causal_low_rank must be a kernel that causal attention can use"),
        ((QUADRATIC, sb.Quadratic(9, "input")), ValueError, "causal_low_rank must be a kernel that causal attention"),
        ((CENTROID, "quadratic"), TypeError, "causal_low_rank must be .* or None, got str"),
        ((CENTROID, sb.Quadratic(17)), ValueError, "rank must be at most head_dim=16, got 17"),
    ],
)
def test_pairs_that_cannot_be_are_refused_when_the_module_is_made(arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        module(*arguments)


def test_two_kernels_with_state_are_refused_by_the_swap_of_a_model_before_it_changes() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), 1)
    with pytest.raises(ValueError, match="replace_attention: a module keeps the state of one low-rank kernel"):
        sb.replace_attention(model, low_rank=QUADRATIC, causal_low_rank=sb.Favor(8))
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("other", [sb.Quadratic(9, "input"), None, CENTROID])
def test_a_kernel_with_state_may_be_that_of_either_kind_of_calls(other: object) -> None:
    names = sb.ScatterbrainAttention(4, 16, low_rank=QUADRATIC).state_dict().keys()
    causal = module(other, QUADRATIC)
    assert causal.state_dict().keys() == names and causal.kernel_of_state == QUADRATIC
    if other is None:
        assert module(QUADRATIC, None).state_dict().keys() == names


# -------------------- statistics


def test_inside_calibrate_only_the_calls_of_the_kernel_with_statistics_are_exact_and_gathered() -> None:
    core, alone, inputs = module(), module(), qkv()
    with sb.calibrate(core):
        bidirectional = core(*qkv(seed=7))
        exact = core(*inputs, is_causal=True)
    with sb.calibrate(alone):
        alone(*inputs, is_causal=True)
    assert torch.equal(bidirectional, sb.attention(*qkv(seed=7), WINDOW, CENTROID))
    torch.testing.assert_close(exact, nn.functional.scaled_dot_product_attention(*inputs, is_causal=True))
    assert all(torch.equal(a, b) for a, b in zip(core.buffers(), alone.buffers(), strict=True))


def test_a_block_of_calls_without_statistics_says_that_there_was_nothing_to_calibrate() -> None:
    core = module()
    before = {name: t.clone() for name, t in core.state_dict().items()}
    with pytest.warns(
        UserWarning, match="nothing to calibrate: every call inside the block was bidirectional.*Centroid"
    ):
        with sb.calibrate(core):
            core(*qkv())
    assert not core.is_collecting and all(torch.equal(t, before[name]) for name, t in core.state_dict().items())
    with pytest.warns(UserWarning, match="every call inside the block was causal"):
        with sb.calibrate(other := module(QUADRATIC, None)):
            other(*qkv(), is_causal=True)
    with pytest.raises(ValueError, match="no ScatterbrainAttention was run inside the block"), sb.calibrate(core):
        pass


def test_a_model_without_causal_calls_has_nothing_to_calibrate_and_runs_the_same_after_it() -> None:
    core, inputs = sb.ScatterbrainAttention(4, 16, low_rank=CENTROID), qkv()
    before = core(*inputs)
    with pytest.warns(UserWarning, match="there is nothing to calibrate, since Centroid"), sb.calibrate(core):
        assert torch.equal(core(*inputs), before)
    assert torch.equal(core(*inputs), before) and not core.state_dict()


def test_a_moving_average_gathers_causal_calls_alone() -> None:
    core = module(causal_low_rank=sb.Quadratic(9, "ema"))
    core(*qkv())
    assert core.gathered is None
    core(*qkv(), is_causal=True)
    assert core.gathered is not None
    sb.update_statistics(core)
    assert core.is_calibrated and torch.equal(core(*qkv()), sb.attention(*qkv(), WINDOW, CENTROID))


def test_learned_projections_of_causal_calls_get_zero_gradients_from_bidirectional_ones() -> None:
    core = module(causal_low_rank=sb.Quadratic(9, "learned"))
    core(*leaves(qkv())).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in core.parameters())
    core(*leaves(qkv()), is_causal=True).square().sum().backward()
    assert core.query_projection.grad.any()


def test_the_error_of_a_layer_that_was_bypassed_is_that_of_causal_calls_alone() -> None:
    core = module()
    core.bypassed = "dropout"
    assert core(*qkv()).isfinite().all()
    with pytest.raises(ValueError, match="ScatterbrainAttention is not calibrated for causal calls: .*dropout"):
        core(*qkv(), is_causal=True)


# -------------------- checkpoints


def test_statistics_of_one_kernel_for_all_calls_load_into_the_default_for_its_causal_ones() -> None:
    old = sb.ScatterbrainAttention(4, 16, None, *sb.presets.quadratic(), causal_support=sb.presets.causal()[0])
    with sb.calibrate(old):
        old(*qkv())
    new = sb.ScatterbrainAttention(4, 16)
    new.load_state_dict(old.state_dict())
    assert torch.equal(new(*qkv(seed=3), is_causal=True), old(*qkv(seed=3), is_causal=True))
    old.load_state_dict(new.state_dict())
    assert old.is_calibrated


def test_a_module_without_state_leaves_out_what_a_checkpoint_holds_and_says_how_to_use_it() -> None:
    old = sb.ScatterbrainAttention(4, 16, None, *sb.presets.quadratic())
    new = sb.ScatterbrainAttention(4, 16, low_rank=CENTROID)
    with pytest.warns(UserWarning, match=r"are not used: Centroid.*sb.presets.quadratic\(\).*'scatterbrain:quadratic'"):
        new.load_state_dict(old.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new.load_state_dict({})


def test_an_encoder_that_was_calibrated_with_the_quadratic_pair_loads_into_one_of_the_default() -> None:
    encoder = partial(testkit.encoder, 64, 4, 2)
    old, new = encoder().eval(), encoder().eval()
    sb.replace_attention(old, *sb.presets.quadratic())
    sb.replace_attention(new)
    x = torch.randn(2, 300, 64)
    with torch.no_grad():
        with sb.calibrate(old):
            old(x)
        new.load_state_dict(old.state_dict())
        old.load_state_dict(new.state_dict())
        assert all(layer.self_attn.attention.is_calibrated for layer in new.layers)
        assert new(x).isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_pickled_module_runs_both_kinds_of_calls_as_before(is_causal: bool) -> None:
    core = module()
    with sb.calibrate(core):
        core(*qkv(), is_causal=True)
    loaded = pickle.loads(pickle.dumps(core))
    assert torch.equal(loaded(*qkv(), is_causal=is_causal), core(*qkv(), is_causal=is_causal))


# -------------------- models of torch


def decoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(64, 4, 64, 0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).eval()
    sb.replace_attention(model)
    return model


def test_the_cross_attention_of_a_decoder_runs_with_the_kernel_of_causal_calls() -> None:
    """The mean of the queries, which the centroid kernel reads, would show a token those after it."""
    cross = decoder().layers[0].multihead_attn.attention
    assert cross.low_rank == cross.causal_low_rank == sb.presets.causal()[1] and cross.support.block_q == 1


def test_an_encoder_calibrates_nothing_and_a_decoder_reads_no_later_token() -> None:
    target, memory, mask = torch.randn(2, 300, 64), torch.randn(2, 280, 64), causal_mask(300, kind=float)
    changed = torch.cat([target[:, :150], torch.randn(2, 150, 64)], 1)
    encoder, model = testkit.encoder(64, 4, 2).eval(), decoder()
    sb.replace_attention(encoder)
    call = partial(model, memory=memory, tgt_mask=mask, tgt_is_causal=True)
    with torch.no_grad():
        assert encoder(memory).isfinite().all()
        with pytest.raises(ValueError, match="not calibrated"):
            call(target)
        with sb.calibrate(model):
            call(target)
        a, b = call(target), call(changed)
    assert torch.equal(a[:, :150], b[:, :150]) and not torch.equal(a, b)


def test_what_padding_holds_changes_no_bit_of_an_encoder() -> None:
    encoder, x, mask = testkit.encoder(64, 4, 2).eval(), torch.randn(2, 300, 64), padding(300, (0, 90))
    sb.replace_attention(encoder)

    def run(value: float) -> Tensor:
        with torch.no_grad():
            return encoder(x.masked_fill(mask[..., None], value), src_key_padding_mask=mask)[~mask]

    assert torch.equal(run(0.0), run(1e4))
