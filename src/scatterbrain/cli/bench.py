"""``scatterbrain bench [--suite NAME] [options]``."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scatterbrain.cli.command import HelpParser, asks_for_help, check_outputs, parse, readable_errors

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from scatterbrain.bench.config import BenchConfig

USAGE = "scatterbrain bench [--suite NAME] [--lengths N ...] [--methods NAME ...] [options]"
DESCRIPTION = """\
Times attention forward (F) and forward + backward (F+B) over sequence lengths, side by side in one process with
torch's F.scaled_dot_product_attention and with sliding window, Performer and clusters written in plain torch. Beside
each time stand its error against exact attention on the same inputs, and its memory.

  scatterbrain bench                                       the suite "quick": about two minutes on two cores
  scatterbrain bench --suite standard --json out.json --png out.png
  scatterbrain bench --lengths 512 2048 --methods sdpa window-64 routed-128 --causal both
  scatterbrain bench --suite short --repeats 30            what a call costs on few tokens
  scatterbrain bench --dtypes float32 bfloat16 --directions F+B --threads 2
  scatterbrain bench --device cuda --dtypes bfloat16 --batch 16
  scatterbrain bench --inputs qkv.safetensors --entry bert.N512.layer3 --lengths 512 --heads 4
  scatterbrain bench --suite standard --json out.json --resume        go on where Ctrl-C stopped it

suites:
{suites}

methods:
{methods}

Times are medians of interleaved repeats: every method once, then all again in another order. With one thread they are
CPU time of that thread, so that other programs do not count; with more, wall time. They include Python, autograd,
projections and routing. Statistics of the low-rank kernel are fitted beforehand, on other tokens of the same kind.
Memory that a method frees stays with the process (glibc), so that the next method does not pay for new pages;
--allocator system leaves that to the C library, as in a program with default settings.
On a GPU times are between CUDA events, memory is what torch's allocator counts, and calls take copies of the inputs in
turn, so many that none is in the second-level cache.
Random inputs have topics, smooth neighbourhoods and a decaying spectrum; for real ones give --inputs.
Ctrl-C prints and writes the results so far."""


def bench(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0 when measured to the end, 130 after Ctrl-C.

    Raises:
        CommandError: with exit code 1, for bad input or a file that cannot be written.
    """
    with readable_errors():
        config = parse_bench_config(arguments)
        check_outputs(config, "json", "png", reads=[("--inputs", config.inputs)])
        from scatterbrain.bench.runner import run

        return run(config)


def parse_bench_config(arguments: Sequence[str]) -> BenchConfig:
    """The options of a command line.

    Raises:
        ValueError: for a value out of range.
        SystemExit: with code 2, after a message that names the option, for an unknown one or a value of the wrong
            type; with code 0 after --help.
    """
    from scatterbrain.bench import methods
    from scatterbrain.bench.config import SUITES, BenchConfig

    suites = "\n".join(f"  {name:<10}{suite.summary}" for name, suite in SUITES.items())
    _, names = inspect.cleandoc(methods.__doc__).split("\n\n", 1)
    description = DESCRIPTION.format(suites=suites, methods=textwrap.indent(names, "  "))
    if asks_for_help(arguments):
        parser = HelpParser("scatterbrain bench", USAGE, description)
        _add_options(parser, Path)
        parser.exit_with_help()
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import Path_fr

    parser = ArgumentParser(prog="scatterbrain bench", usage=USAGE, exit_on_error=False)
    _add_options(parser, Path_fr)
    chosen = vars(parse(parser, arguments))
    for name in ("inputs", "json", "png"):
        chosen[name] = None if chosen[name] is None else Path(str(chosen[name]))
    return BenchConfig(**chosen)


def _add_options(parser: HelpParser | ArgumentParser, readable_file: type) -> None:
    from scatterbrain.bench.allocator import ALLOCATORS
    from scatterbrain.bench.config import DEFAULT_SUITE, DIRECTIONS, DTYPES, SUITES

    add = parser.add_argument
    add("--suite", default=DEFAULT_SUITE, choices=list(SUITES), help="Lengths and methods.")
    add("--lengths", type=int, nargs="+", metavar="N", help="Tokens, in place of the suite's.")
    add("--methods", nargs="+", metavar="NAME", help="Methods, in place of the suite's; names as above.")
    add("--causal", default="suite", choices=["suite", "no", "yes", "both"], help="Kinds of attention.")
    add("--dtypes", nargs="+", default=["float32"], metavar="TYPE", help=f"Some of {', '.join(DTYPES)}.")
    add("--directions", nargs="+", default=list(DIRECTIONS), metavar="F", help="F, F+B or both.")
    add("--heads", type=int, help="Query heads, in place of the suite's 4 (1 for 16384 tokens in standard).")
    add("--kv_heads", type=int, help="Key/value heads; default as many as query heads.")
    add("--head_dim", type=int, default=64, help="Width of a head.")
    add("--batch", type=int, default=1, help="Batch rows.")
    add("--rank", type=int, default=9, help="Rank of the quadratic kernel.")
    add("--repeats", type=int, default=5, help="Interleaved repeats, of which the median counts.")
    add("--threads", type=int, default=1, help="Threads of torch.")
    add("--device", default="cpu", metavar="DEVICE", help="cpu or cuda: what computes.")
    add("--seed", type=int, default=0, help="Of the random inputs.")
    add("--inputs", type=readable_file | None, metavar="FILE", help="Queries, keys and values: a safetensors file.")
    add("--entry", type=str | None, help="Entry of the file: tensors ENTRY.q, ENTRY.k, ENTRY.v. Default the first.")
    add("--memory", type=bool, default=True, help="Measure peak memory, in a process of its own.")
    add("--allocator", default="keep", choices=list(ALLOCATORS), help="Whether freed memory is kept.")
    add("--json", type=str | None, metavar="FILE", help="Write all results there, after every length.")
    add("--png", type=str | None, metavar="FILE", help="Draw time against tokens and error against time.")
    add(
        "--resume",
        nargs="?",
        type=bool,
        const=True,
        default=False,
        help="Keep the results that --json FILE already has.",
    )
