"""Rows as CSV, and what they say in a few lines."""

from __future__ import annotations

import csv
import io
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean

from scatterbrain.analysis.regimes.measure import Row

NAMES = {
    "sparse": "sparse only",
    "low-rank": "low-rank only",
    "combined": "both together",
    "oracle": "robust PCA (oracle)",
}
WORSE = 1e-4  # a larger error than this difference counts as one
HEADER = [field.name for field in fields(Row)]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Written aside and moved, so that a reader never sees half of it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, HEADER, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in asdict(row).items()} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text.getvalue())
    os.replace(aside, path)


def read_csv(path: Path) -> list[Row]:
    """The rows of a file; none where there is no such file.

    Raises:
        ValueError: not a file of this kind.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != HEADER:
                raise ValueError(f"expected the columns {', '.join(HEADER)}, got {', '.join(reader.fieldnames or [])}")
            return [_row(line) for line in reader]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"--resume: {path} is not a file that scatterbrain analyze wrote: {error}") from None


def _row(line: dict[str, str]) -> Row:
    text = {name: line[name] for name in ("inputs", "head", "method", "settings")}
    numbers = {name: float(line[name]) for name in ("temperature", "entropy", "matrix_error", "output_error")}
    return Row(**text, **numbers, multiply_adds=float(line["multiply_adds"]) if line["multiply_adds"] else None)


# -------------------- summary


def with_finite_errors(rows: Sequence[Row], kind: str) -> list[Row]:
    """Without heads at temperatures at which a method's error is no finite number: of all methods, so that means are
    over the same heads."""
    without = {(row.inputs, row.head, row.temperature) for row in rows if not math.isfinite(row.error(kind))}
    return [row for row in rows if (row.inputs, row.head, row.temperature) not in without]


def left_out(rows: Sequence[Row], kind: str) -> list[str]:
    """A line for each head that :func:`with_finite_errors` lacks at some temperature."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if not math.isfinite(row.error(kind)):
            found[row.inputs, row.head].append(row)
    lines = []
    for (inputs, head), some in found.items():
        methods = [label for name, label in NAMES.items() if any(row.method == name for row in some)]
        one, *more = (f"{temperature:g}" for temperature in sorted({row.temperature for row in some}))
        what = "error of {} is no finite number" if len(methods) == 1 else "errors of {} are no finite numbers"
        lines.append(
            f"left out of the means, since the {what.format(', '.join(methods))}: {head} of {inputs}, at "
            f"{'temperatures' if more else 'temperature'} {', '.join([one, *more])}"
        )
    return lines


@dataclass(frozen=True)
class Point:
    """Means over some heads, the errors by method, all of them finite."""

    temperature: float
    entropy: float
    errors: dict[str, float]


def points(rows: Sequence[Row], kind: str) -> list[Point]:
    """One for each temperature, in ascending order."""
    return _means(with_finite_errors(rows, kind), kind, lambda row: row.temperature)


def points_by_entropy(rows: Sequence[Row], kind: str, bins: int = 14) -> list[Point]:
    """One for each of ``bins`` equal steps of entropy that has a head, in ascending order."""
    rows = with_finite_errors(rows, kind)
    least = min((row.entropy for row in rows), default=0.0)
    step = (max((row.entropy for row in rows), default=0.0) - least) / bins or 1.0
    return _means(rows, kind, lambda row: min(int((row.entropy - least) / step), bins - 1))


def _means(rows: Sequence[Row], kind: str, group: Callable[[Row], float]) -> list[Point]:
    groups: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        groups[group(row)].append(row)
    found = []
    for _, some in sorted(groups.items()):
        errors: dict[str, list[float]] = defaultdict(list)
        for row in some:
            errors[row.method].append(row.error(kind))
        means = {name: fmean(errors[name]) for name in NAMES if name in errors}
        found.append(Point(fmean(row.temperature for row in some), fmean(row.entropy for row in some), means))
    return found


def summary(rows: Sequence[Row], kind: str, enough: float) -> str:
    """A table of the temperatures, and the regimes in words."""
    if not rows:
        return "nothing was measured"
    some, without = points(rows, kind), left_out(rows, kind)
    if not some:
        return "\n".join([*without, "", *settings_of(rows)])
    methods = [name for name in NAMES if any(name in point.errors for point in some)]
    heads = len({(row.inputs, row.head) for row in with_finite_errors(rows, kind)})
    lines = [
        f"{', '.join(sorted({row.inputs for row in rows}))}; mean over {heads} {'heads' if heads > 1 else 'head'}",
        f"error of the {kind}, relative Frobenius norm",
        "",
    ]
    table = [["temperature", "entropy", *(NAMES[name] for name in methods)]]
    for p in some:
        errors = (f"{p.errors[name]:.4f}" if name in p.errors else "-" for name in methods)
        table.append([f"{p.temperature:g}", f"{p.entropy:.2f}", *errors])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in table]
    if without:
        lines += ["", *without]
    return "\n".join([*lines, "", *settings_of(rows), "", *regimes(some, enough, of_all=not without)])


def settings_of(rows: Sequence[Row]) -> list[str]:
    """What each method is, and what it costs; several where heads differ in shape."""
    lines = []
    for name, label in NAMES.items():
        for settings, spent in dict.fromkeys((r.settings, r.multiply_adds) for r in rows if r.method == name):
            lines.append(f"{label}: {settings}" + ("" if spent is None else f", {spent:,.0f} multiply-adds per query"))
    return lines


def band(some: Sequence[Point], name: str, enough: float) -> list[float]:
    """The temperatures at which a method's error is at most ``enough``."""
    return [p.temperature for p in some if p.errors.get(name, float("inf")) <= enough]


def regimes(some: Sequence[Point], enough: float, of_all: bool) -> list[str]:
    """In words. What is not ``of_all`` says so: of heads that were left out nothing is known."""
    lines, rest = [], "" if of_all else ", of what was not left out"
    for name in ("sparse", "low-rank", "combined"):
        temperatures = band(some, name, enough)
        where = f"at temperatures of {temperatures[0]:g} to {temperatures[-1]:g}" if temperatures else "nowhere"
        if len(temperatures) == len(some):
            where = "everywhere"
        lines.append(f"{NAMES[name]} errs by at most {enough:g} {where}{rest}")
    worse = [p for p in some if p.errors["combined"] > min(p.errors["sparse"], p.errors["low-rank"]) + WORSE]
    if not worse and not of_all:
        better = f"at most {WORSE:g} more than the better part alone"
        return [*lines, f"both together err by {better}{rest}"]
    if not worse:
        return [*lines, f"both together nowhere err by more than {WORSE:g} more than the better part alone"]
    most = max(worse, key=lambda p: p.errors["combined"] - min(p.errors["sparse"], p.errors["low-rank"]))
    best = min(most.errors["sparse"], most.errors["low-rank"])
    return [
        *lines,
        f"both together err more than the better part alone at {len(worse)} of {len(some)} temperatures, most at "
        f"{most.temperature:g}: {most.errors['combined']:.4f} in place of {best:.4f}{rest}",
    ]
