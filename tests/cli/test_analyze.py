"""scatterbrain analyze: regimes, files, resumption, captured inputs, and what it refuses."""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from testkit import rand

pytest.importorskip("jsonargparse")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import scatterbrain as sb
from scatterbrain.analysis.cost import Shape, cost
from scatterbrain.analysis.regimes import runner
from scatterbrain.analysis.regimes.config import AnalyzeConfig
from scatterbrain.analysis.regimes.inputs import Clustered, Head, captured_heads
from scatterbrain.analysis.regimes.measure import Row
from scatterbrain.cli import main
from scatterbrain.hilbert import hilbert_order

TINY = ["--tokens", "320", "--head_dim", "32", "--clusters", "20", "--keys", "48", "--size", "16", "--draws", "1"]
TEMPERATURES = [0.2, 1.0, 3.0, 20.0]
GRID = ["--temperatures", *map(str, TEMPERATURES)]


def files(folder: Path) -> list[str]:
    return ["--csv", str(folder / "out.csv"), "--png", str(folder / "out.png")]


def table(folder: Path) -> dict[tuple[str, float, str], dict[str, str]]:
    with (folder / "out.csv").open(newline="") as file:
        return {(row["head"], float(row["temperature"]), row["method"]): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run that most tests look at: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("analyze")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *a, **k: printed.append(" ".join(map(str, a))))
        assert main(["analyze", *TINY, *GRID, *files(folder)]) == 0
    return folder, "\n".join(printed)


def test_sparse_wins_at_low_temperature_low_rank_at_high_and_both_together_everywhere(
    results: tuple[Path, str],
) -> None:
    found = table(results[0])
    error = lambda temperature, method: float(found["seed 0", temperature, method]["matrix_error"])
    assert error(0.2, "sparse") < 0.05 < 0.5 < error(0.2, "low-rank")
    assert error(20.0, "low-rank") < 0.1 < 0.5 < error(20.0, "sparse")
    assert min(error(3.0, "sparse"), error(3.0, "low-rank")) > 1.5 * error(3.0, "combined")
    for temperature in TEMPERATURES:
        better = min(error(temperature, "sparse"), error(temperature, "low-rank"))
        assert error(temperature, "oracle") - 1e-6 <= error(temperature, "combined") <= better + 0.006
    entropies = [float(found["seed 0", temperature, "sparse"]["entropy"]) for temperature in TEMPERATURES]
    assert entropies == sorted(entropies)


def test_all_methods_cost_the_same_and_none_more_than_the_pair(results: tuple[Path, str]) -> None:
    found, shape = table(results[0]), Shape(320, 320, 32, 32)
    pair = sb.Routed(48, block_q=8, pools=2), sb.Centroid(16)
    budget = cost(*pair, shape).total
    for (_, _, method), row in found.items():
        if method == "oracle":
            assert row["multiply_adds"] == "" and row["settings"].startswith("48 entries a row and rank 16")
            continue
        assert 0.9 * budget < float(row["multiply_adds"]) <= budget
        if method == "combined":
            assert float(row["multiply_adds"]) == budget and row["settings"] == f"{pair[0]} + {pair[1]}"


