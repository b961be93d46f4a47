"""benchmarks/pairs.py: the pairs that a benchmark's command line asks for."""

from __future__ import annotations

import argparse
import runpy

import pytest
import torch
from testkit import ROOT
from torch import nn

import scatterbrain as sb

SCRIPT = ROOT / "benchmarks" / "pairs.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree, not only the installed package")


def pairs(arguments: str) -> list:
    names = runpy.run_path(str(SCRIPT))
    parser = argparse.ArgumentParser()
    names["add_options"](parser)
    return names["pairs_of"](parser.parse_args(arguments.split()))


def test_the_default_is_that_of_models_without_retraining():
    [pair] = pairs("")
    assert str(pair) == " + ".join(map(str, sb.presets.drop_in()))
    [pair] = pairs("--low-rank quadratic")
    assert str(pair) == " + ".join(map(str, sb.presets.quadratic()))


def test_every_combination_is_a_pair_once():
    found = pairs("--low-rank centroid quadratic --keys 64 96 --pools 1 2 --clusters 32 64 --rank 4 9")
    assert len(found) == len(set(map(str, found))) == 2 * 2 * 2 + 2 * 2 * 2
    assert pairs("--keys 64 128")[1].support == sb.Routed(128, block_q=32)
    wide = pairs("--keys 96 --block-q 16 --pools 2 --clusters 96")[0]
    assert wide.support == sb.Routed(96, block_q=16, pools=2) and wide.low_rank.clusters == 96


@pytest.mark.parametrize(("kernel", "calibrations"), [("centroid", 0), ("quadratic", 1)])
def test_only_a_kernel_with_stored_statistics_is_calibrated(kernel: str, calibrations: int):
    [pair] = pairs(f"--low-rank {kernel} --keys 32")
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
    ).eval()
    x = torch.randn(1, 300, 32, generator=torch.Generator().manual_seed(0))
    calls = []

    def calibration() -> None:
        calls.append(model(x))

    report = pair.swap_into(model, calibration)
    assert len(calls) == calibrations and len(report.replaced) == 1
    with torch.no_grad():
        assert model(x).isfinite().all()
