"""Measures every head at every temperature, keeps the files up to date, and survives an interruption."""

from __future__ import annotations

import sys
from dataclasses import replace

from tqdm import tqdm

from scatterbrain.analysis.regimes.config import CAUSAL, AnalyzeConfig
from scatterbrain.analysis.regimes.figure import draw
from scatterbrain.analysis.regimes.inputs import SHA256, Head
from scatterbrain.analysis.regimes.measure import Row, measure, shape_of
from scatterbrain.analysis.regimes.table import points, read_csv, summary, write_csv

INTERRUPTED = 130  # 128 and the number of SIGINT


def run(config: AnalyzeConfig) -> int:
    """Measures, prints the table and writes the files.

    Returns:
        0; 1 where no head has errors that are finite numbers; 130 after Ctrl-C, with what was measured until then
        printed and written.

    Raises:
        ValueError, OSError: ``--resume`` with a file of other options; a file that cannot be read or written.
        ModuleNotFoundError: matplotlib is missing and a picture was asked for.
    """
    if config.png is not None:
        import matplotlib  # noqa: F401  (before minutes of measuring, not after)
    heads = list(config.all_heads())
    rows = _rows_so_far(config, heads) if config.resume else []
    if config.csv is not None:
        write_csv(config.csv, rows)
    rows, is_complete = _measure_all(config, heads, rows)
    print(summary(rows, config.error, config.enough))
    if config.csv is not None:
        print(f"written: {config.csv}")
    has_points = bool(points(rows, config.error))
    if config.png is not None and has_points:
        draw(config.png, rows, config.error, config.enough)
        print(f"written: {config.png}")
    if not is_complete:
        print("stopped before the end: these are the results so far", file=sys.stderr)
        return INTERRUPTED
    if not has_points:
        print(
            "no head has errors that are finite numbers; choose "
            + ("a smaller --scale or " if config.inputs is None else "")
            + "higher --temperatures",
            file=sys.stderr,
        )
        return 1
    return 0


def _measure_all(config: AnalyzeConfig, heads: list[Head], rows: list[Row]) -> tuple[list[Row], bool]:
    done = {(row.inputs, row.head, row.temperature) for row in rows}
    grid = [(head, temperature) for temperature in config.temperatures for head in heads]
    with tqdm(total=len(grid), unit="point", dynamic_ncols=True, leave=False, disable=None) as bar:
        try:
            for head, temperature in grid:
                bar.set_description(f"temperature {temperature:g}, {head.name}")
                if (head.source, head.name, temperature) not in done:
                    rows = [*rows, *measure(head, temperature, config)]
                    if config.csv is not None:
                        write_csv(config.csv, rows)
                bar.update()
        except KeyboardInterrupt:
            return rows, False
    return rows, True


def _marked(rows: list[Row], config: AnalyzeConfig, heads: list[Head]) -> list[Row]:
    """The rows with the mark of causal inputs, which earlier versions did not write.

    Raises:
        ValueError: they may be of either kind.
    """
    by_place = {(head.source, head.name): head for head in heads}
    found = []
    for row in rows:
        marked = replace(row, inputs=row.inputs + CAUSAL)
        head = by_place.get((marked.inputs, marked.head))
        if head is not None and not config.methods_say_causal(shape_of(head)):
            raise ValueError(
                f"--resume: {config.csv} was measured with other options, or by an earlier version, whose rows of "
                f"{row.inputs} do not say whether they are causal; leave --resume out to measure them anew, or give "
                "another file"
            )
        found.append(row if head is None else marked)
    return found


def _check_content(rows: list[Row], config: AnalyzeConfig, heads: list[Head]) -> None:
    """
    Raises:
        ValueError: rows are of a file of the same name with other content, or do not say of which.
    """
    known = {}
    for head in heads:
        name, digest = _name_and_digest(head.source)
        known[name] = digest
    for row in rows:
        name, digest = _name_and_digest(row.inputs)
        if name not in known or digest == known[name]:
            continue  # rows of anything else are refused with the other options
        theirs = f"sha256 {digest}" if digest else "an earlier version, which do not say of which content they are"
        raise ValueError(
            f"--resume: {config.csv}: expected rows of {config.inputs}, whose content has sha256 {known[name]}, got "
            f"some of {theirs}; leave --resume out to measure them anew, or give another --csv"
        )


def _name_and_digest(source: str) -> tuple[str, str]:
    """Of the source of captured heads, whether or not it says that they are causal."""
    name, _, digest = source.removesuffix(CAUSAL).partition(SHA256)
    return name, digest


def _rows_so_far(config: AnalyzeConfig, heads: list[Head]) -> list[Row]:
    """Those of an interrupted run with the same heads and methods; a point that lacks a method is measured again, and
    so is one with an error that is no finite number: it may be of an earlier version.

    Raises:
        ValueError: not such a file, or one of other inputs or methods.
    """
    rows = read_csv(config.csv)
    if config.inputs is not None:
        _check_content(rows, config, heads)
    if config.causal:
        rows = _marked(rows, config, heads)
    wanted = {
        (head.source, head.name): {(m.name, m.settings, m.multiply_adds) for m in config.methods(shape_of(head))}
        for head in heads
    }
    found: dict[tuple[str, str, float], set[tuple[str, str, float | None]]] = {}
    for row in rows:
        methods, method = wanted.get((row.inputs, row.head)), (row.method, row.settings, row.multiply_adds)
        if methods is None or method not in methods or row.temperature not in config.temperatures:
            raise ValueError(
                f"--resume: {config.csv} was measured with other options: it has {row.method} ({row.settings}) on "
                f"{row.inputs}, {row.head}, at temperature {row.temperature:g}; use the same options, or another file"
            )
        point = found.setdefault((row.inputs, row.head, row.temperature), set())
        if row.is_finite():
            point.add(method)
    return [row for row in rows if found[row.inputs, row.head, row.temperature] == wanted[row.inputs, row.head]]
