"""What compare and tune measure in cross-attention is what replace_attention runs there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from testkit import randomized
from torch import nn

import scatterbrain as sb
from scatterbrain.analysis import calls_of, configured, tuning

WIDTH, HEADS = 64, 4
ROUTED, CENTROID = sb.Routed(40, block_q=32), sb.Centroid(8)
BY_QUERY = sb.Routed(40, block_q=1, block_k=8)
CANDIDATES = [(ROUTED, CENTROID), (sb.Window(16, sinks=4), sb.Quadratic(4))]
Model = tuple[nn.Module, list[Any]]


class Translator(nn.Module):
    """nn.Transformer as it is trained: the target is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(WIDTH, HEADS, 1, 1, 80, 0.0, batch_first=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.inner(source, target, tgt_mask=mask, tgt_is_causal=True)


def of_torch(source: int, target: int) -> Model:
    torch.manual_seed(0)
    model = randomized(Translator()).eval()
    return model, [(torch.randn(2, source, WIDTH), torch.randn(2, target, WIDTH)) for _ in range(2)]


def bart(source: int, target: int) -> Model:
    models = pytest.importorskip("hf_models")
    model = models.FAMILIES["bart"].build(encoder_layers=1, decoder_layers=1, attention_dropout=0.0)
    words = [torch.randint(4, 60, (2, source + target)) for _ in range(2)]
    return model, [{"input_ids": w[:, :source], "decoder_input_ids": w[:, source:]} for w in words]


MODELS = pytest.mark.parametrize("build", [of_torch, bart])


def error(model: nn.Module, batch: Any, exact: torch.Tensor) -> float:
    with torch.no_grad():
        out = tuning.output_of(model(**batch) if isinstance(batch, dict) else model(*batch))
    return float(((out - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).mean())


@MODELS
def test_what_is_tuned_is_saved_and_is_what_runs(
    build: Callable[[int, int], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = lambda timed, repeats: {name: 1.0 if name == str(tuning.EXACT) else 0.5 for name in timed}
    monkeypatch.setattr(tuning, "medians", fast)
    model, batches = build(150, 60)
    call = lambda batch: model(**batch) if isinstance(batch, dict) else model(*batch)
    with torch.no_grad():
        exact = [tuning.output_of(call(batch)) for batch in batches]
    found = sb.tune(model, batches, budget=0.5, candidates=CANDIDATES, times=tmp_path / "times.json")
    found.save(tmp_path / "tuned.yaml")
    report = sb.replace_attention(model, layers=tmp_path / "tuned.yaml")
    assert {entry.path for entry in report.replaced} == set(found.chosen.pairs)
    ran = {}
    for entry in report.replaced:
        (core,) = (m for m in model.get_submodule(entry.path).modules() if isinstance(m, sb.ScatterbrainAttention))
        ran[entry.path] = core.support, core.low_rank
    assert ran == found.chosen.pairs
    crossing = [pair for path, pair in ran.items() if "multihead_attn" in path or "encoder_attn" in path]
    assert crossing and all(support.block_q == 1 and support.window == 0 for support, _ in crossing)
    with sb.calibrate(model), torch.no_grad():
        call(batches[0])
    # Statistics were fitted on exact attention; calibration sees what approximated layers before make of the tokens.
    assert error(model, batches[1], exact[1]) == pytest.approx(found.chosen.held_out, rel=0.03)


@MODELS
def test_as_many_queries_as_keys_are_cross_attention_all_the_same(build: Callable[[int, int], Model]) -> None:
    model, batches = build(70, 70)
    calls = calls_of(model, batches[0])
    assert [call.is_query_by_query for call in calls] == [False, False, True]
    ran = [configured.pair_that_runs(call, (ROUTED, CENTROID)) for call in calls]
    assert ran == [(ROUTED, CENTROID)] * 2 + [(BY_QUERY, sb.Quadratic(9))]
    sb.replace_attention(model, ROUTED, CENTROID, causal_support=sb.Window(8), causal_low_rank=sb.Quadratic(9))
    again = calls_of(model, batches[0])
    assert [call.is_query_by_query for call in again] == [False, False, True]
    cores = [m for m in model.modules() if isinstance(m, sb.ScatterbrainAttention) and m.is_query_by_query]
    assert [(core.support, core.low_rank) for core in cores] == [ran[2]]


@MODELS
def test_cross_attention_is_not_captured_and_what_ran_is_told(
    build: Callable[[int, int], Model], tmp_path: Path
) -> None:
    model, batches = build(70, 70)
    entries = sb.capture(model, batches[0], tmp_path / "qkv.safetensors")
    assert entries == [
        f"{name}{row}.N70.layer{i}" for i, name in enumerate(("model", "lm_model")) for row in ("", "_1")
    ]
    found = sb.compare(model, batches[0], {"routed": (ROUTED, CENTROID)}, repeats=1)
    told = [layer.figures["routed"].ran for layer in found.layers]
    assert told == ["", "", f"{BY_QUERY}, {sb.Quadratic(9)}"]
    assert f"routed in cross-attention: {told[2]}" in str(found)


class Latents(nn.Module):
    """Learned queries read the tokens, as in a Perceiver: no target tokens, nothing to hide."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 40, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.attention(self.latents.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)[0]


def test_other_queries_than_keys_run_with_the_pair_as_it_is() -> None:
    torch.manual_seed(0)
    model, tokens = randomized(Latents()).eval(), torch.randn(1, 150, WIDTH)
    found = sb.compare(model, tokens, {"routed": (ROUTED, CENTROID)}, repeats=1).layers[0].figures["routed"]
    exact = model(tokens)
    (call,) = calls_of(model, tokens)
    sb.replace_attention(model, ROUTED, CENTROID)
    assert model.attention.attention.support == ROUTED and found.ran == ""
    with torch.no_grad():
        out = model.attention.attention(call.query, call.key, call.value)
    target = nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)
    want = ((out - target).flatten(2).norm(dim=2) / target.flatten(2).norm(dim=2)).mean(0)
    assert found.error == pytest.approx(want.tolist(), rel=1e-4)
    assert not torch.equal(exact, model(tokens))
