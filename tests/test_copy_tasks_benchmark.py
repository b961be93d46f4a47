"""benchmarks/copy_tasks.py: what its two tasks show and hide."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from testkit import ROOT

SCRIPT = ROOT / "benchmarks" / "copy_tasks.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree, not only the installed package")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(sys, "path", sys.path[:])
    return runpy.run_path(str(SCRIPT))


def test_the_masked_half_shows_nothing_of_what_is_scored(script: dict):
    tokens, targets = script["masked_batch"](3, torch.Generator().manual_seed(0))
    half = script["HALF"]
    assert tokens.shape == targets.shape == (3, 2 * half + 1)
    assert (tokens[:, half + 1 :] == script["MASK"]).all() and (targets[:, : half + 1] == -100).all()
    assert torch.equal(targets[:, half + 1 :], tokens[:, :half])


def test_the_causal_task_scores_the_next_token_of_the_copied_half(script: dict):
    tokens, targets = script["causal_batch"](3, torch.Generator().manual_seed(0))
    half = script["HALF"]
    assert (targets[:, :half] == -100).all() and torch.equal(targets[:, half:-1], tokens[:, half + 1 :])
    assert torch.equal(targets[:, half:], tokens[:, :half])


def test_attention_of_the_masked_task_reads_later_tokens(script: dict):
    import scatterbrain as sb

    layer = script["Bidirectional"](sb.ScatterbrainAttention(1, 16, support=sb.Full(), low_rank=None))
    query, key, value = torch.randn(3, 1, 1, 40, 16, generator=torch.Generator().manual_seed(0))
    other = value.clone()
    other[..., -1, :] += 1
    first, second = (layer(query, key, v, is_causal=True)[0, 0, 0] for v in (value, other))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ("masked --attention window per-query-centroid", ["window", "per-query-centroid"]),
        ("causal --attention window", ["window"]),
    ],
)
def test_it_prints_a_perplexity_for_each_attention_and_seed(
    arguments: str, rows: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split(), "--steps", "1", "--seeds", "0"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[::2]] == rows
    assert all(20 < float(line.split("perplexity ")[1].split(",")[0]) < 300 for line in lines[1::2])


def test_a_kernel_that_reads_the_future_is_refused_in_causal_copy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--attention", "centroid"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2 and "expected any of train, full, window in causal copy" in capsys.readouterr().err
