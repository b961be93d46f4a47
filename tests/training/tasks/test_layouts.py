"""Data that are missing: what is expected, and where to get it."""

from __future__ import annotations

import pytest

from scatterbrain.training.config import DataConfig, TrainConfig
from scatterbrain.training.tasks import build_task, open_data


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("text_classification", "aclImdb.*a folder of text files per class"),
        ("retrieval", "aclImdb.*a folder of text files, or a .zip"),
        ("words", "aclImdb.*wiki.train.tokens and wiki.valid.tokens"),
        ("image_sequence", "x_train.*aclImdb.*CIFAR-10 is at"),
        ("image_classification", "x_train.*aclImdb.*CIFAR-10 is at"),
        ("language", "data.path: expected a text file, a folder or 'stdlib', got '.*aclImdb'"),
    ],
)
def test_a_missing_path_is_answered_with_the_layout(task, words, tmp_path):
    data = DataConfig(path=str(tmp_path / "aclImdb"))
    with pytest.raises(ValueError, match=words) as error:
        open_data(build_task(task), data, TrainConfig())
    assert str(error.value).startswith("data.path: ")


def test_a_glob_that_finds_nothing_is_answered_with_the_cure(tmp_path):
    (tmp_path / "text.md").write_text("text")
    with pytest.raises(
        ValueError, match="matches data.glob '.*' outside data.exclude .* name the files with data.glob"
    ):
        open_data(build_task("language"), DataConfig(path=str(tmp_path)), TrainConfig())