def test_errors_and_entropy_are_those_of_the_definition(results: tuple[Path, str]) -> None:
    head = Clustered(320, 32, 20, 0.5, 1.0, 16).head(0)
    scale = 1 / (3.0 * 32**0.5)
    weights = torch.softmax(scale * head.query.double() @ head.key.double().mT, -1)
    entropy = -(weights * weights.log()).sum(-1).mean()
    units = torch.eye(320, dtype=torch.float64)[None, None]
    for method, support, kernel in (
        ("combined", sb.Routed(48, block_q=8, pools=2), sb.Centroid(16)),
        ("low-rank", sb.Empty(), None),
    ):
        row = table(results[0])["seed 0", 3.0, method]
        assert float(row["entropy"]) == pytest.approx(float(entropy), rel=1e-6)
        if kernel is None:
            kernel = sb.Centroid(int(row["settings"].split("=")[1].rstrip(")")))
        clusters = sb.cluster(head.query, head.key, kernel.clusters, scale=scale)
        lists = support
        if method == "combined":
            lists = sb.route(head.query, head.key, support, kernel, scale=scale, statistics=clusters)
        ours = sb.reference.attention(
            *(t.double() for t in (head.query, head.key)), units, lists, kernel, scale=scale, statistics=clusters
        )
        error = float((ours - weights).norm() / weights.norm())
        assert float(row["matrix_error"]) == pytest.approx(error, rel=1e-3)
        want = weights @ head.value.double()
        error = float((ours @ head.value.double() - want).norm() / want.norm())
        assert float(row["output_error"]) == pytest.approx(error, rel=1e-3)


def test_the_summary_says_where_each_part_is_enough(results: tuple[Path, str]) -> None:
    text = results[1]
    assert "sparse only errs by at most 0.1 at temperatures of 0.2 to" in text
    assert "to 20" in text.split("low-rank only errs by at most 0.1 at temperatures of")[1].split("\n")[0]
    assert "both together: Routed(keys=48, block_q=8" in text and "multiply-adds per query" in text


def test_the_picture_is_a_png(results: tuple[Path, str]) -> None:
    image = (results[0] / "out.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and len(image) > 20_000


def test_the_clustered_inputs_have_their_spread_and_scale() -> None:
    tight, wide = (Clustered(400, 16, 4, spread, 3.0, 20).head(5) for spread in (0.0, 2.0))
    assert len(torch.unique(tight.query[0, 0], dim=0)) == len(torch.unique(tight.key[0, 0], dim=0)) <= 4
    assert torch.equal(tight.query, tight.key) and not torch.equal(wide.query, wide.key)
    runs = tight.query[0, 0].unflatten(0, (20, 20))
    assert torch.equal(runs, runs[:, :1].expand_as(runs))
    within = (wide.query - wide.key)[0, 0].std()  # of two noises
    assert float(within) == pytest.approx(3.0 * 2.0 * 2**0.5, rel=0.1)
    assert torch.equal(wide.query, Clustered(400, 16, 4, 2.0, 3.0, 20).head(5).query)


# ---------------------------------------------------------------------------------------- resumption


def test_ctrl_c_keeps_what_there_is_and_resume_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, results: tuple[Path, str]
) -> None:
    measure, measured = runner.measure, []

    def stop_at(temperature: float | None) -> None:
        def stopping(head: object, at: float, config: object) -> object:
            if at == temperature:
                raise KeyboardInterrupt
            measured.append(at)
            return measure(head, at, config)

        monkeypatch.setattr(runner, "measure", stopping)

    stop_at(3.0)
    command = ["analyze", *TINY, *GRID, "--oracle", "false", *files(tmp_path)]
    assert main(command) == runner.INTERRUPTED
    assert "stopped before the end" in capsys.readouterr().err
    assert {key[1] for key in table(tmp_path)} == {0.2, 1.0} and (tmp_path / "out.png").exists()
    stop_at(None)
    assert main([*command, "--resume"]) == 0
    assert measured == TEMPERATURES
    whole = {key: row for key, row in table(results[0]).items() if key[2] != "oracle"}
    assert table(tmp_path) == whole
    assert main([*command, "--resume", "--keys", "40"]) == 1
    assert "was measured with other options" in capsys.readouterr().err
    (tmp_path / "out.csv").write_text("a,b\n1,2\n")
    assert main([*command, "--resume"]) == 1
    assert "is not a file that scatterbrain analyze wrote" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- captured inputs


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_file = pytest.importorskip("safetensors.torch").save_file
    path, tensors = tmp_path_factory.mktemp("captured") / "qkv.safetensors", {}
    for layer, heads in ((0, 4), (1, 2)):
        for part, kv_heads in (("q", heads), ("k", 2), ("v", 2)):
            tensors[f"m.N200.layer{layer}.{part}"] = 2 * rand(kv_heads, 200, 16, seed=ord(part) + layer).half()
    for part in "qk":
        tensors[f"m.cal.layer0.{part}"] = rand(4 if part == "q" else 2, 90, 16, seed=9)
    save_file(tensors, path)
    return path


