"""scatterbrain bench: tables, files, interruption, and what it refuses."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from testkit import rand, run_python

pytest.importorskip("jsonargparse")
pytest.importorskip("tqdm")

from scatterbrain.bench import measure, memory, report
from scatterbrain.bench.config import SUITES, BenchConfig, Setting
from scatterbrain.bench.inputs import random_inputs
from scatterbrain.bench.methods import parse_method
from scatterbrain.cli import main

TINY = ["--heads", "2", "--kv_heads", "1", "--head_dim", "8", "--rank", "3", "--repeats", "2", "--allocator", "system"]
SMALL = [*TINY, "--memory", "false"]


def rows(path: Path) -> dict[tuple, dict]:
    content = json.loads(path.read_text())
    return {(r["method"], r["tokens"], r["direction"], r["is_causal"], r["dtype"]): r for r in content["rows"]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One run that most tests look at: (what was printed, folder with out.json and out.png)."""
    folder = tmp_path_factory.mktemp("bench")
    files = ["--json", str(folder / "new" / "out.json"), "--png", str(folder / "new" / "out.png")]
    methods = ["--methods", "sdpa", "window-8", "torch-window-8", "lsh-8"]
    patch = pytest.MonkeyPatch()
    printed = []
    patch.setattr(builtins, "print", lambda *a, **k: printed.append(" ".join(map(str, a))))
    try:
        assert main(["bench", "--lengths", "16", "40", *methods, "--causal", "both", *SMALL, *files]) == 0
    finally:
        patch.undo()
    return "\n".join(printed), folder / "new"


def test_the_table_has_a_line_per_method_and_a_column_per_length(results: tuple[str, Path]) -> None:
    text, _ = results
    assert "CPU time of one thread, median of 2 interleaved repeats" in text
    for title in ("F bidirectional", "F+B bidirectional", "F causal", "F+B causal"):
        table = text.split(f"{title}, float32, 2 heads of 8, 1 key/value heads\n")[1].split("\n\n")[0].split("\n")
        assert table[0].split()[:3] == ["tokens", "16", "40"] and "error, 40" in table[0]
        assert [line.split()[0] for line in table[1:]] == ["sdpa", "window-8", "torch-window-8", "lsh-8"]
        assert table[1].count("(1.00x)") == 2
    assert "lsh-8 at 16 tokens: bidirectional only" in text


