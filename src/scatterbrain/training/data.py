"""Bytes of a text file, a folder or the Python standard library: reading, splitting and batches."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from scatterbrain.macos_files import AnyPath, without_macos_files
from scatterbrain.training.config import DataConfig


def read_corpus(config: DataConfig) -> tuple[Tensor, Tensor]:
    """Reads the text and splits it.

    The files are ordered by a hash of their path below the folder and joined by newlines; the last
    ``validation_fraction`` of the bytes are the validation part. So the split depends on the files and the fraction
    alone, mixes folders, and works for a single file too.

    Returns:
        The training bytes and the validation bytes, uint8 (bytes,).

    Raises:
        ValueError: if the path does not exist, or nothing there matches the glob.
    """
    files = find_files(config)
    corpus = b"\n".join(path.read_bytes() for path in files)
    tokens = torch.frombuffer(bytearray(corpus), dtype=torch.uint8) if corpus else torch.empty(0, dtype=torch.uint8)
    boundary = tokens.numel() - round(tokens.numel() * config.validation_fraction)
    return tokens[:boundary], tokens[boundary:]


def find_files(config: DataConfig) -> list[Path]:
    """The files of the corpus in the order of a hash of their path below the folder.

    Raises:
        ValueError: if the path does not exist, the glob is no pattern below it, or nothing there matches.
    """
    root = corpus_root(config)
    if root.is_file():
        return [root]
    return kept_files(root, files_below(root, config.glob), config)


def kept_files(root: Path, names: list[Path], config: DataConfig) -> list[Path]:
    """Of the files that match those outside ``data.exclude``, in the order of :func:`find_files`.

    Raises:
        ValueError: if there are none.
    """
    names = outside_excluded(names, config.exclude)
    if not names:
        raise ValueError(
            f"data.path: no file under {root} matches data.glob {config.glob!r} outside data.exclude "
            f"{list(config.exclude)}; name the files with data.glob, such as '*.txt'"
        )
    return [root / name for name in sorted(names, key=lambda name: hash_of_name(name.as_posix()))]


def files_below(root: Path, glob: str) -> list[Path]:
    """Paths below a folder of the files that match, those in excluded folders too.

    Raises:
        ValueError: the glob is no pattern below a folder.
    """
    try:
        return without_macos_files(path.relative_to(root) for path in root.rglob(glob) if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"data.glob: expected a pattern of file names below data.path, such as '*.txt', got {glob!r}: {error}"
        ) from error


def outside_excluded(names: Iterable[AnyPath], exclude: Iterable[str]) -> list[AnyPath]:
    """The paths that no excluded folder is part of."""
    excluded = set(exclude)
    return [name for name in names if not excluded.intersection(name.parts[:-1])]


def hash_of_name(name: str) -> bytes:
    """Of a path with "/" between its parts. File names need not be text: Python reads bytes that are none as code
    points that UTF-8 does not have, which count as they are."""
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


def corpus_root(config: DataConfig) -> Path:
    """The folder or file that ``data.path`` means.

    Raises:
        ValueError: if it does not exist.
    """
    root = Path(sysconfig.get_path("stdlib")) if config.path == "stdlib" else Path(config.path).expanduser()
    if not root.is_file() and not root.is_dir():
        raise ValueError(
            f"data.path: expected a text file, a folder or 'stdlib', got {config.path!r}, which does not exist"
        )
    return root


class Batches:
    """Endless shuffled batches of sequences. A batch is a function of its number, so a checkpoint needs no data state.

    Every pass cuts the tokens into consecutive sequences from a random offset and visits them in a random order; both
    are drawn from the seed and the number of the pass.

    Args:
        tokens: Integers (tokens,), such as bytes.
        context: Tokens per sequence. A sequence has one more, the last target.
        batch: Sequences per batch.
        seed: Of offsets and orders.
        name: Of the part, in errors.
        unit: What a token is, in errors.
    """

    def __init__(
        self, tokens: Tensor, context: int, batch: int, seed: int, name: str = "training", unit: str = "bytes"
    ) -> None:
        needed = 2 * context + 1
        if tokens.numel() < needed:
            raise ValueError(
                f"data.path: the {name} part has {tokens.numel()} {unit}, and train.context {context} needs at least "
                f"{needed}; use more text, a shorter context or another data.validation_fraction"
            )
        self.tokens, self.context, self.batch, self.seed = tokens, context, batch, seed
        # The offset takes up to context - 1 bytes, and every pass must have the same number of sequences.
        self.sequences_per_pass = tokens.numel() // context - 1
        self._pass_number = -1

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of batch ``number``, int64 (batch, context)."""
        starts = [self._start(number * self.batch + row) for row in range(self.batch)]
        rows = torch.stack([self.tokens[start : start + self.context + 1] for start in starts]).long()
        return rows[:, :-1], rows[:, 1:]

    def _start(self, sequence: int) -> int:
        pass_number, index = divmod(sequence, self.sequences_per_pass)
        if pass_number != self._pass_number:
            digest = hashlib.sha256(f"{self.seed} {pass_number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            self._offset = int(torch.randint(self.context, (), generator=generator))
            self._order = torch.randperm(self.sequences_per_pass, generator=generator)
            self._pass_number = pass_number
        return self._offset + int(self._order[index]) * self.context


class GrowingBatches:
    """Batches whose sequences grow while a run goes on. Shorter ones are more in a batch, so that a batch has about as
    many tokens. Each is a function of its number and of the share of the run that is done.

    Args:
        tokens: Integers (tokens,), such as bytes.
        context: Tokens of the longest sequence.
        batch: Sequences of a batch of the longest.
        seed: Of offsets and orders.
        tokens_at: Tokens of a sequence when a share of the run is done.
        unit: What a token is, in errors.
    """

    def __init__(
        self,
        tokens: Tensor,
        context: int,
        batch: int,
        seed: int,
        tokens_at: Callable[[float], int],
        unit: str = "bytes",
    ) -> None:
        self.tokens, self.context, self.batch, self.seed, self.unit = tokens, context, batch, seed, unit
        self.tokens_at = tokens_at
        self._batches = {context: Batches(tokens, context, batch, seed, unit=unit)}

    def at(self, number: int, fraction: float) -> tuple[Tensor, Tensor]:
        """Inputs and targets of batch ``number`` when ``fraction`` of the run is done."""
        length = self.tokens_at(fraction)
        if length not in self._batches:
            rows = self.batch * self.context // length
            self._batches[length] = Batches(self.tokens, length, rows, self.seed, unit=self.unit)
        return self._batches[length][number]
