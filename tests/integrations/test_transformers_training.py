"""Replacing layers of transformers' models, and training them."""

from __future__ import annotations

import copy
import threading
from threading import Event

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import hf_models as hf
import transformers

import scatterbrain as sb
from scatterbrain.integrations.transformers import UpdateStatistics, register, set_attention_dropout
from scatterbrain.integrations.transformers.registry import PER_LAYER

SETTINGS = (sb.Routed(32, block_q=8), sb.Quadratic(5))
LEARNED = register("scatterbrain:trained", sb.Window(16, block_q=8), sb.Quadratic(5, "learned"))
EMA = register("scatterbrain:ema", sb.Window(16, block_q=8), sb.Quadratic(5, "ema"))

# -------------------- replace_attention


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "whisper", "gpt2"])
def test_replaced_layers_are_those_of_the_implementation(name: str):
    arguments, counts = hf.inputs(name, "right")
    chosen = hf.FAMILIES[name].build(register("scatterbrain:as-replaced", *SETTINGS))
    replaced = hf.FAMILIES[name].build()
    report = sb.replace_attention(replaced, *SETTINGS)
    assert not report.skipped and all("scatterbrain inside" in entry.now for entry in report.entries)
    for model in (chosen, replaced):
        with sb.calibrate(model):
            hf.run(model, **arguments)
    assert torch.equal(hf.run(chosen, **arguments)[counts], hf.run(replaced, **arguments)[counts])


def test_replaced_layers_start_as_those_of_the_implementation():
    chosen = hf.FAMILIES["bert"].build(LEARNED)
    for _ in range(2):  # whatever was replaced before
        torch.manual_seed(0)
        replaced = hf.FAMILIES["bert"].build()
        sb.replace_attention(replaced, sb.Window(16, block_q=8), sb.Quadratic(5, "learned"))
        for name, parameter in chosen.named_parameters():
            assert torch.equal(parameter, replaced.get_parameter(name)), name


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["bert", "llama", "whisper"])
def test_layers_that_are_left_out_stay_exact(name: str, side: str):
    arguments, counts = hf.inputs(name, side)
    model = hf.FAMILIES[name].build()
    exact = hf.run(model, **arguments)
    report = sb.replace_attention(model, sb.Full(), None, where=lambda path: ".0." in path)
    assert report.replaced and report.skipped
    torch.testing.assert_close(hf.run(model, **arguments)[counts], exact[counts], rtol=1e-5, atol=1e-5)


def test_restore_gives_the_model_back():
    model = hf.FAMILIES["llama"].build()
    arguments, _ = hf.inputs("llama", "left")
    before, keys = hf.run(model, **arguments), model.state_dict().keys()
    report = sb.replace_attention(model, *SETTINGS)
    with sb.calibrate(model):
        hf.run(model, **arguments)
    hf.run(model, **arguments)
    report.restore()
    assert torch.equal(hf.run(model, **arguments), before)
    assert model.state_dict().keys() == keys and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_restoring_some_layers_leaves_the_others_replaced(order: tuple[int, int]):
    model = hf.FAMILIES["bert"].build()
    arguments, _ = hf.inputs("bert")
    reports = [sb.replace_attention(model, *SETTINGS, where=lambda path, i=i: f".{i}." in path) for i in (0, 1)]
    first, second = (reports[i] for i in order)
    first.restore()
    alone = hf.FAMILIES["bert"].build()
    sb.replace_attention(alone, *SETTINGS, where=lambda path: f".{order[1]}." in path)
    for each in (model, alone):
        with sb.calibrate(each):
            hf.run(each, **arguments)
    assert torch.equal(hf.run(model, **arguments), hf.run(alone, **arguments))
    second.restore()
    exact = hf.FAMILIES["bert"].build()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(hf.run(model, **arguments), hf.run(exact, **arguments))


def test_models_of_one_configuration_are_restored_one_by_one():
    one = hf.FAMILIES["bert"].build()
    other = type(one)(one.config).eval()
    arguments, _ = hf.inputs("bert")
    exact = hf.run(other, **arguments)
    reports = [sb.replace_attention(model, sb.Window(16, block_q=8), None) for model in (one, other)]
    replaced = hf.run(other, **arguments)
    assert not torch.allclose(replaced, exact, atol=1e-3)
    reports[0].restore()
    assert torch.equal(hf.run(other, **arguments), replaced)
    reports[1].restore()
    assert torch.equal(hf.run(other, **arguments), exact) and one.config._attn_implementation == "sdpa"


def test_restore_keeps_an_implementation_that_was_chosen_since():
    model = hf.FAMILIES["bert"].build()
    arguments, _ = hf.inputs("bert")
    early = sb.replace_attention(model, sb.Window(16, block_q=8), None, where=lambda path: ".0." in path)
    model.set_attn_implementation("eager")
    late = sb.replace_attention(model, sb.Window(16, block_q=8), None, where=lambda path: ".1." in path)
    replaced = hf.run(model, **arguments)
    early.restore()
    assert torch.equal(hf.run(model, **arguments), replaced)
    late.restore()
    assert model.config._attn_implementation == "eager"


