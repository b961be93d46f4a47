from __future__ import annotations

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer

from scatterbrain.training.config import AttentionConfig, DataConfig, TrainConfig
from scatterbrain.training.tasks import build_task
from scatterbrain.training.trainer import Trainer

LINES = [f"the cat number {number} sat on the mat\n" for number in range(300)]


@pytest.fixture
def data(tmp_path) -> DataConfig:
    for part, lines in (("train", LINES[:240]), ("valid", LINES[240:])):
        (tmp_path / f"wiki.{part}.tokens").write_text("".join(lines), encoding="utf-8")
    return DataConfig(path=str(tmp_path))


@pytest.mark.parametrize("tokenizer", ["words", "bpe"])
def test_targets_are_the_next_tokens_of_the_text(data, tokenizer):
    opened = build_task({"kind": "words", "tokenizer": tokenizer, "vocabulary": 300}).open(
        data, TrainConfig(batch=3, context=20)
    )
    made = Tokenizer.from_str(opened.files["tokenizer.json"].decode())
    for batch, lines in ((opened.training_batch(0, 0.0), LINES[:240]), (opened.validation_batch(0), LINES[240:])):
        assert batch.inputs.shape == batch.targets.shape == (3, 20)
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        assert batch.targets.max() < opened.classes == opened.input_size
        if tokenizer == "bpe":
            assert all(made.decode(row) in "".join(lines) for row in batch.inputs.tolist())
    assert not torch.equal(opened.training_batch(0, 0.0).inputs, opened.training_batch(1, 0.0).inputs)


def test_the_validation_part_has_no_say_in_the_tokenizer(data, tmp_path):
    task, train = build_task({"kind": "words", "vocabulary": 400}), TrainConfig(context=20)
    before = task.open(data, train)
    (tmp_path / "wiki.valid.tokens").write_text("unseen words\n" * 200)
    after = task.open(data, train)
    assert before.files == after.files
    assert "66.7% unknown" in after.description and "4.333 bytes and 1.000 words a token" in after.description


def test_the_tokenizer_is_stored_with_the_run_which_goes_on_with_no_other(tiny, data, tmp_path):
    config = dataclasses.replace(
        tiny(AttentionConfig(support="full"), context=20), task={"kind": "words", "vocabulary": 50}, data=data
    )
    Trainer(config).run()
    stored = tmp_path / "run" / "tokenizer.json"
    assert Tokenizer.from_file(str(stored)).get_vocab_size() == 50
    again = dataclasses.replace(config, resume=True)
    Trainer(again)._lock.release()  # the same data
    (tmp_path / "wiki.train.tokens").write_text("".join(reversed(LINES[120:] + ["other cats\n"] * 200)))
    with pytest.raises(ValueError, match="tokenizer.json: expected what the data of this run are read with now"):
        Trainer(again)


def test_a_tokenizer_that_differs_in_unused_padding_alone_is_the_same(tiny, data, tmp_path):
    config = dataclasses.replace(
        tiny(AttentionConfig(support="full"), context=20), task={"kind": "words", "vocabulary": 50}, data=data
    )
    Trainer(config).run()
    stored, again = tmp_path / "run" / "tokenizer.json", dataclasses.replace(config, resume=True)
    tokenizer = Tokenizer.from_file(str(stored))
    tokenizer.enable_padding(length=16)
    stored.write_text(tokenizer.to_str(pretty=True))
    Trainer(again)._lock.release()
    assert Tokenizer.from_file(str(stored)).padding is None
    tokenizer.enable_truncation(16)
    stored.write_text(tokenizer.to_str(pretty=True))
    with pytest.raises(ValueError, match="tokenizer.json: .* restore what makes it, the training text or the file"):
        Trainer(again)


def test_a_stored_tokenizer_is_used_again(data, tmp_path):
    train = TrainConfig(batch=2, context=20)
    first = build_task({"kind": "words", "tokenizer": "bpe", "vocabulary": 300}).open(data, train)
    (tmp_path / "kept.json").write_bytes(first.files["tokenizer.json"])
    second = build_task({"kind": "words", "tokenizer": str(tmp_path / "kept.json")}).open(data, train)
    assert torch.equal(first.training_batch(3, 0.0).inputs, second.training_batch(3, 0.0).inputs)
    assert second.classes == first.classes


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vocabulary": 0}, "task.vocabulary: expected positive, got 0"),
        ({"tokenizer": ""}, "task.tokenizer: expected words, bpe or a path, got ''"),
        ({"tokenizer": 5}, "task.tokenizer: expected a string, got 5"),
        ({"tokenizer": "nowhere.json"}, "task.tokenizer: expected words, bpe or the path of a tokenizer.json.*nowhere"),
        ({"vocabulary": 2}, "task.vocabulary: expected 3 or more entries"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_key(data, fields, message):
    with pytest.raises(ValueError, match=message):
        build_task({"kind": "words"} | fields).open(data, TrainConfig(context=20))


def test_a_text_shorter_than_the_context_is_refused_in_tokens(data):
    with pytest.raises(
        ValueError, match="the validation part has 540 tokens, and train.context 400 needs at least 801"
    ):
        build_task("words").open(data, TrainConfig(context=400))