def test_heads_of_a_file_are_measured_each_with_its_keys(captured: Path, tmp_path: Path) -> None:
    heads = {head.name: head for head in captured_heads(captured, None, 150, None, "natural")}
    assert list(heads) == [f"m.N200.layer0 head {h}" for h in range(4)] + [f"m.N200.layer1 head {h}" for h in range(2)]
    last, shared = heads["m.N200.layer0 head 3"], heads["m.N200.layer0 head 2"]
    assert all(t.shape == (1, 1, 150, 16) for head in heads.values() for t in (head.query, head.key, head.value))
    assert not torch.equal(last.key, heads["m.N200.layer0 head 1"].key)
    assert torch.equal(last.key, shared.key)
    assert last.fitted_on[0].shape == (1, 1, 90, 16) and heads["m.N200.layer1 head 0"].fitted_on[0].shape[2] == 200
    command = ["analyze", "--inputs", str(captured), "--heads", "1", "--keys", "16", "--temperatures", "1"]
    command += ["--size", "8", "--oracle", "false", "--error", "output", *files(tmp_path)]
    assert main(command) == 0
    found = table(tmp_path)
    assert {key[0] for key in found} == {"m.N200.layer0 head 0", "m.N200.layer1 head 0"}
    q, k, v = (2 * rand(n, 200, 16, seed=ord(p)).half().float()[None, :1] for n, p in ((4, "q"), (2, "k"), (2, "v")))
    out = sb.attention(q, k, v, sb.Routed(16, block_q=8, pools=2), sb.Centroid(8))
    exact = torch.softmax(q @ k.mT / 4, -1) @ v
    error = float((out - exact).norm() / exact.norm())
    assert float(found["m.N200.layer0 head 0", 1.0, "combined"]["output_error"]) == pytest.approx(error, rel=1e-3)


def test_images_are_put_in_hilbert_order_with_the_class_token_last(captured: Path) -> None:
    plain, ordered = (
        next(captured_heads(captured, ["m.N200.layer0"], None, 1, order)) for order in ("natural", "hilbert")
    )  # 200 tokens: 14 x 14 patches behind 4 others
    assert torch.equal(ordered.query[0, 0, -4:], plain.query[0, 0, :4])
    assert torch.equal(ordered.query[0, 0, :-4], plain.query[0, 0, 4 + hilbert_order(14, 14)])


def test_causal_heads_are_compared_with_causal_attention(captured: Path, tmp_path: Path) -> None:
    command = ["analyze", "--inputs", str(captured), "--heads", "1", "--causal", "true", "--support", "window"]
    command += ["--keys", "32", "--low_rank", "quadratic", "--size", "3", "--temperatures", "1", "--oracle", "false"]
    assert main([*command, "--entries", "m.N200.layer0", *files(tmp_path)]) == 0
    q, k, v = (2 * rand(n, 200, 16, seed=ord(p)).half().float()[None, :1] for n, p in ((4, "q"), (2, "k"), (2, "v")))
    statistics = sb.fit_statistics(*(rand(n, 90, 16, seed=9)[None, :1] for n in (4, 2)), 3)
    out = sb.attention(q, k, v, sb.Window(32), sb.Quadratic(3), is_causal=True, statistics=statistics)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    row = table(tmp_path)["m.N200.layer0 head 0", 1.0, "combined"]
    assert float(row["output_error"]) == pytest.approx(float((out - exact).norm() / exact.norm()), rel=1e-3)


# ---------------------------------------------------------------------------------------- errors that are no numbers