def test_restoring_an_older_report_leaves_what_a_later_one_attached():
    model = hf.FAMILIES["bert"].build()
    arguments, _ = hf.inputs("bert")
    exact = hf.run(model, **arguments)
    older = sb.replace_attention(model, sb.Window(8, block_q=8), None)
    model.set_attn_implementation("sdpa")
    later = sb.replace_attention(model, sb.Window(16, block_q=8), None)
    replaced = hf.run(model, **arguments)
    older.restore()
    assert torch.equal(hf.run(model, **arguments), replaced) and not torch.allclose(replaced, exact, atol=1e-3)
    later.restore()
    assert torch.equal(hf.run(model, **arguments), exact) and model.config._attn_implementation == "sdpa"


def test_a_replaced_layer_without_a_configuration_stops_no_other():
    broken, model = hf.FAMILIES["bert"].build(), hf.FAMILIES["bert"].build()
    sb.replace_attention(broken, *SETTINGS)
    del broken.encoder.layer[0].attention.self.config
    report = sb.replace_attention(model, *SETTINGS)
    assert len(report.replaced) == 2
    report.restore()
    assert model.config._attn_implementation == "sdpa"


def test_threads_replace_layers_of_several_models_at_once():
    held, mine, other = (hf.FAMILIES["bert"].build() for _ in range(3))
    sb.replace_attention(held, *SETTINGS)
    layer, config, looks, changed, errors = held.encoder.layer[0].attention.self, held.config, Event(), Event(), []

    def waits(self: torch.nn.Module) -> transformers.PreTrainedConfig:
        if threading.current_thread() is thread:  # it goes through the replaced layers, which the other one adds to
            looks.set()
            changed.wait(0.5)
        return config

    def work() -> None:
        try:
            sb.replace_attention(mine, *SETTINGS)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    layer.__class__ = type("Waiting", (type(layer),), {"config": property(waits)})
    thread.start()
    assert looks.wait(10)
    sb.replace_attention(other, *SETTINGS)
    changed.set()
    thread.join()
    assert not errors and {model.config._attn_implementation for model in (mine, other)} == {PER_LAYER}


def test_a_layer_is_not_replaced_twice():
    model = hf.FAMILIES["bert"].build()
    sb.replace_attention(model, *SETTINGS)
    with pytest.warns(UserWarning, match="changed nothing"):
        report = sb.replace_attention(model, *SETTINGS)
    assert all("runs Scatterbrain already" in entry.note for entry in report.entries)


def test_a_model_inside_another_module_is_replaced():
    outer = torch.nn.Sequential(hf.FAMILIES["bert"].build())
    assert [entry.path for entry in sb.replace_attention(outer, *SETTINGS).replaced] == [
        f"0.encoder.layer.{i}.attention.self" for i in (0, 1)
    ]


def test_what_replaced_layers_learned_is_loaded_by_name(tmp_path):
    model = hf.FAMILIES["bert"].build()
    sb.replace_attention(model, *SETTINGS)
    arguments, counts = hf.inputs("bert", "right")
    with sb.calibrate(model):
        hf.run(model, **arguments)
    model.save_pretrained(tmp_path)
    name = register("scatterbrain:as-saved", *SETTINGS)
    loaded = transformers.BertModel.from_pretrained(tmp_path, attn_implementation=name)
    assert torch.equal(hf.run(loaded, **arguments)[counts], hf.run(model, **arguments)[counts])


# -------------------- training


class Repeats(torch.utils.data.Dataset):
    """Rows of 32 tokens whose second half repeats the first."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        half = hf.tokens(16, seed=index, batch=1)[0]
        ids = torch.cat([half, half])
        return {"input_ids": ids, "labels": ids}


def trained(implementation: str, folder, **arguments) -> tuple[transformers.PreTrainedModel, transformers.Trainer]:
    model = hf.FAMILIES["llama"].build(implementation)
    options = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **{"max_steps": 12, "save_strategy": "no"} | arguments,
    )
    trainer = transformers.Trainer(model, options, train_dataset=Repeats(), callbacks=[UpdateStatistics()])
    return model, trainer


def losses(trainer: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("implementation", [LEARNED, EMA])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_trains(implementation: str, checkpointing: bool, tmp_path):
    model, trainer = trained(implementation, tmp_path, activation_checkpointing=checkpointing)
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    history = losses(trainer)
    assert sum(history[-3:]) < sum(history[:3])
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert any("scatterbrain.key_projection" in key for key in moved)


def test_training_resumes_with_what_was_learned(tmp_path):
    model, trainer = trained(LEARNED, tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    again, second = trained(LEARNED, tmp_path, save_strategy="steps", save_steps=6)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_training_in_half_precision_autocast(tmp_path):
    _, trainer = trained(LEARNED, tmp_path, bf16=True, max_steps=4)
    trainer.train()
    assert torch.tensor(losses(trainer)).isfinite().all()


def test_a_classifier_is_fine_tuned_after_the_swap(tmp_path):
    config = transformers.BertConfig(**hf.TEXT | hf.LONG, attention_probs_dropout_prob=0.1)
    model = transformers.BertForSequenceClassification(config)
    sb.replace_attention(model, *SETTINGS)
    set_attention_dropout(model, 0.0)
    with sb.calibrate(model.eval()):
        hf.run(model, input_ids=hf.tokens())
    model.train()
    result = model(input_ids=hf.tokens(), labels=torch.tensor([0, 1]))
    result.loss.backward()
    assert all(p.grad is not None for p in model.bert.encoder.layer[0].attention.self.query.parameters())
