"""Options of a run: precision, schedule, recomputed blocks, compiled graphs."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from scatterbrain.training.attention_timer import AttentionTimer, TimedAttention
from scatterbrain.training.config import AttentionConfig, ModelConfig, TrainConfig
from scatterbrain.training.model_options import apply_options
from scatterbrain.training.models.decoder import Decoder
from scatterbrain.training.precision import Precision
from scatterbrain.training.train_step import TrainState, scheduled_learning_rate
from scatterbrain.training.trainer import Trainer

TRAIN = AttentionConfig(preset="train", keys=32)
EMA = AttentionConfig(preset="train", keys=32, low_rank={"kind": "quadratic", "statistics": "ema"})
OPTIONS = {
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "linear": {"schedule": "linear"},
    "constant": {"schedule": "constant"},
    "recompute": {"recompute": True},
}


def losses(config) -> list[tuple[str, int, float]]:
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [(record["kind"], record["step"], record["loss"]) for record in map(json.loads, lines)]


def tensors(config) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(config.output) / "checkpoint.safetensors")


def stopped_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = TrainState.step, 0

    def counted(self, *arguments):
        nonlocal count
        count += 1
        if count == step:
            raise MemoryError
        return original(self, *arguments)

    monkeypatch.setattr(TrainState, "step", counted)


@pytest.mark.parametrize("attention", [TRAIN, EMA], ids=["learned", "ema"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_with_the_option_continues_bit_for_bit(tiny, monkeypatch, option, attention):
    whole = tiny(attention, output="whole", **OPTIONS[option])
    Trainer(whole).run()
    with monkeypatch.context() as patch:
        stopped_before(5, patch)
        with pytest.raises(MemoryError):
            Trainer(tiny(attention, output="cut", **OPTIONS[option])).run()
    cut = tiny(attention, output="cut", resume=True, **OPTIONS[option])
    Trainer(cut).run()
    assert losses(cut) == losses(whole)
    expected, got = tensors(whole), tensors(cut)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_close_to_float32(tiny, precision):
    single, half = tiny(TRAIN, output="single"), tiny(TRAIN, output="half", precision=precision)
    for config in (single, half):
        Trainer(config).run()
    own, others = losses(half), losses(single)
    assert own != others
    assert [loss for *_, loss in own] == pytest.approx([loss for *_, loss in others], rel=0.02)


def test_bf16_as_a_flag_is_the_precision(tiny):
    flag, name = tiny(TRAIN, output="flag", bf16=True), tiny(TRAIN, output="name", precision="bf16")
    for config in (flag, name):
        Trainer(config).run()
    assert losses(flag) == losses(name)


def test_bf16_and_fp16_at_once_are_refused_by_their_key():
    with pytest.raises(ValueError, match="train.precision: expected bf16 with train.bf16 true.*got 'fp16'"):
        TrainConfig(bf16=True, precision="fp16")


def test_a_gradient_that_overflows_in_float16_leaves_the_step_out_and_halves_the_scale():
    precision = Precision(TrainConfig(precision="fp16"), torch.device("cpu"))
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for gradient, expected in ((math.inf, 1.0), (2.0, -1.0)):
        optimizer.zero_grad()
        precision.scaled((weight * gradient).sum()).backward()
        precision.unscale(optimizer)
        precision.step(optimizer)
        assert weight.item() == expected
    assert precision.state()["scale"] == 32768 and precision.state()["growth_tracker"] == 1


def test_gradients_that_never_fit_in_float16_end_the_run_with_what_to_do():
    precision = Precision(TrainConfig(precision="fp16"), torch.device("cpu"))
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with pytest.raises(FloatingPointError, match="overflow without a scale.*train.precision bf16"):
        for _ in range(20):
            precision.scaled((weight * math.nan).sum()).backward()
            precision.unscale(optimizer)
            precision.step(optimizer)


def test_a_run_that_left_its_first_steps_out_continues(tiny, monkeypatch):
    """Its optimizer has no state yet."""
    unscale = Precision.unscale

    def overflowing(self, optimizer):
        for group in optimizer.param_groups:
            group["params"][0].grad.fill_(math.inf)
        unscale(self, optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(Precision, "unscale", overflowing)
        Trainer(tiny(TRAIN, precision="fp16", steps=2)).run()
    trainer = Trainer(tiny(TRAIN, precision="fp16", steps=4, resume=True))
    assert trainer.train_state.precision.state()["scale"] == 16384
    trainer.run()
    assert tensors(trainer.config)["optimizer/0/step"] == 2


@pytest.mark.parametrize("change", ["is missing", "must be positive, got -1.0", "belongs to no setting"])
def test_a_scale_that_does_not_fit_the_run_is_refused(tiny, change):
    Trainer(tiny(precision="float32" if change == "belongs to no setting" else "fp16", steps=1)).run()
    path = Path(tiny().output) / "checkpoint.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, stored = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    stored.pop("scaler/scale", None)
    if change != "is missing":
        stored["scaler/scale"] = torch.tensor(-1.0, dtype=torch.float64)
    safetensors.torch.save_file(stored, path, metadata)
    precision = json.loads(metadata["progress"])["config"]["train"]["precision"]
    with pytest.raises(ValueError, match=f"scaler/scale {change}"):
        Trainer(tiny(precision=precision, resume=True))


def test_schedules_end_where_they_should():
    train = TrainConfig(learning_rate=2.0, final_learning_rate=0.1, warmup=4)
    rates = {
        name: [
            scheduled_learning_rate(dataclasses.replace(train, schedule=name), 100, at) for at in (0.0, 0.25, 0.5, 1.0)
        ]
        for name in ("cosine", "linear", "constant")
    }
    assert rates["linear"] == pytest.approx([2.0, 1.55, 1.1, 0.2])
    assert rates["constant"] == [2.0] * 4
    assert rates["cosine"] == pytest.approx([2.0, 2 * (0.1 + 0.9 * (1 + 0.5**0.5) / 2), 1.1, 0.2])
    for name in rates:
        warm = dataclasses.replace(train, schedule=name)
        assert [scheduled_learning_rate(warm, step, 0.0) for step in (0, 1, 3, 4)] == [0.5, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("attention", [AttentionConfig(support="full"), TRAIN], ids=["full", "learned"])
def test_recomputed_blocks_train_the_same_bits_and_keep_less(tiny, attention):
    kept, again = tiny(attention, output="kept"), tiny(attention, output="again", recompute=True)
    for config in (kept, again):
        Trainer(config).run()
    assert losses(kept) == losses(again)
    assert saved_bytes(kept, again) < 0.5


def saved_bytes(kept, again) -> float:
    """Of what autograd keeps for the backward pass, the share that is left with recomputed blocks."""
    totals = []
    for config in (again, kept):
        trainer = Trainer(dataclasses.replace(config, resume=True))
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model, (batch,) = trainer.train_state.model.train(), trainer.training_batches(0)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(batch.inputs, batch.mask)
        totals.append(sum(size for pointer, size in storages.items() if pointer not in weights))
        del output
        trainer._lock.release()
    return totals[0] / totals[1]


def test_a_model_without_blocks_cannot_recompute_them():
    with pytest.raises(ValueError, match="train.recompute: expected a model whose blocks.*got Linear"):
        apply_options(nn.Linear(1, 1), TrainConfig(recompute=True), torch.device("cpu"))


PAUSE = 0.03


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(PAUSE)
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.saved_tensors
        time.sleep(2 * PAUSE)
        return gradient


class _SlowAttention(nn.Module):
    def forward(self, query, key, value, key_padding_mask=None, is_causal=False):
        return _Sleep.apply(query + key + value)


def test_the_time_of_attention_counts_what_is_computed_again_once():
    """Per layer the forward pass twice and the backward pass, of one and two pauses."""
    timer, layers = AttentionTimer(), 2
    config = ModelConfig(layers=layers, width=8, heads=1)
    model = Decoder(config, 8, lambda *sizes: TimedAttention(_SlowAttention(), timer))
    apply_options(model, TrainConfig(recompute=True), torch.device("cpu"))
    model.train()(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    assert 4 * layers * PAUSE <= timer.seconds < 5 * layers * PAUSE


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
def test_a_compiled_model_trains_as_the_model_does(tiny, options):
    plain, compiled = tiny(TRAIN, output="plain", **options), tiny(TRAIN, output="compiled", compile=True, **options)
    for config in (plain, compiled):
        Trainer(config).run()
    assert [loss for *_, loss in losses(compiled)] == pytest.approx([loss for *_, loss in losses(plain)], rel=1e-2)
    assert tensors(compiled).keys() == tensors(plain).keys()
    records = [json.loads(line) for line in (Path(compiled.output) / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["attention_seconds"] < record["seconds"] for record in records if record["kind"] == "train")
    assert all(len(record["low_rank_shares"]) == 2 for record in records if record["kind"] == "validation")


def test_a_machine_without_a_compiler_is_told_what_it_lacks(tiny, monkeypatch):
    def missing(*arguments, **options):
        def call(x):
            raise RuntimeError("No working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.raises(
        ValueError, match="train.compile: expected.*a C.. compiler, got: No working.*leave train.compile"
    ):
        Trainer(tiny(compile=True))
