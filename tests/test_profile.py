"""sb.profile: the operators' time by stage."""

from __future__ import annotations

from functools import partial

from testkit import fitted, out_and_gradients, qkv, run_python

import scatterbrain as sb


def call(tokens: int = 256) -> None:
    statistics = fitted(4, head_dim=16)
    function = partial(sb.attention, support=sb.Routed(32), low_rank=sb.Quadratic(4), statistics=statistics)
    out_and_gradients(function, qkv(tokens, batch=1, head_dim=16))


def test_every_stage_of_a_call_is_recorded() -> None:
    with sb.profile() as profile:
        call()
    expected = {"projection", "routing, keys", "routing, lists", "states", "forward of queries", "backward of queries"}
    assert expected <= set(profile.stages)
    assert all(stage.calls >= 1 and stage.seconds >= 0 for stage in profile.stages.values())


def test_stages_do_not_overlap() -> None:
    with sb.profile() as profile:
        call()
    assert sum(stage.seconds for stage in profile.stages.values()) <= profile.total


def test_nothing_is_recorded_outside_the_block() -> None:
    call()
    with sb.profile() as profile:
        pass
    assert profile.stages == {}


def test_the_table_names_stages_and_the_rest() -> None:
    with sb.profile() as profile:
        call()
    lines = str(profile).splitlines()
    assert lines[0].split() == ["stage", "calls", "ms", "share"]
    assert any(line.startswith("forward of queries") for line in lines)
    assert lines[-1].startswith("outside the operators") and lines[-1].endswith("%")


def test_the_environment_variable_prints_the_table_at_exit() -> None:
    program = (
        "import torch, scatterbrain as sb; q = torch.randn(1, 1, 200, 8); sb.attention(q, q, q, sb.Window(16), None)"
    )
    run = run_python("-c", program, SCATTERBRAIN_PROFILE="1")
    assert run.returncode == 0, run.stderr
    assert "forward of queries" in run.stderr and "outside the operators" in run.stderr
