"""``scatterbrain analyze [options]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scatterbrain.cli.command import HelpParser, asks_for_help, check_outputs, parse, readable_errors

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from scatterbrain.analysis.regimes.config import AnalyzeConfig

USAGE = (
    "scatterbrain analyze [--inputs FILE [--entries NAME ...]] [--support KIND --keys N] [--low_rank KIND] [options]"
)
DESCRIPTION = """\
Where does sparse attention suffice, where does low-rank attention, and what do both together give? Draws the error
against the temperature of the softmax and against the entropy of its rows, at equal cost: the pair of a support and a
low-rank kernel sets a number of multiply-adds per query, and each part alone gets as many keys, or features, as that
pays for. As oracle stands beside them the robust principal component analysis of the exact matrix of weights: the
nearest sum of a sparse and a low-rank matrix that alternation finds, with the pair's number of entries and features. It
reads all of the exact matrix, so no method reaches it; it says what the form allows.

  scatterbrain analyze                                     clustered queries and keys; some minutes on two cores
  scatterbrain analyze --clusters 8 --spread 1 --draws 1 --temperatures 0.2 1 5
  scatterbrain analyze --support lsh --low_rank favor --keys 64       the paper's estimator
  scatterbrain analyze --error output --oracle false --png output.png
  scatterbrain analyze --inputs qkv.safetensors --entries bert.N512.layer3 --heads 4
  scatterbrain analyze --inputs qkv.safetensors --token_order hilbert --csv vit.csv --png vit.png
  scatterbrain analyze --inputs lm.safetensors --causal true --support window --keys 64 --low_rank quadratic
  scatterbrain analyze --resume                            go on where Ctrl-C stopped it

How to read it: at low temperature a row looks at few keys (low entropy), and a list of them is nearly all; at high
temperature it looks at all keys alike, which a matrix of low rank says; in between neither part is enough. A model's
own heads are the points at temperature 1. The cost formula is in scatterbrain/analysis/cost.py.

A file has tensors ENTRY.q, ENTRY.k and ENTRY.v of (heads, tokens, head_dim), as sb.capture writes them; attention is
softmax(q k^T / sqrt(head_dim) / temperature) v. Whole matrices are compared, so time and memory grow with the square of
the tokens. Ctrl-C prints, draws and keeps the results so far."""


def analyze(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0 when measured to the end, 1 where no head has errors that are finite numbers, 130 after Ctrl-C.

    Raises:
        CommandError: with exit code 1, for bad input or a file that cannot be written.
    """
    with readable_errors():
        config = parse_analyze_config(arguments)
        from scatterbrain.analysis.regimes.runner import run

        return run(config)


def parse_analyze_config(arguments: Sequence[str]) -> AnalyzeConfig:
    """The options of a command line, and of the YAML file that ``--config`` names.

    Raises:
        ValueError: for a value out of range.
        CommandError: for a file to write that cannot be, or that another one would be lost to.
        SystemExit: with code 2, after a message that names the option, for an unknown one or a value of the wrong
            type; with code 0 after --help.
    """
    from scatterbrain.analysis.regimes.config import AnalyzeConfig

    if asks_for_help(arguments):
        parser = HelpParser("scatterbrain analyze", USAGE, DESCRIPTION)
        parser.add_argument("--config", metavar="FILE", help="Options from a YAML file; those behind it count first.")
        _add_options(parser, Path)
        parser.exit_with_help()
    from jsonargparse import ActionConfigFile, ArgumentParser
    from jsonargparse.typing import Path_fr

    parser = ArgumentParser(prog="scatterbrain analyze", usage=USAGE, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    _add_options(parser, Path_fr)
    chosen = parse(parser, arguments).as_dict()  # vars would have another name for keys
    files = chosen.pop("config") or []
    for name in ("inputs", "csv", "png"):
        chosen[name] = None if chosen[name] is None else Path(str(chosen[name]))
    config = AnalyzeConfig(**chosen)
    read = [("--config", Path(str(file))) for file in files if file is not None]  # None: options as YAML, in no file
    check_outputs(config, "csv", "png", reads=[("--inputs", config.inputs), *read])
    return config


def _add_options(parser: HelpParser | ArgumentParser, readable_file: type) -> None:
    from scatterbrain.analysis.regimes.config import ERRORS, TEMPERATURES, TOKEN_ORDERS

    add = parser.add_argument
    add(
        "--inputs",
        type=readable_file | None,
        metavar="FILE",
        help="Captured queries, keys and values: a safetensors file.",
    )
    add("--entries", nargs="+", metavar="NAME", help="Entries of the file, or how their names begin; default all.")
    add("--heads", type=int | None, help="First heads of each entry; default all.")
    add("--token_order", default="natural", choices=list(TOKEN_ORDERS), help="hilbert: patches of a square image.")
    add(
        "--tokens",
        type=int | None,
        metavar="N",
        help="Tokens: of the clustered inputs, default 1024; first ones of a file.",
    )
    add("--head_dim", type=int, default=64, help="Width of the clustered queries, keys and values.")
    add("--clusters", type=int, default=32, help="Centres of the clustered inputs.")
    add(
        "--spread", type=float, default=0.5, help="Distance of a token from its centre, over that of the centre from 0."
    )
    add("--scale", type=float, default=1.0, help="Factor of the clustered queries and keys.")
    add("--run", type=int, default=16, help="Neighbouring tokens that share a centre.")
    add("--draws", type=int, default=3, help="Clustered heads, with seeds from --seed on.")
    add("--seed", type=int, default=0, help="Of the first clustered head.")
    add(
        "--temperatures",
        type=float,
        nargs="+",
        metavar="T",
        default=list(TEMPERATURES),
        help="Divide the scores.",
    )
    add("--causal", type=bool, default=False, help="A query sees the keys up to its own.")
    add("--support", default="routed", metavar="KIND", help="routed, window, lsh or a registered support of your own.")
    add("--keys", type=int, default=128, metavar="N", help="Keys per query of the pair.")
    add("--block_q", type=int | None, help="Queries that share a list; default 8 for routed.")
    add("--pools", type=int | None, help="Mean queries that choose a routed list; default 2.")
    add(
        "--low_rank",
        default="centroid",
        metavar="KIND",
        help="centroid, quadratic, favor or a registered one of your own.",
    )
    add(
        "--size", type=int | None, metavar="N", help="Clusters, rank or features of the pair; default the kernel's own."
    )
    add("--oracle", type=bool, default=True, help="Robust principal component analysis, which takes most of the time.")
    add("--error", default="matrix", choices=list(ERRORS), help="What is drawn; the CSV has both.")
    add("--enough", type=float, default=0.1, help="Error that counts as near in the picture and in the summary.")
    add("--csv", type=str | None, default="analyze.csv", metavar="FILE", help="A row per head, temperature and method.")
    add("--png", type=str | None, default="analyze.png", metavar="FILE", help="The picture.")
    add("--resume", nargs="?", type=bool, const=True, default=False, help="Keep the rows that --csv FILE already has.")
