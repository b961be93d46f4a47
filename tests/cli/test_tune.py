"""scatterbrain tune: its files, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

import scatterbrain as sb
from scatterbrain.analysis import tuning
from scatterbrain.cli import main

MODULE = """
import torch
from torch import nn

def with_batches():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 40, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), [torch.randn(1, 150, 32) for _ in range(3)]

class Returning(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.encoder, self.batches = with_batches()
        self.change = change

    def forward(self, tokens):
        return self.change(self.encoder(tokens))

def of_classes():
    model = Returning(lambda out: out[:, 0])
    return model, model.batches

def of_sums():
    model = Returning(lambda out: out.sum())
    return model, model.batches

def of_names():
    model = Returning(lambda out: {"features": out})
    return model, model.batches
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pairs = [(sb.Window(64), sb.Centroid(32)), (sb.Window(64), sb.Centroid(64))]
    monkeypatch.setattr(tuning, "bidirectional_candidates", lambda: pairs)
    fast = {str(pair): 0.5 for pair in pairs}
    monkeypatch.setattr(tuning, "medians", lambda timed, repeats: {name: fast.get(name, 1.0) for name in timed})
    (tmp_path / "mine.py").write_text(MODULE)
    return f"{tmp_path / 'mine.py'}:with_batches"


def test_the_choice_is_printed_written_and_drawn(model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("t.yaml", "t.png", "times.json")]
    options = [x for name, file in zip(("--yaml", "--png", "--times"), files) for x in (name, str(file))]
    assert main(["tune", model, "--max-error", "1", "--of", "mean", *options]) == 0
    out = capsys.readouterr().out
    assert "error at most 1" in out and "one pair for all" in out and all(file.stat().st_size for file in files)
    assert set(sb.LayerSettings.load(files[0])) == {"layers.0.self_attn", "layers.1.self_attn"}
    assert main(["tune", model, "--budget", ".6", "--times", str(files[2])]) == 0
    assert "at most 0.6 of exact attention's time" in capsys.readouterr().out


def test_a_bound_is_needed(model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    times = ("--times", str(tmp_path / "times.json"))
    for arguments, words in (
        ((), "give either max_error or budget"),
        (("--max-error", "-1"), "max_error must be a positive number"),
        (("--max-error", "1", "--batches", "0"), "--batches must be at least 1"),
    ):
        assert main(["tune", model, *arguments, *times]) == 1
        assert words in capsys.readouterr().err


def test_what_cannot_be_judged_or_written_is_refused_by_name(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = model.rpartition(":")[0]
    for function, arguments, words in (
        (
            "of_classes",
            ("--of", "mean"),
            "--of mean: expected a model whose output is (rows, tokens, ...), got shape (1, 32)",
        ),
        ("of_sums", (), "expected a model that returns a tensor (rows, ...), got a single number"),
        ("of_names", (), "expected a model that returns a tensor, last_hidden_state or logits, got dict"),
        ("with_batches", ("--yaml", str(tmp_path)), "--yaml: expected a file to write"),
        ("with_batches", ("--batches", "2"), "brings its own, got 2; leave it out"),
        ("with_batches", ("--threads", "0"), "--threads must be at least 1, got 0"),
    ):
        times = ("--times", str(tmp_path / "times.json"))
        assert main(["tune", f"{file}:{function}", "--max-error", "1", *arguments, *times]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[1, 2]", '{"a": "b"}', "3"])
def test_a_file_that_holds_no_times_is_named(
    model: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "times.json").write_text(content)
    assert main(["tune", model, "--max-error", "1", "--times", str(tmp_path / "times.json")]) == 1
    assert "is not a file of times: expected seconds by name, got" in capsys.readouterr().err


def test_ctrl_c_keeps_the_times(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def stopping(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning._Search, "keeping", stopping)
    assert main(["tune", model, "--max-error", "1"]) == 130
    assert "the next run goes on with them" in capsys.readouterr().err