@pytest.fixture
def zero_and_plain(tmp_path: Path) -> Path:
    """A head whose values are all zero, as of one that was pruned, before an ordinary one."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {f"a.N200.layer0.{part}": rand(2, 200, 16, seed=ord(part)) for part in "qkv"}
    tensors["a.N200.layer0.v"][0] = 0
    save_file(tensors, tmp_path / "zero.safetensors")
    return tmp_path / "zero.safetensors"


def test_outputs_that_are_all_zero_are_met_without_error(
    zero_and_plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = ["--keys", "16", "--size", "8", "--temperatures", "1", "2", "--error", "output", *files(tmp_path)]
    assert main(["analyze", "--inputs", str(zero_and_plain), *few]) == 0
    errors = {key: float(row["output_error"]) for key, row in table(tmp_path).items()}
    for (head, _, _), error in errors.items():
        assert error == 0 if head.endswith("head 0") else 0 < error < 2
    mean = sum(error for (_, temperature, method), error in errors.items() if (temperature, method) == (1.0, "sparse"))
    assert f"{mean / 2:.4f}" in (out := capsys.readouterr().out) and "nan" not in out and "left out" not in out


def test_heads_whose_errors_are_no_numbers_are_named_and_left_out_of_the_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    measure = runner.measure

    def failing(head: Head, temperature: float, config: AnalyzeConfig) -> Iterator[Row]:
        for row in measure(head, temperature, config):
            is_bad = (head.name, row.method) == ("seed 1", "combined") and temperature in (1.0, 3.0)
            yield replace(row, matrix_error=math.nan) if is_bad else row

    command = ["analyze", *TINY[:-1], "2", "--temperatures", "0.2", "1", "3", "--oracle", "false", *files(tmp_path)]
    monkeypatch.setattr(runner, "measure", failing)
    assert main(command) == 0
    out, found = capsys.readouterr().out, table(tmp_path)
    line = "left out of the means, since the error of both together is no finite number: seed 1 of "
    assert out.count(line) == 1 and "at temperatures 1, 3" in out.split(line)[1].split("\n")[0]
    assert "nan" not in out and "nowhere err" not in out and "everywhere\n" not in out
    assert out.endswith(f"written: {tmp_path / 'out.png'}\n")
    of_rest = float(found["seed 0", 3.0, "sparse"]["matrix_error"])  # of the same heads as the others are
    (at_3,) = (line for line in out.split("\n") if line.split()[:1] == ["3"])
    assert at_3.split()[2] == f"{of_rest:.4f}"
    assert math.isnan(float(found["seed 1", 3.0, "combined"]["matrix_error"]))

    measured = []
    monkeypatch.setattr(runner, "measure", lambda *a: measured.append((a[0].name, a[1])) or measure(*a))
    assert main([*command, "--resume"]) == 0
    assert measured == [("seed 1", 1.0), ("seed 1", 3.0)], "by a version that errs there no more"
    assert "left out" not in capsys.readouterr().out


def test_where_no_error_is_a_number_nothing_is_concluded(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Scores beyond float32's range."""
    options = [*TINY, "--scale", "1e30", "--temperatures", "1", "3", "--oracle", "false"]
    assert main(["analyze", *options, *files(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "since the errors of sparse only, both together are no finite numbers: seed 0 of 20 clusters" in printed.out
    assert "errs by at most" not in printed.out and "nowhere" not in printed.out and "nan" not in printed.out
    assert (
        "no head has errors that are finite numbers; choose a smaller --scale or higher --temperatures" in printed.err
    )
    assert (tmp_path / "out.csv").exists() and not (tmp_path / "out.png").exists()


def test_weights_that_float64_cannot_hold_are_refused_by_head(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["analyze", *TINY, "--scale", "1e30", "--temperatures", "1e-300", *files(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert (
        "seed 0: expected scores that are finite numbers, got others at temperature 1e-300; choose a higher" in errors
    )


# ---------------------------------------------------------------------------------------- options


def test_options_come_from_a_yaml_file_and_the_command_line_counts_first(tmp_path: Path) -> None:
    from scatterbrain.cli.analyze import parse_analyze_config

    path = tmp_path / "options.yaml"
    path.write_text("keys: 24\nsize: 12\ntemperatures: [2, 0.5]\nsupport: window\n")
    config = parse_analyze_config(["--config", str(path), "--size", "10"])
    assert (config.keys, config.size, config.temperatures, config.support) == (24, 10, [0.5, 2.0], "window")


def test_the_paper_s_estimator_and_lists_of_single_queries_are_chosen_by_options() -> None:
    shape = Shape(1024, 1024, 64, 64)
    *_, combined, _ = AnalyzeConfig(support="lsh", keys=64, low_rank="favor").methods(shape)
    assert (combined.support, combined.low_rank) == sb.presets.paper()
    *_, combined, _ = AnalyzeConfig(block_q=1, keys=64, low_rank="quadratic").methods(shape)
    assert combined.support == sb.Routed(64, block_q=1, block_k=8) and combined.low_rank == sb.Quadratic(9, "input")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--support", "star"], "--support must be one of window, routed"),
        (["--low_rank", "star"], "--low_rank must be one of "),
        (["--low_rank", "features"], "--low_rank must be one of "),
        (["--error", "x"], "error"),
        (["--keys", "0"], "--keys must be at least 1, got 0"),
        (["--temperatures", "0"], "--temperatures must be one or more positive numbers"),
        (["--spread", "-1"], "--spread must be at least 0"),
        (["--scale", "0"], "--scale must be positive"),
        (["--entries", "a"], "--entries chooses from a file"),
        (["--token_order", "hilbert"], "--token_order is for images in a file"),
        (["--support", "window", "--pools", "2"], "--pools: window has none"),
        (["--causal", "true"], "causal"),
        (["--low_rank", "quadratic", "--size", "80"], "rank must be at most head_dim=64, got 80"),
        (["--tokens", "128"], "choose fewer --keys, a smaller --size or more --tokens"),
        (["--tokens", "9000"], "expected at most 8192 tokens, got 9000"),
        (["--csv", "null", "--resume"], "--resume goes on with the rows in a file"),
        (["--csv", "."], "--csv: expected a file to write, got ., which is a folder"),
        (["--png", "."], "--png: expected a file to write, got ., which is a folder"),
    ],
)
def test_bad_options_are_explained_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["analyze", *options])
    except SystemExit as stopped:
        code = stopped.code
    errors = capsys.readouterr().err
    assert code in (1, 2) and message in errors and errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["--csv", "qkv"], "--csv: expected a file other than that of --inputs, which it would replace, got qkv"),
        (["--png", "qkv"], "--png: expected a file other than that of --inputs"),
        (["--png", "folder/../qkv"], "--png: expected a file other than that of --inputs"),
        (["--png", "soft"], "--png: expected a file other than that of --inputs"),
        (["--csv", "hard"], "--csv: expected a file other than that of --inputs"),
        (["--csv", "options.yaml"], "--csv: expected a file other than that of --config"),
        (["--csv", "new", "--png", "new"], "--png: expected a file other than that of --csv"),
        (["--csv", "folder/new", "--png", "folder/../folder/new"], "--png: expected a file other than that of --csv"),
        (["--png", "analyze.csv"], "--png: expected a file other than that of --csv"),
        (["--csv", "new", "--png", "dangling"], "--png: expected a file other than that of --csv"),
    ],
)
def test_a_file_to_write_is_neither_one_that_is_read_nor_the_other(
    captured: Path,
    outputs: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("qkv").write_bytes(captured.read_bytes())
    Path("options.yaml").write_text("keys: 16\n")
    Path("folder").mkdir()
    Path("soft").symlink_to("qkv")
    Path("hard").hardlink_to("qkv")
    Path("dangling").symlink_to("new")
    before = sorted(path for path in Path().rglob("*"))
    monkeypatch.setattr(runner, "measure", lambda *a: pytest.fail("measured"))
    assert main(["analyze", "--config", "options.yaml", "--inputs", "qkv", "--temperatures", "1", *outputs]) == 1
    assert message in (errors := capsys.readouterr().err) and errors.count("\n") == 1
    assert Path("qkv").read_bytes() == captured.read_bytes() and sorted(Path().rglob("*")) == before


def test_entries_are_chosen_by_name_or_by_how_names_begin(captured: Path) -> None:
    names = ["m.N200.layer0", "m.N200.layer1"]
    assert AnalyzeConfig(inputs=captured, entries=["m.N200"]).entries == names
    assert AnalyzeConfig(inputs=captured, entries=[names[1], "m"]).entries == names[::-1]
    with pytest.raises(ValueError, match="m.N20 is not in"):
        AnalyzeConfig(inputs=captured, entries=["m.N20"])


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("k", lambda t: t.index_fill(1, torch.tensor([3]), torch.nan), "a.N90.k: expected finite numbers, got NaN"),
        ("v", lambda t: t[0], r"a.N90.v: expected a tensor (heads, tokens, head_dim) or"),
        ("k", lambda t: t[..., :5], "a.N90: expected as many heads of keys as of values"),
        ("q", lambda t: t[[0, 1, 1]], "got q, k and v of (3, 90, 8), (2, 90, 8), (2, 90, 8)"),
    ],
    ids=["no number", "dimensions", "widths", "heads"],
)
def test_an_entry_of_other_tensors_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture, part: str, change: Callable, message: str
) -> None:
    from safetensors.torch import save_file

    tensors = {f"a.N90.{name}": rand(2, 90, 8, seed=i) for i, name in enumerate("qkv")}
    tensors[f"a.N90.{part}"] = change(tensors[f"a.N90.{part}"]).contiguous()
    save_file(tensors, tmp_path / "qkv.safetensors")
    few = ["--keys", "16", "--size", "4", "--temperatures", "1", "--oracle", "false", *files(tmp_path)]
    assert main(["analyze", "--inputs", str(tmp_path / "qkv.safetensors"), *few]) == 1
    assert message in capsys.readouterr().err


