"""Calibration says when it saw too little, and why when it saw nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from testkit import qkv, rand
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.nn.observed import FEWEST_TOKENS

pytestmark = pytest.mark.counts_tokens
Batch = tuple[Tensor, Tensor, Tensor]


def core(**arguments: Any) -> sb.ScatterbrainAttention:
    return sb.ScatterbrainAttention(4, 16, 2, sb.Window(16), sb.Quadratic(4), **arguments)


def batch(rows: int, tokens: int, seed: int = 0) -> Batch:
    return rand(rows, 4, tokens, 16, seed=seed), rand(rows, 2, tokens, 16, seed=seed + 1), rand(rows, 2, tokens, 16)


def calibrate(*batches: Batch, **arguments: Any) -> list[str]:
    """What calibration on the batches warns of."""
    module = core()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sb.calibrate(module), torch.no_grad():
            for each in batches:
                module(*each, **arguments)
    return [str(warning.message) for warning in caught]


def of_first(each: Batch, tokens: int) -> Batch:
    """The first token as many times."""
    return tuple(t[:, :, :1].expand(-1, -1, tokens, -1) for t in each)


@pytest.mark.parametrize(
    ("batches", "arguments", "saw"),
    [
        ([batch(2, 50)], {}, "100 valid tokens"),
        ([batch(1, 100), batch(1, 100, seed=7)], {}, "200 valid tokens"),
        ([batch(2, 500)], {"key_padding_mask": torch.arange(500).ge(40).expand(2, -1)}, "80 valid tokens"),
        (
            [batch(2, 500)] * 5,
            {"key_padding_mask": torch.arange(500).ge(40).expand(2, -1)},
            "400 valid tokens, of which 80 differ",
        ),
        ([batch(1, 50)] * 10, {}, "500 valid tokens, of which 50 differ"),
        ([of_first(batch(1, 1), 400)], {}, "400 valid tokens, of which 1 differ"),
        ([batch(1, 60)] * 2, {}, "120 valid tokens, of which 60 differ"),
    ],
)
def test_calibration_on_few_tokens_warns_with_their_number(batches: list[Batch], arguments: dict[str, Any], saw: str):
    (message,) = calibrate(*batches, **arguments)
    assert message.startswith(f"calibrate: statistics were fitted on {saw}, expected at least {FEWEST_TOKENS}; ")
    assert "run more, longer or other sequences" in message


def test_calibration_on_enough_tokens_is_silent():
    assert calibrate(batch(2, 200)) == []
    assert calibrate(*(batch(1, 64, seed=10 * i) for i in range(4))) == []
    # Learned queries are the same in every batch; the keys differ.
    queries = batch(1, 64)[0]
    assert calibrate(*((queries, *batch(1, 64, seed=10 * i)[1:]) for i in range(8))) == []


def test_a_module_that_was_not_run_keeps_what_it_gathered_in_training():
    model = nn.ModuleList(sb.ScatterbrainAttention(4, 16, 2, sb.Window(16), sb.Quadratic(4, "ema")) for _ in range(2))
    for module in model:
        module(*batch(2, 200))
    with sb.calibrate(model), torch.no_grad():
        model[0](*batch(2, 200, seed=5))
    assert model[1].gathered is not None and not model[1].is_collecting
    sb.update_statistics(model)
    assert model[1].is_calibrated and model[1].calibrated_scale == 0.25


@pytest.mark.parametrize("low_rank", [sb.Centroid(4), sb.Quadratic(3, "input")], ids=str)
def test_a_kernel_that_reads_each_call_has_nothing_to_calibrate(low_rank: object):
    model, tokens = sb.ScatterbrainAttention(2, 8, support=sb.Window(8), low_rank=low_rank), qkv(40, kv_heads=2)
    want = model(*tokens)
    with pytest.warns(
        UserWarning, match="nothing to calibrate, since .* takes what it needs from the tokens"
    ) as caught:
        with sb.calibrate(model) as same:
            assert same is model and torch.equal(model(*tokens), want)
    assert caught[0].filename == __file__ and torch.equal(model(*tokens), want)


def test_of_several_modules_the_one_with_the_fewest_tokens_is_named():
    model = nn.ModuleDict({"long": core(), "short": core(), "shorter": core()})

    def run() -> None:
        with sb.calibrate(model), torch.no_grad():
            for name, tokens in (("long", 300), ("short", 80), ("shorter", 50)):
                model[name](*batch(1, tokens))

    with pytest.warns(UserWarning, match=r"on 50 valid tokens \(shorter, the fewest of 2 modules\)"):
        run()


# -------------------- nothing was seen


def encoder(**arguments: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 32, batch_first=True, **arguments), 2)


BYPASSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "dropout": (lambda model: model(rand(1, 300, 32)), r"dropout=0.1 acts .*sb.set_attention_dropout\(model, 0.0\)"),
    "mask": (
        lambda model: model.eval()(rand(1, 300, 32), mask=torch.rand(300, 300) > 0.5),
        "attn_mask",
    ),
    "weights": (
        lambda model: model.layers[0].self_attn(*[rand(1, 300, 32)] * 3),
        r"need_weights=True \(the default\) asks for the attention weights; pass need_weights=False",
    ),
    "nothing": (lambda model: None, "call the model on at least one batch there"),
}


@pytest.mark.filterwarnings("ignore:.*runs exact attention")
@pytest.mark.parametrize("name", BYPASSED)
def test_calibration_that_saw_nothing_says_why(name: str):
    call, reason = BYPASSED[name]
    model = encoder(dropout=0.1)
    sb.replace_attention(model, sb.Window(8), sb.Quadratic(4))
    for _ in range(2):  # the warning of the layer is given once, the reason every time
        expected = pytest.raises(ValueError, match=f"no ScatterbrainAttention was run inside the block.*{reason}")
        with expected, sb.calibrate(model):
            call(model)


@pytest.mark.filterwarnings("ignore:.*runs exact attention")
def test_a_layer_that_calibration_went_past_says_why_it_is_not_calibrated():
    model = encoder(dropout=0.1)
    sb.replace_attention(model, sb.Window(8), sb.Quadratic(4))
    model.layers[1].self_attn.dropout = 0.0
    with sb.calibrate(model):
        model(rand(1, 300, 32))
    sb.set_attention_dropout(model)
    with pytest.raises(
        ValueError, match=r"not calibrated: .*sb.calibrate.*ran exact attention without it: dropout=0.1"
    ):
        model(rand(1, 300, 32))
    with sb.calibrate(model):
        model(rand(1, 300, 32))
    assert torch.isfinite(model(rand(1, 300, 32))).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_an_uncalibrated_module_names_the_preset_for_training(is_causal: bool):
    for call in (core(), lambda *each, **arguments: sb.attention(*each, sb.Window(16), sb.Quadratic(4), **arguments)):
        with pytest.raises(ValueError, match=r"not calibrated.*sb.presets.train\(\)") as caught:
            call(*batch(1, 50), is_causal=is_causal)
        assert ("statistics='input'" in str(caught.value)) != is_causal


def replica(module: nn.Module) -> nn.Module:
    """A copy as those that nn.DataParallel runs on several devices."""
    return module._replicate_for_data_parallel()


def test_the_copies_of_data_parallel_refuse_to_gather_what_would_be_lost():
    message = "run model.module itself, or DistributedDataParallel"
    module, tokens = core(), batch(2, 200)
    with pytest.raises(RuntimeError, match=message), sb.calibrate(module):
        replica(module)(*tokens)
    average = sb.ScatterbrainAttention(4, 16, 2, sb.Window(16), sb.Quadratic(4, "ema"))
    with pytest.raises(RuntimeError, match=message):
        replica(average)(*tokens)
    with sb.calibrate(module), torch.no_grad():
        module(*tokens)
    assert torch.equal(replica(module)(*tokens), module(*tokens))


def test_a_calibration_inside_another_is_refused_and_the_outer_one_goes_on():
    model, tokens = encoder(dropout=0.0), rand(2, 200, 32)
    sb.replace_attention(model, *sb.presets.quadratic())
    other = copy.deepcopy(model)
    with sb.calibrate(model), torch.no_grad():
        with pytest.raises(ValueError, match="calibrate: self_attn.attention is .*calibrated already.*leave"):
            with sb.calibrate(model.layers[1]):
                raise AssertionError("the block was entered")
        model(tokens)
    with sb.calibrate(other), torch.no_grad():
        other(tokens)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_a_calibration_that_cannot_be_finished_leaves_no_module_collecting(monkeypatch: pytest.MonkeyPatch):
    model, tokens = encoder(dropout=0.0), rand(2, 200, 32)
    sb.replace_attention(model, *sb.presets.quadratic())
    store = sb.Quadratic.store

    def fail(self: sb.Quadratic, owner: nn.Module, moments: object, is_average: bool = False) -> None:
        if owner is model.layers[1].self_attn.attention:
            raise torch.linalg.LinAlgError("no convergence")
        store(self, owner, moments, is_average)

    monkeypatch.setattr(sb.Quadratic, "store", fail)
    with pytest.raises(torch.linalg.LinAlgError), sb.calibrate(model), torch.no_grad():
        model(tokens)
    cores = [layer.self_attn.attention for layer in model.layers]
    assert not any(core.is_collecting or core.observed for core in cores)
    assert [(core.is_calibrated, core.scale) for core in cores] == [(True, 0.25), (False, None)]


@pytest.mark.parametrize("is_causal", [True, False])
def test_calibrating_a_module_that_is_compiled_whole_says_what_to_do(is_causal: bool):
    module, tokens = sb.ScatterbrainAttention(2, 16), qkv(300, heads=2, kv_heads=2, head_dim=16)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    cure = r"calibrat\w+ reads what passes through.*run the module that was compiled.*inside sb.calibrate"
    with pytest.raises(Exception, match=f"(?s){cure}"), sb.calibrate(compiled):
        compiled(*tokens, is_causal=is_causal)
    with sb.calibrate(compiled):
        module(*tokens, is_causal=True)
    assert module.is_calibrated and compiled(*tokens, is_causal=True).isfinite().all()
