"""Runs a grid of settings, keeps files up to date, and survives an interruption."""

from __future__ import annotations

import sys

import torch
from tqdm import tqdm

from scatterbrain.bench.allocator import keep_freed_memory
from scatterbrain.bench.config import BenchConfig
from scatterbrain.bench.measure import Measurement, Row
from scatterbrain.bench.memory import peak_memory
from scatterbrain.bench.report import draw, read_rows, tables, write_json

STOPPED = "stopped"  # how notes of rows begin that --resume measures again
INTERRUPTED = 130  # 128 and the number of SIGINT


def run(config: BenchConfig) -> int:
    """Measures, prints the tables and writes the files.

    Returns:
        0; 1 where nothing could be measured; 130 after Ctrl-C, with what was measured until then printed and written.

    Raises:
        ValueError, OSError: ``--resume`` with a file of other options; a file that cannot be read or written.
        ModuleNotFoundError: matplotlib is missing and a picture was asked for.
    """
    if config.png is not None:
        import matplotlib  # noqa: F401  (before minutes of measuring, not after)
    rows = read_rows(config.json, config) if config.resume else []
    if config.json is not None:
        write_json(config.json, rows, config, is_complete=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    if config.allocator == "keep":
        keep_freed_memory()
    interrupted = False
    try:
        rows = _measure_all(config, rows)
    except _Stopped as stopped:
        rows, interrupted = stopped.rows, True
    finally:
        torch.set_num_threads(threads)
    print(tables(rows, config), end="\n\n")
    if config.json is not None:
        # Settings that were cut short are measured again by --resume.
        write_json(config.json, rows, config, is_complete=not interrupted)
        print(f"written: {config.json}")
    if config.png is not None:
        draw(config.png, rows)
        print(f"written: {config.png}")
    if interrupted:
        print("stopped before the end: these are the results so far", file=sys.stderr)
        return INTERRUPTED
    return 0 if any(row.seconds is not None for row in rows) else 1


class _Stopped(Exception):
    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.rows = rows


def _measure_all(config: BenchConfig, rows: list[Row]) -> list[Row]:
    grid = config.settings()
    steps = sum(len(methods) * len(config.directions) * config.repeats for _, methods in grid)
    memory = peak_memory(config) if config.memory else None
    current: Measurement | None = None
    rows, told = list(rows), False
    with tqdm(total=steps, unit="step", dynamic_ncols=True, leave=False, disable=None) as bar:
        try:
            for setting, methods in grid:
                per_setting = len(methods) * len(config.directions) * config.repeats
                bar.set_description(f"{setting.tokens} tokens")
                if _is_done(rows, setting, methods, config):
                    bar.update(per_setting)
                    continue
                current = Measurement(config, setting, methods)
                if not told:
                    bar.write(f"statistics fitted on {current.fitted_on}")
                    told = True
                _follow(current, bar, per_setting)
                for row in current.rows.values():
                    if memory is not None and row.seconds is not None:
                        bar.set_postfix_str(f"{row.method} {row.direction}: memory")
                        memory.fill(row)
                rows += current.rows.values()
                current = None
                if config.json is not None:
                    write_json(config.json, rows, config, is_complete=False)
        except KeyboardInterrupt:
            cut_short = [row for row in current.rows.values() if row.seconds is not None] if current else []
            for row in cut_short:
                if row.repeats < config.repeats:
                    row.note = row.note or f"{STOPPED} after {row.repeats} of {config.repeats} repeats"
                elif memory is not None and memory.reason is None and row.peak_bytes is None:
                    row.note = row.note or f"{STOPPED} before its memory was measured"
            raise _Stopped(rows + cut_short) from None
        finally:
            if memory is not None:
                memory.close()
    if memory is not None and memory.reason:
        print(memory.reason)
    return rows


def _follow(measurement: Measurement, bar: tqdm, total: int) -> None:
    """The bar counts timed samples; what methods that cannot run have none of is added at the end."""
    before = bar.n
    for what in measurement.run():
        bar.set_postfix_str(what)
        done = sum(map(len, measurement.samples.values()))
        bar.update(before + done - bar.n)
    bar.update(before + total - bar.n)


def _is_done(rows: list[Row], setting: object, methods: list[str], config: BenchConfig) -> bool:
    """Whether an earlier run has every row of a setting, each with all that is measured of it or a reason."""
    mine = [r for r in rows if _same(r, setting, config)]
    whole = (r for r in mine if (r.repeats == config.repeats or r.seconds is None) and not r.note.startswith(STOPPED))
    found = {(r.method, r.direction) for r in whole}
    complete = found >= {(m, d) for m in methods for d in config.directions}
    if not complete:
        for row in mine:
            rows.remove(row)
    return complete


def _same(row: Row, setting: object, config: BenchConfig) -> bool:
    """Heads and widths of a file are known only when it is read."""
    if config.inputs is not None:
        return (row.tokens, row.dtype, row.is_causal) == (setting.tokens, setting.dtype, setting.is_causal)
    return row.setting() == setting