def test_an_entry_that_the_file_lacks_is_named_with_those_it_has(captured: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["analyze", "--inputs", str(captured), "--entries", "m.N200.layer7"]) == 1
    assert "m.N200.layer7 is not in" in (errors := capsys.readouterr().err) and "m.N200.layer0, m.N200.layer1" in errors


def test_more_keys_than_tokens_leave_the_oracle_all_entries(tmp_path: Path) -> None:
    options = ["--support", "lsh", "--keys", "128", "--tokens", "100", "--low_rank", "favor", "--temperatures", "1"]
    assert main(["analyze", *options, "--draws", "1", *files(tmp_path)]) == 0
    oracle = table(tmp_path)["seed 0", 1.0, "oracle"]
    assert oracle["settings"].startswith("100 entries a row and rank ") and float(oracle["matrix_error"]) < 1e-3


def test_resume_tells_causal_rows_from_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = [*TINY, "--low_rank", "favor", "--support", "window", "--temperatures", "1", "--oracle", "false"]
    command = ["analyze", *options, *files(tmp_path)]
    assert main(command) == 0
    assert main([*command, "--causal", "true", "--resume"]) == 1
    assert "was measured with other options" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert main([*command, "--causal", "true"]) == 0
    assert main([*command, "--causal", "true", "--resume"]) == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        assert all(row["inputs"].endswith(", causal") for row in csv.DictReader(file))


