"""A short form of `make fuzz`, and tests of the tests: mistakes of every kind are found, made small, found again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import call_properties
import fuzz
import pytest
import torch
from call_properties import check
from drawn_calls import DrawnCall
from testkit import TESTS, run_python
from torch import Tensor

import scatterbrain as sb


def test_drawn_calls_hold_what_they_must() -> None:
    drawn, failure = fuzz.find_failure(check, seed=0, calls=40)
    assert failure is None, f"{failure.error}\nmake fuzz CALL='{failure.line}'"
    assert drawn == 40


# -------------------- mistakes


def scaled(out: Tensor, factor: float | Tensor) -> Tensor:
    return (out.double() * factor).to(out.dtype)


def inexact(out: Tensor, query: Tensor, key: Tensor, **arguments: Any) -> Tensor:
    return scaled(out, 1.05) if query.shape[3] > 20 else out


def of_the_future(out: Tensor, query: Tensor, key: Tensor, **arguments: Any) -> Tensor:
    last = key[:, :1, -1:, :1].detach().float().nan_to_num()
    return scaled(out, 1 + 1e-6 * torch.sigmoid(last)) if arguments["is_causal"] and key.shape[2] else out


def of_padding(out: Tensor, query: Tensor, key: Tensor, **arguments: Any) -> Tensor:
    return scaled(out, 1 + 1e-6) if query.isnan().any() else out


def of_threads(out: Tensor, query: Tensor, key: Tensor, **arguments: Any) -> Tensor:
    return scaled(out, 1 + 1e-6) if torch.get_num_threads() == 1 else out


def of_layout(out: Tensor, query: Tensor, key: Tensor, **arguments: Any) -> Tensor:
    return scaled(out, 1 + 1e-6) if key.is_contiguous() else out


MISTAKES = {
    inexact: "out: error",
    of_the_future: "by tokens after query",
    of_padding: "by the content of padding",
    of_threads: "on one thread",
    of_layout: "from contiguous memory",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_a_mistake_is_found_made_small_and_found_again(mistake: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = sb.attention

    def mistaken(query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool, **arguments: Any) -> Any:
        out, lse = attention(query, key, value, return_lse=True, **arguments)
        out = mistake(out, query, key, **arguments)
        return (out, lse) if return_lse else out

    monkeypatch.setattr(sb, "attention", mistaken)
    others = {inexact: (), of_the_future: ("check_accuracy", "check_padding")}  # that see it too, in some calls
    for other in others.get(mistake, ("check_accuracy",)):
        monkeypatch.setattr(call_properties, other, lambda checked, base: None)
    monkeypatch.setattr(fuzz, "SHRINKING_SECONDS", 1.5)
    _, failure = fuzz.find_failure(check, seed=0, calls=200)
    assert failure and MISTAKES[mistake] in failure.error
    with pytest.raises(AssertionError, match=MISTAKES[mistake]):
        check(DrawnCall.of(failure.line))


def test_the_smallest_call_that_fails_is_named() -> None:
    def narrow(call: DrawnCall) -> None:
        assert call.head_dim <= 20 or call.queries < 30

    _, failure = fuzz.find_failure(narrow, seed=0)
    assert DrawnCall.of(failure.line) == DrawnCall(queries=30, keys=30, head_dim=24, value_dim=24)


# -------------------- the command


def test_the_command_draws_calls_on_an_instruction_set() -> None:
    result = run_python(TESTS / "fuzz.py", "--sets", "baseline", "--calls", "2", "--minutes", "1")
    assert result.returncode == 0 and "baseline: 2 calls, none failed" in result.stdout, result.stderr


def test_the_command_checks_a_given_call(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert fuzz.main(["--work", str(tmp_path / "progress"), "--call", '{"queries": 5, "keys": 7}']) == 0
    assert capsys.readouterr().out == "The call holds what it must.\n"
    assert fuzz.main(["--work", str(tmp_path / "progress"), "--call", "{'queries': 5}"]) == 1
    assert capsys.readouterr().out.startswith("expected a call as a JSON object")


def test_a_process_that_ends_by_a_signal_leaves_the_call_that_it_was_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/sh
while [ "$1" != --work ]; do shift; done
printf '{"queries": 3}' > "$2"
echo "ERROR: heap-buffer-overflow" >&2
kill -SEGV $$
"""
    )
    python.chmod(0o755)
    monkeypatch.setattr(fuzz.sys, "executable", str(python))
    assert fuzz.main(["--sets", "baseline"]) == 1
    said = capfd.readouterr().out
    assert f"ended with {-signal.SIGSEGV}" in said and "heap-buffer-overflow" in said
    assert """make fuzz SETS=baseline CALL='{"queries": 3}'""" in said


@pytest.mark.parametrize("line", ["", "[1]", '{"querys": 3}', "{'queries': 3}"])
def test_a_call_that_is_none_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="expected a"):
        DrawnCall.of(line)


def test_a_call_is_one_line_and_back() -> None:
    call = DrawnCall(support={"kind": "empty"}, low_rank={"kind": "favor", "features": 8}, scale=-0.2, queries=9)
    assert DrawnCall.of(call.line()) == call and "\n" not in call.line()
    assert DrawnCall().line() == "{}"