def test_json_has_every_row_with_time_error_and_rate(results: tuple[str, Path]) -> None:
    path = results[1] / "out.json"
    content, found = json.loads(path.read_text()), rows(path)
    assert content["complete"] and content["facts"]["clock"] == "CPU time of one thread"
    assert content["facts"]["allocator"] == "system"
    assert len(found) == 4 * 2 * 2 * 2
    for (method, tokens, direction, is_causal, _), row in found.items():
        if method == "lsh-8" and is_causal:
            assert row["seconds"] is None and row["note"] == "bidirectional only"
            continue
        sdpa = found["sdpa", tokens, direction, is_causal, "float32"]
        assert row["seconds"] >= row["fastest"] > 0 and row["repeats"] == 2
        assert row["times_faster"] == pytest.approx(sdpa["seconds"] / row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
        assert row["error"] == pytest.approx(0, abs=1e-5) if method == "sdpa" else 0.01 < row["error"] < 1.5


def test_the_error_is_that_of_the_method_on_these_inputs(results: tuple[str, Path]) -> None:
    inputs = random_inputs(1, 2, 1, 40, 8, 3)
    query, key, value = inputs.query, inputs.key, inputs.value
    exact = torch.softmax(query @ key.transpose(-1, -2) * 8**-0.5, -1) @ value
    out = parse_method("window-8").build(inputs.statistics, 3, False)(query, key, value)
    row = rows(results[1] / "out.json")["window-8", 40, "F", False, "float32"]
    assert row["error"] == pytest.approx(float((out - exact).norm() / exact.norm()), rel=1e-3)


@pytest.mark.slow
def test_flex_attention_is_compiled_and_what_has_no_backward_pass_is_measured_forward(tmp_path: Path) -> None:
    path, before = tmp_path / "out.json", torch._dynamo.utils.counters["stats"]["unique_graphs"]
    methods = ["--methods", "torch-window-20", "torch-flex-20", "--directions", "F+B", "F"]
    assert main(["bench", "--lengths", "48", *methods, "--causal", "no", *SMALL, "--json", str(path)]) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    found = rows(path)
    forward, backward = (found["torch-flex-20", 48, direction, False, "float32"] for direction in ("F", "F+B"))
    assert forward["seconds"] > 0 and forward["note"] == ""
    assert forward["error"] == pytest.approx(found["torch-window-20", 48, "F", False, "float32"]["error"], rel=1e-4)
    assert backward["seconds"] is None and "no backward pass on the CPU" in backward["note"]


def test_the_picture_is_a_png(results: tuple[str, Path]) -> None:
    image = (results[1] / "out.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and len(image) > 10_000


def test_freed_memory_stays_with_the_process_if_it_is_asked_to() -> None:
    """Counts the page faults of a second tensor of 40 MiB: all of its pages before, and next to none after."""
    program = (
        "import resource, sys, torch\n"
        "from scatterbrain.bench.allocator import keep_freed_memory\n"
        "def faults():\n"
        "    torch.ones(11 << 20)\n"  # leaves room for the next one, whatever its alignment
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(10 << 20)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "faults()\n"
        "if not keep_freed_memory(): sys.exit('not glibc')\n"
        "faults()\n"
    )
    done = run_python("-c", program)
    if "not glibc" in done.stderr:
        pytest.skip("glibc only")
    system, kept = map(int, done.stdout.split())
    assert kept < 100 and kept < system


def test_memory_is_measured_beyond_the_inputs(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux only")
    path = tmp_path / "out.json"
    command = ["bench", "--lengths", "8192", "--methods", "window-16", *TINY, "--repeats", "1", "--directions", "F+B"]
    command += ["--head_dim", "16"]  # narrower heads are computed in float64
    assert main([*command, "--json", str(path)]) == 0
    row = rows(path)["window-16", 8192, "F+B", False, "float32"]
    results = 8192 * 4 * (2 * 16 + 2 * 16 + 2 * 16)  # out, its gradients of two query heads and one key and value head
    assert results < row["peak_bytes"] < 12 * results
    assert row["bytes_per_token_and_head"] == pytest.approx(row["peak_bytes"] / (8192 * 2))


def test_a_process_that_is_stopped_leaves_a_note_and_the_next_row_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BenchConfig(head_dim=8, rank=3, heads=1)
    row = measure.Row("window-8", 64, 1, 1, 8, 1, "float32", False, "F", seconds=1.0)
    peak = memory.PeakMemory(config)
    if peak.reason:
        pytest.skip(peak.reason)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(memory.sys, "executable", "/bin/true")
            peak.fill(row)
        assert row.peak_bytes is None and "out of memory?" in row.note
        row.note = ""
        peak.fill(row)
        assert row.peak_bytes is not None and not row.note
    finally:
        peak.close()


def test_ctrl_c_prints_and_writes_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And --resume goes on with it: lengths that were finished are not measured again."""
    path, fill, calls = tmp_path / "out.json", measure.Measurement._fill, []

    def stop_later(self: object, key: tuple) -> None:
        fill(self, key)
        calls.append(key)
        if len(calls) == 6:
            raise KeyboardInterrupt

    command = ["bench", "--lengths", "16", "24", "--methods", "sdpa", "window-8", "--directions", "F", *SMALL]
    command += ["--json", str(path), "--png", str(tmp_path / "out.png")]
    monkeypatch.setattr(measure.Measurement, "_fill", stop_later)
    assert main(command) == 130
    printed = capsys.readouterr()
    assert "window-8 at 24 tokens: stopped after 1 of 2 repeats" in printed.out
    assert "results so far" in printed.err and (tmp_path / "out.png").exists()
    content = json.loads(path.read_text())
    assert not content["complete"] and len(content["rows"]) == 4

    monkeypatch.setattr(measure.Measurement, "_fill", fill)
    before = rows(path)
    assert main([*command, "--resume"]) == 0
    after = rows(path)
    assert json.loads(path.read_text())["complete"] and len(after) == 4
    for key, row in after.items():
        assert row["repeats"] == 2 and not row["note"]
        assert (row == before[key]) == (key[1] == 16)


def test_memory_that_ctrl_c_cut_off_is_measured_by_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path, filled = tmp_path / "out.json", []

    def fill(self: object, row: measure.Row) -> None:
        filled.append(row.method)
        if len(filled) == 2:
            raise KeyboardInterrupt
        row.peak_bytes = 5

    monkeypatch.setattr(memory.PeakMemory, "fill", fill)
    monkeypatch.setattr(memory, "_CLEAR", tmp_path)
    command = ["bench", "--lengths", "16", "--methods", "sdpa", "window-8", "--directions", "F", *TINY]
    command += ["--json", str(path)]
    assert main(command) == 130
    assert "window-8 at 16 tokens: stopped before its memory was measured" in capsys.readouterr().out
    assert [row["peak_bytes"] for row in rows(path).values()] == [5, None]
    assert main([*command, "--resume"]) == 0
    assert filled == ["sdpa", "window-8"] * 2
    assert [(row["peak_bytes"], row["note"]) for row in rows(path).values()] == [(5, "")] * 2
    assert main([*command, "--resume"]) == 0 and len(filled) == 4


def test_memory_of_kinds_of_ones_own_is_measured(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux only")
    (tmp_path / "my_kinds.py").write_text(
        "from dataclasses import dataclass\n"
        "import scatterbrain as sb\n"
        "print('kinds of my own')\n"
        "from scatterbrain import supports\n"
        "@supports.register\n"
        "@dataclass(frozen=True)\n"
        "class Near(supports.Support):\n"
        "    kind = 'near'\n"
        "    keys: int\n"
        "    def lists(self, call, query_map, key_map):\n"
        "        return sb.Window(self.keys).lists(call, query_map, key_map)\n"
    )
    command = ["bench", "--lengths", "600", "--methods", "window-16", "near-16", *TINY, "--repeats", "1"]
    command += ["--directions", "F", "--json", str(tmp_path / "out.json")]
    program = "import my_kinds, sys\nfrom scatterbrain.cli import main\nsys.exit(main({!r}))"
    (tmp_path / "program.py").write_text(program.format(command))
    done = run_python(tmp_path / "program.py")
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "out.json")
    assert all(row["peak_bytes"] is not None and row["note"] == "" for row in found.values()), found


def test_memory_of_kinds_of_the_program_itself_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "parse_method", lambda name: SimpleNamespace(modules=lambda: ["__main__"]))
    row, peak = measure.Row("near-16", 16, 1, 1, 8, 1, "float32", False, "F"), memory.PeakMemory(BenchConfig())
    peak.reason = None
    peak.fill(row)
    assert row.note.endswith("knows the kinds of modules alone; define them in a module and import it")


def test_inputs_are_made_once_for_all_methods_whose_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux only")
    made, make = [], memory.make_inputs
    monkeypatch.setattr(
        memory, "make_inputs", lambda config, setting: made.append(setting.tokens) or make(config, setting)
    )
    memory._inputs.cache_clear()
    setting = Setting(600, 1, 1, 8, 1, "float32", False)
    for method in ("sdpa", "window-8"):
        config = BenchConfig(head_dim=8, rank=3, heads=1, methods=[method])
        memory.peak_of(config, setting, method, "F")
    assert made == [512, 600]
    memory._inputs.cache_clear()


def test_json_has_no_word_for_what_is_no_number(tmp_path: Path) -> None:
    row = measure.Row("sdpa", 16, 1, 1, 8, 1, "float32", False, "F", seconds=1.0, error=float("nan"))
    report.write_json(tmp_path / "out.json", [row], BenchConfig(head_dim=8, rank=3), is_complete=True)
    content = json.loads((tmp_path / "out.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert content["rows"][0]["error"] is None


def test_resume_refuses_other_options_and_other_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "out.json"
    command = ["bench", "--lengths", "16", "--methods", "sdpa", "--directions", "F", *SMALL, "--json", str(path)]
    assert main(command) == 0
    assert main([*command, "--resume", "--seed", "1"]) == 1
    assert "measured with other options, first seed: 0, now 1" in capsys.readouterr().err
    path.write_text("{}")
    assert main([*command, "--resume"]) == 1
    assert "not a file that scatterbrain bench wrote" in capsys.readouterr().err


def test_a_method_that_fails_is_named_and_the_others_are_measured(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--lengths", "30", "--methods", "sdpa", "torch-clusters-8", "--directions", "F", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "torch-clusters-8 at 30 tokens: ValueError: clusters: expected a multiple of 4 tokens" in out
    assert "sdpa" in out and "(1.00x)" in out


def test_a_run_without_any_result_fails(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--lengths", "30", "--methods", "torch-clusters-8", "--directions", "F", *SMALL]) == 1


def test_out_of_memory_is_said_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(measure, "available_memory", lambda device: 2**20)
    methods = ["--methods", "sdpa", "torch-window-1024"]
    assert main(["bench", "--lengths", "4096", *methods, "--directions", "F", *SMALL, "--repeats", "1"]) == 0
    assert "torch-window-1024 at 4096 tokens: needs about 1 GiB of memory, 0 are available" in capsys.readouterr().out
    full = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
    assert measure.describe_failure(full) == "out of memory"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types_are_measured_against_exact_attention_in_float32(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "out.json"
    command = [
        "bench",
        "--lengths",
        "40",
        "--methods",
        "sdpa",
        "window-8",
        "--dtypes",
        dtype,
        "--directions",
        "F",
        *SMALL,
    ]
    assert main([*command, "--json", str(path)]) == 0
    error = rows(path)["sdpa", 40, "F", False, dtype]["error"]
    assert error < 1e-12 if dtype == "float64" else 1e-5 < error < 0.02


def test_two_threads_are_timed_by_the_wall_clock(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    command = ["bench", "--lengths", "16", "--methods", "sdpa", "--directions", "F", *SMALL, "--threads", "2"]
    assert main(command) == 0
    assert "wall time, 2 threads" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


# ---------------------------------------------------------------------------------------- inputs from a file


@pytest.fixture
def qkv_file(tmp_path: Path) -> Path:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {f"a.N60.layer0.{part}": rand(heads, 60, 8) for part, heads in (("q", 4), ("k", 2), ("v", 2))}
    tensors |= {f"a.cal.layer0.{part}": rand(heads, 90, 8) for part, heads in (("q", 4), ("k", 2))}
    tensors |= {f"b.{part}": rand(1, 2, 700, 8) for part in "qkv"}
    path = tmp_path / "qkv.safetensors"
    safetensors.save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "entry, fitted, heads",
    [("a.N60.layer0", "entry a.cal.layer0", 4), ("b", "the tokens after the measured ones", 2)],
)
def test_inputs_come_from_a_file(
    qkv_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, entry: str, fitted: str, heads: int
) -> None:
    path = tmp_path / "out.json"
    command = ["bench", "--inputs", str(qkv_file), "--entry", entry, "--lengths", "32", "--methods", "sdpa", "window-8"]
    command += ["--rank", "3", "--head_dim", "8", "--directions", "F", "--repeats", "1", "--memory", "false"]
    assert main([*command, "--json", str(path)]) == 0
    assert f"statistics fitted on {fitted}" in capsys.readouterr().out
    row = rows(path)["window-8", 32, "F", False, "float32"]
    assert (row["heads"], row["head_dim"]) == (heads, 8)
    if entry == "a.N60.layer0":
        assert main([*command, "--heads", "2"]) == 0
    content = json.loads(path.read_text())
    content["options"]["head_dim"] = 64  # as versions that did not read it from the file have it
    path.write_text(json.dumps(content))
    assert main([*command, "--json", str(path), "--resume"]) == 0
    assert rows(path)["window-8", 32, "F", False, "float32"] == row


def test_resume_goes_on_with_rows_of_the_same_content_alone(
    qkv_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "out.json"
    command = ["bench", "--inputs", str(qkv_file), "--entry", "b", "--lengths", "32", "--methods", "sdpa", "--rank"]
    command += ["3", "--directions", "F", "--repeats", "1", "--memory", "false", "--json", str(path)]
    assert main(command) == 0
    measured = path.read_text()
    assert main([*command, "--resume"]) == 0 and path.read_text() == measured
    older = json.loads(measured)
    del older["options"]["inputs_sha256"]
    path.write_text(json.dumps(older))
    capsys.readouterr()
    assert main([*command, "--resume"]) == 1
    assert "an earlier version, which does not say what that file held; leave --resume out" in capsys.readouterr().err
    path.write_text(measured)
    save_file({name: -t for name, t in load_file(qkv_file).items()}, qkv_file)
    assert main([*command, "--resume"]) == 1
    errors = capsys.readouterr().err
    assert f"{qkv_file} had other content then, sha256 " in errors and "leave --resume out" in errors
    assert path.read_text() == measured


def test_outputs_that_are_all_zero_are_met_without_error(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {f"a.{part}": rand(1, 60, 8, seed=i) * (part != "v") for i, part in enumerate("qkv")}
    safetensors.save_file(tensors, tmp_path / "zero.safetensors")
    command = ["bench", "--inputs", str(tmp_path / "zero.safetensors"), "--lengths", "32", "--methods", "window-8"]
    command += ["--rank", "3", "--directions", "F", "--repeats", "1", "--memory", "false"]
    assert main([*command, "--json", str(tmp_path / "out.json")]) == 0
    assert rows(tmp_path / "out.json")["window-8", 32, "F", False, "float32"]["error"] == 0


BAD_FILES = {
    "no such entry": (["--entry", "c"], "--entry c is not in"),
    "too few tokens": (["--entry", "a.N60.layer0", "--lengths", "61"], "has 60 tokens, too few for a length of 61"),
    "batch": (["--batch", "2"], "--batch comes from the file"),
    "seed": (["--seed", "1"], "--seed comes from the file"),
    "width": (["--head_dim", "16"], "--head_dim comes from the file of --inputs, which has 8; leave it out"),
    "rank": (["--rank", "9"], "--rank must be at most --head_dim 8, got 9"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_a_file_does_not_have_is_said(qkv_file: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    options, message = BAD_FILES[name]
    assert main(["bench", "--inputs", str(qkv_file), "--lengths", "32", *options]) == 1
    assert message in capsys.readouterr().err


def test_the_file_of_inputs_is_not_written_to(qkv_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before, new = qkv_file.read_bytes(), str(tmp_path / "new")
    for outputs, other in ((["--json", str(qkv_file)], "--inputs"), (["--json", new, "--png", new], "--json")):
        assert main(["bench", "--inputs", str(qkv_file), "--lengths", "32", "--rank", "3", *outputs]) == 1
        assert f"expected a file other than that of {other}, which it would replace" in capsys.readouterr().err
    assert qkv_file.read_bytes() == before and not Path(new).exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("nothing here")
    assert main(["bench", "--inputs", str(path)]) == 1
    assert "as a safetensors file" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- the command line

BAD = {
    "method": (["--methods", "flash"], "unknown method 'flash'"),
    "length": (["--lengths", "0"], "--lengths must be at least 1, got 0"),
    "type": (["--dtypes", "int8"], "--dtypes must be one of float32"),
    "direction": (["--directions", "B"], "--directions must be one of F, F+B"),
    "repeats": (["--repeats", "0"], "--repeats must be at least 1"),
    "heads": (["--heads", "3", "--kv_heads", "2"], "multiple of --kv_heads"),
    "rank": (["--rank", "65"], "--rank must be at most --head_dim 64"),
    "resume": (["--resume"], "give it as --json FILE"),
    "folder": (["--json", "."], "--json: expected a file to write, got ., which is a folder"),
    "entry": (["--entry", "a"], "give the file as --inputs FILE"),
}


@pytest.mark.parametrize("name", BAD)
def test_values_out_of_range_are_named(name: str, capsys: pytest.CaptureFixture) -> None:
    arguments, message = BAD[name]
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--nope"], ["--lengths", "many"], ["--suite", "huge"], ["--inputs", "no.file"]])
def test_a_wrong_command_line_ends_with_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2


def test_help_teaches_with_examples_suites_and_methods(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("scatterbrain bench --suite standard --json", *SUITES, "torch-clusters-64", "Ctrl-C"):
        assert word in text


def test_help_lists_the_methods_by_their_whole_names(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    methods = capsys.readouterr().out.split("\nmethods:\n")[1].split("\n\n")[0].splitlines()
    assert methods[0].split() == ["sdpa", "F.scaled_dot_product_attention"]
    assert all(line.startswith("  ") for line in methods)


@pytest.mark.parametrize("package", ["jsonargparse", "matplotlib"])
def test_a_missing_package_is_named_before_anything_is_measured(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["bench", "--png", str(tmp_path / "out.png")]) == 1
    assert f"needs the package {package}" in capsys.readouterr().err


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_unfolds_into_methods_that_can_run(suite: str) -> None:
    settings = BenchConfig(suite=suite).settings()
    assert settings
    for setting, methods in settings:
        assert all(parse_method(name).refusal(setting.is_causal) is None for name in methods), setting
    assert BenchConfig(suite=suite, causal="both").settings()