@pytest.mark.parametrize(("kernel", "is_told"), [("quadratic", True), ("favor", False)])
def test_resume_takes_causal_rows_without_the_mark_where_their_methods_tell_them(
    tmp_path: Path, capsys: pytest.CaptureFixture, kernel: str, is_told: bool
) -> None:
    options = [*TINY, "--low_rank", kernel, "--support", "window", "--temperatures", "1", "--oracle", "false"]
    command = ["analyze", *options, *files(tmp_path), "--causal", "true"]
    assert main(command) == 0
    marked = (tmp_path / "out.csv").read_text()
    (tmp_path / "out.csv").write_text(marked.replace(", causal", ""))
    assert main([*command, "--resume"]) == (0 if is_told else 1)
    if is_told:
        assert (tmp_path / "out.csv").read_text() == marked
    else:
        errors = capsys.readouterr().err
        assert "do not say whether they are causal; leave --resume out to measure them anew" in errors
    assert main(command[:-2]) == 0
    assert main([*command, "--resume"]) == 1, "rows that are not causal"


def test_resume_goes_on_with_rows_of_the_same_content_alone(
    captured: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A file of that name in another folder may hold other tensors."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other" / captured.name
    other.parent.mkdir()
    save_file({name: -t for name, t in load_file(captured).items()}, other)
    command = ["analyze", "--temperatures", "1", "--entries", "m.N200.layer0", "--heads", "1", "--keys", "16"]
    command += ["--size", "8", "--oracle", "false", *files(tmp_path)]
    assert main([*command, "--inputs", str(captured)]) == 0
    measured = (tmp_path / "out.csv").read_text()
    digest = hashlib.sha256(captured.read_bytes()).hexdigest()[:12]
    assert measured.count(f"{captured.name}, 200 tokens, natural order, sha256 {digest}") == 3
    capsys.readouterr()
    assert main([*command, "--inputs", str(other), "--resume"]) == 1
    errors, now = capsys.readouterr().err, hashlib.sha256(other.read_bytes()).hexdigest()[:12]
    assert f"expected rows of {other}, whose content has sha256 {now}, got some of sha256 {digest}" in errors
    assert "leave --resume out to measure them anew" in errors and errors.count("\n") == 1
    assert (tmp_path / "out.csv").read_text() == measured
    same = tmp_path / "same" / captured.name
    same.parent.mkdir()
    same.write_bytes(captured.read_bytes())
    assert main([*command, "--inputs", str(same), "--resume"]) == 0
    assert (tmp_path / "out.csv").read_text() == measured


@pytest.mark.parametrize("causal", [[], ["--causal", "true", "--support", "window", "--low_rank", "favor"]])
def test_resume_refuses_rows_that_do_not_say_of_which_content_they_are(
    captured: Path, tmp_path: Path, capsys: pytest.CaptureFixture, causal: list[str]
) -> None:
    command = ["analyze", "--inputs", str(captured), "--temperatures", "1", "--entries", "m.N200.layer0", "--heads"]
    command += ["1", "--keys", "16", "--size", "8", "--oracle", "false", *causal, *files(tmp_path)]
    assert main(command) == 0
    measured = (tmp_path / "out.csv").read_text()
    for more in (", causal", ""):  # neither did the first versions write this
        older = re.sub(", sha256 [0-9a-f]{12}(, causal)?", more if causal else "", measured)
        assert older != measured
        (tmp_path / "out.csv").write_text(older)
        capsys.readouterr()
        assert main([*command, "--resume"]) == 1
        errors = capsys.readouterr().err
        assert "got some of an earlier version, which do not say of which content they are" in errors
        assert "leave --resume out to measure them anew, or give another --csv" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("option", [["--head_dim", "32"], ["--draws", "2"], ["--seed", "1"], ["--scale", "2"]])
def test_options_of_drawn_inputs_are_refused_beside_a_file(
    tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({f"a.N600.layer0.{part}": rand(2, 600, 64) for part in "qkv"}, tmp_path / "qkv.safetensors")
    command = ["analyze", "--inputs", str(tmp_path / "qkv.safetensors"), "--temperatures", "1", *files(tmp_path)]
    assert main([*command, *option]) == 1
    assert f"{option[0]} is of inputs that are drawn" in capsys.readouterr().err
