"""Results as tables, JSON and a picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import scatterbrain
from scatterbrain.bench.clock import clock_of
from scatterbrain.bench.config import BenchConfig
from scatterbrain.bench.inputs import digest_of
from scatterbrain.bench.measure import Row
from scatterbrain.json_text import json_text


def facts(config: BenchConfig) -> dict[str, object]:
    """What a figure depends on, besides the code."""
    return {
        "scatterbrain": scatterbrain.__version__,
        "torch": torch.__version__,
        "instruction_set": torch.ops.scatterbrain.instruction_set(),
        "machine": platform.machine(),
        "device": device_name(config),
        "threads": config.threads,
        "allocator": config.allocator,
        "clock": clock_of(config.on(), config.threads).name,
        "statistic": f"median of {config.repeats} interleaved repeats",
        "error": "relative Frobenius norm of the difference to exact attention in float32 on the same inputs",
    }


def device_name(config: BenchConfig) -> str:
    """Of a GPU that of the card."""
    return torch.cuda.get_device_name(config.on()) if config.on().type == "cuda" else "cpu"


# -------------------- tables


def tables(rows: list[Row], config: BenchConfig) -> str:
    """One table per kind of attention and direction: a line per method, a column per length."""
    about = facts(config)
    computed_by = f"instruction set {about['instruction_set']}" if about["device"] == "cpu" else about["device"]
    lines = [
        f"{about['clock']}, {about['statistic']}, {computed_by}, torch {about['torch']}",
        "ms of a call (times faster than sdpa); F: forward without gradients, F+B: forward and backward",
    ]
    for title, some in _groups(rows):
        lines += ["", title, *_table(some)]
    notes = sorted({f"{row.method} at {row.tokens} tokens: {row.note}" for row in rows if row.note})
    if notes:
        lines += ["", "not measured, or in part:", *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def _groups(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.direction} {row.setting().group()}", []).append(row)
    yield from groups.items()


def _table(rows: list[Row]) -> list[str]:
    lengths = sorted({row.tokens for row in rows})
    cells = {(row.method, row.tokens): row for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows))
    largest = lengths[-1]
    header = ["tokens", *map(str, lengths), f"error, {largest}", "bytes/token/head", "tokens/s"]
    body = []
    for method in methods:
        last = cells.get((method, largest))
        body.append(
            [
                method,
                *(_time(cells.get((method, n))) for n in lengths),
                "-" if last is None or last.error is None else f"{last.error:.4f}",
                "-"
                if last is None or last.bytes_per_token_and_head is None
                else f"{last.bytes_per_token_and_head:.0f}",
                "-" if last is None or last.tokens_per_second is None else f"{last.tokens_per_second:,.0f}",
            ]
        )
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in [header, *body]
    ]


def _time(row: Row | None) -> str:
    if row is None or row.seconds is None:
        return "-"
    milliseconds = row.seconds * 1e3
    digits = 3 if milliseconds < 1 else 2 if milliseconds < 10 else 1 if milliseconds < 1000 else 0
    faster = "" if row.times_faster is None else f" ({row.times_faster:.2f}x)"
    return f"{milliseconds:.{digits}f}{faster}"


# -------------------- JSON


def write_json(path: Path, rows: list[Row], config: BenchConfig, is_complete: bool) -> None:
    """All rows with the options and the facts. Written aside and moved, so that a reader never sees half of it."""
    content = {
        "facts": facts(config),
        "options": options(config),
        "complete": is_complete,
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json_text(content))
    os.replace(aside, path)


def options(config: BenchConfig) -> dict[str, object]:
    """The options that the rows depend on."""
    chosen = {k: v for k, v in asdict(config).items() if k not in ("json", "png", "resume")}
    if config.inputs is None:
        return chosen | {"inputs": None, "inputs_sha256": None}
    return chosen | {"inputs": str(config.inputs), "inputs_sha256": digest_of(config.inputs)}


def read_rows(path: Path, config: BenchConfig) -> list[Row]:
    """Rows that an interrupted run left in a file.

    Raises:
        ValueError: not such a file, or one that was measured with other options.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        rows, theirs = [Row(**row) for row in content["rows"]], content["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: {path} is not a file that scatterbrain bench wrote: {error}") from None
    mine = options(config)
    theirs = {"device": "cpu"} | theirs  # files of versions that had no other
    if config.inputs is not None:
        theirs["head_dim"] = mine["head_dim"]  # the file's own, whatever earlier versions wrote of it
    different = [name for name in mine if mine[name] != theirs.get(name)]
    if different == ["inputs_sha256"]:
        raise ValueError(_of_other_content(path, config, theirs.get("inputs_sha256"), mine["inputs_sha256"]))
    if different:
        raise ValueError(
            f"--resume: {path} was measured with other options, first {different[0]}: {theirs.get(different[0])!r}, "
            f"now {mine[different[0]]!r}; use the same, or another file"
        )
    return rows


def _of_other_content(path: Path, config: BenchConfig, theirs: str | None, mine: str) -> str:
    if theirs is None:
        why = f"{path} was measured on {config.inputs} by an earlier version, which does not say what that file held"
    else:
        why = f"{path}: {config.inputs} had other content then, sha256 {theirs}, now {mine}"
    return f"--resume: {why}; leave --resume out to measure anew, or give another --json"


# -------------------- picture


def draw(path: Path, rows: list[Row]) -> None:
    """For every table two panels: time against tokens on logarithmic axes; error against time at the most tokens."""
    from matplotlib.figure import Figure

    groups = [(title, [row for row in some if row.seconds]) for title, some in _groups(rows)]
    groups = [(title, some) for title, some in groups if some]
    if not groups:
        return
    figure = Figure(figsize=(11, 4 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False)
    methods = list(dict.fromkeys(row.method for row in rows))
    colours = {method: f"C{i % 10}" for i, method in enumerate(methods)}
    for (title, some), (left, right) in zip(groups, axes):
        _draw_times(left, some, colours)
        left.set_title(title, fontsize=10)
        largest = max(row.tokens for row in some)
        points = [row for row in some if row.tokens == largest and row.error is not None]
        for row in points:
            marker = "s" if row.method.startswith("torch-") else "o"
            right.plot(row.seconds * 1e3, row.error, marker, color=colours[row.method], label=row.method)
        right.set(xscale="log", xlabel="ms", ylabel="error against exact attention")
        right.set_title(f"{largest} tokens", fontsize=10)
        _label(right.xaxis)
        right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")


def _draw_times(axis: object, rows: list[Row], colours: dict[str, str]) -> None:
    for method in dict.fromkeys(row.method for row in rows):
        points = sorted((row.tokens, row.seconds * 1e3) for row in rows if row.method == method)
        style = "--" if method.startswith("torch-") else "-"
        axis.plot(*zip(*points), style, marker=".", color=colours[method], label=method)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
    lengths = sorted({row.tokens for row in rows})
    axis.set_xticks(lengths, [str(n) for n in lengths])
    axis.minorticks_off()
    _label(axis.yaxis)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _label(axis: object) -> None:
    """1, 2 and 5 of every decade as plain numbers, also where an axis spans less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
