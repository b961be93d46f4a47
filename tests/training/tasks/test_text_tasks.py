"""Tasks of texts from their configuration: data from the repository alone, a model that reads them, errors by key."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.training.attention import build_attention
from scatterbrain.training.config import AttentionConfig, DataConfig, ModelConfig, TrainConfig
from scatterbrain.training.tasks import build_task
from scatterbrain.training.tasks.renamed_source import FIRST_NAME

TASKS = {
    "text_classification": ({"tokens": 64, "classes": 3, "passages": "any"}, (2, 64), (2, 3)),
    "retrieval": ({"tokens": 64}, (2, 2, 64), (2, 2)),
    "names": ({"tokens": 96, "names": 20, "distance": 16}, (2, 96), (2, 96, FIRST_NAME + 20)),
}


@pytest.mark.parametrize("kind", TASKS)
def test_the_standard_library_is_data_for_the_task_and_its_model(kind):
    fields, inputs, logits = TASKS[kind]
    task = build_task({"kind": kind} | fields)
    data = task.open(DataConfig(validation_fraction=0.1), TrainConfig(batch=2))
    model = task.build_model(
        data,
        ModelConfig(layers=1, width=32, heads=2),
        lambda *sizes: build_attention(AttentionConfig(keys=32), *sizes, is_causal=task.is_causal),
        torch.Generator().manual_seed(0),
    )
    for batch in (data.training_batch(0, 0.0), data.validation_batch(0)):
        assert batch.inputs.shape == inputs and model(batch.inputs, batch.mask).shape == logits
        assert batch.targets.shape == logits[:-1] and batch.targets.max() < data.classes == logits[-1]
        assert batch.inputs.max() < data.input_size
    assert data.tokens == inputs[-1] and "to train on" in data.description


@pytest.mark.parametrize("kind", TASKS)
def test_a_missing_path_says_what_is_expected(kind):
    with pytest.raises(ValueError, match="data.path: expected .*'nowhere', which does not exist"):
        build_task(kind).open(DataConfig(path="nowhere"), TrainConfig())


@pytest.mark.parametrize(
    "task, message",
    [
        ({"kind": "text_classification", "tokens": 0}, "task.tokens: expected positive, got 0"),
        ({"kind": "text_classification", "classes": 1}, "task.classes: expected 2 or more, or null, got 1"),
        ({"kind": "text_classification", "passages": "all"}, "task.passages: expected 'first' or 'any', got 'all'"),
        ({"kind": "retrieval", "tokens": -1}, "task.tokens: expected positive, got -1"),
        ({"kind": "names", "tokens": 1.5}, "task.tokens: expected an int, got 1.5"),
        ({"kind": "names", "distance": 4096}, "task.distance: expected 0 to below task.tokens 4096, got 4096"),
        ({"kind": "names", "repeats": 1.0}, "task.repeats: expected 0 to below 1, got 1.0"),
        ({"kind": "names", "first_tokens": 5000}, "task.first_tokens: expected 1 to task.tokens 4096, got 5000"),
        ({"kind": "names", "first_share": 0.9}, "task.full_share: expected first_share = 0.9 to 1, got 0.8"),
        ({"first_tokens": 16}, r"^task: expected one of language, .*got \{'first_tokens': 16\}; give the kind too"),
        ({"kind": "language", "first_share": 0.9}, "task.full_share: expected first_share = 0.9 to 1, got 0.8"),
        ({"kind": "words", "full_share": 1.1}, "task.full_share: expected first_share = 0.4 to 1, got 1.1"),
    ],
)
def test_a_field_out_of_range_is_refused_by_its_key(task, message):
    with pytest.raises(ValueError, match=message):
        build_task(task)


@pytest.mark.parametrize("kind", ["language", "words"])
def test_sequences_of_text_grow_with_the_run_up_to_its_context(kind):
    task = build_task({"kind": kind, "first_tokens": 16, "first_share": 0.25, "full_share": 0.75})
    with pytest.raises(ValueError, match="task.first_tokens: expected 1 to train.context 8, got 16"):
        task.open(DataConfig(), TrainConfig(context=8))
    data = task.open(DataConfig(glob="a*.py"), TrainConfig(context=64, batch=2))
    shapes = [tuple(data.training_batch(0, fraction).inputs.shape) for fraction in (0.0, 0.5, 0.8)]
    assert shapes == [(8, 16), (4, 32), (2, 64)] and data.validation_batch(0).inputs.shape == (2, 64)


def test_a_task_that_pools_nothing_has_no_pooling():
    task = build_task("language")
    data = task.open(DataConfig(glob="a*.py"), TrainConfig(context=64))
    config = ModelConfig(layers=1, width=32, heads=2, pooling="first")
    with pytest.raises(ValueError, match="model.pooling: expected mean, as language pools nothing, got 'first'"):
        task.build_model(data, config, lambda *sizes: None, torch.Generator())


def test_text_classification_says_where_labelled_texts_come_from(tmp_path):
    (tmp_path / "one").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "one" / name).write_text(name)
    data = DataConfig(path=str(tmp_path), glob="*.txt")
    with pytest.raises(ValueError, match="data.path: expected at least 2 folders, one per class.*train and test"):
        build_task("text_classification").open(data, TrainConfig())
