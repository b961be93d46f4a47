"""Program source in which every sequence has its own names: what a name is, only its earlier occurrences tell."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from scatterbrain.training.batch import Batch
from scatterbrain.training.tasks.documents import Document
from scatterbrain.training.tasks.fingerprint import fingerprint_of
from scatterbrain.training.tasks.randomness import generator_of

KEPT = frozenset(word.encode() for word in keyword.kwlist + keyword.softkwlist)
"""Python's keywords. They keep their names."""

_LEXER = re.compile(
    rb"""
    \#[^\n]*                                                  # a comment
    | (?i:\b(?:r|u|b|f|rb|br|rf|fr))?                         # a string with its prefix
      (?: \"\"\" (?:[^\\]|\\.)*? \"\"\"
        | ''' (?:[^\\]|\\.)*? '''
        | " (?:[^\\\n"]|\\.)* "?
        | ' (?:[^\\\n']|\\.)* '? )
    | \.? [0-9] [0-9A-Za-z_.]*                                # a number
    | (?P<name> [A-Za-z_\x80-\xff] [0-9A-Za-z_\x80-\xff]* )
    """,
    re.VERBOSE | re.DOTALL,
)
_LETTERS = b"abcdefghijklmnopqrstuvwxyz"
_NO_NAME = -1
_ATTEMPTS = 100


class Name(NamedTuple):
    """An occurrence of a name: its first byte, the byte after it, and the name."""

    start: int
    end: int
    text: bytes


def find_names(source: bytes) -> list[Name]:
    """Identifiers of Python source outside of comments and strings, keywords left out, in order.

    It needs no complete program, and of other languages it finds the identifiers as well, with those in comments that
    do not begin with #.
    """
    found = (Name(*match.span("name"), match["name"]) for match in _LEXER.finditer(source) if match["name"])
    return [name for name in found if name.text not in KEPT]


class RenamedSequence(NamedTuple):
    """A sequence with names of its own.

    Args:
        text: uint8 (bytes,).
        distance: int64 (bytes,). At the bytes of a name that occurred before, how many bytes before this occurrence
            the nearest earlier one starts; 0 at the first occurrence of a name, -1 at bytes of no name.
    """

    text: torch.Tensor
    distance: torch.Tensor


class RenamedSource:
    """Batches of program source in which each sequence renames every identifier at random.

    A sequence starts at a line of a document, goes on with another document where that one ends, and gives each name,
    keywords left out, another one of 4 to 8 random letters, the same one at every occurrence. Comments and strings stay
    as they are.

    Args:
        training: Documents to learn from. validation: Those of the validation sequences; none is in both.
        tokens: Bytes of a sequence that are read; the target of each is the byte after it.
        distance: Validation scores the bytes of names alone whose nearest earlier occurrence starts at least so many
            bytes before; 0 for all bytes, names or not. Training scores all bytes.
        batch: Sequences per batch.
        seed: Of the training sequences. Validation sequences are the same for every seed.
    """

    classes = input_size = 256

    def __init__(
        self,
        training: list[Document],
        validation: list[Document],
        tokens: int,
        distance: int,
        batch: int,
        seed: int,
    ) -> None:
        self.training, self.validation = ([document.text for document in part] for part in (training, validation))
        self.tokens, self.distance, self.batch, self.seed = tokens, distance, batch, seed
        self.fingerprint = fingerprint_of([*self.training, *self.validation])
        scored = f"names seen {distance:,} bytes before or earlier" if distance else "all bytes"
        self.description = (
            f"{len(training):,} files to train on, {len(validation):,} to validate on; every name renamed at random in "
            f"each sequence of {tokens:,} bytes; validation scores {scored}"
        )

    def training_batch(self, number: int, fraction: float = 0.0) -> Batch:
        """Sequences drawn by ``number`` and the seed alone."""
        rows = [self.sequence(self.training, generator_of(self.seed, number, row)) for row in range(self.batch)]
        text = torch.stack([row.text for row in rows]).long()
        return Batch(text[:, :-1], text[:, 1:])

    def validation_batch(self, number: int) -> Batch:
        """Always the same sequences of the validation documents. Each has bytes that are scored.

        Raises:
            ValueError: if none of many sequences has a name that comes again as far behind as it must.
        """
        rows = [self._scored_sequence(number, row) for row in range(self.batch)]
        text = torch.stack([row.text for row in rows]).long()
        targets = text[:, 1:]
        if self.distance:
            distance = torch.stack([row.distance for row in rows])[:, 1:]
            targets = targets.masked_fill(distance < self.distance, -100)
        return Batch(text[:, :-1], targets)

    def _scored_sequence(self, number: int, row: int) -> RenamedSequence:
        for attempt in range(_ATTEMPTS):
            found = self.sequence(self.validation, generator_of("validation", number, row, attempt))
            if self.distance == 0 or int(found.distance[1:].max()) >= self.distance:
                return found
        raise ValueError(
            f"task.distance: expected validation texts in which names come again {self.distance} or more bytes behind, "
            f"got none in {_ATTEMPTS} sequences of {self.tokens} bytes; use a smaller task.distance, more task.tokens "
            "or other files (data.path, data.glob)"
        )

    def sequence(self, documents: list[bytes], generator: torch.Generator) -> RenamedSequence:
        """One sequence of ``tokens`` + 1 bytes."""
        needed = self.tokens + 1
        names = _RandomNames(generator)
        last_start: dict[bytes, int] = {}
        text, distance = bytearray(), []
        while len(text) < needed:
            source = documents[int(torch.randint(len(documents), (), generator=generator))]
            start = self._line_start(source, generator) if not text else 0
            for piece, name in _pieces(source, start):
                replacement = piece if name is None else names[name]
                if name is None:
                    distance += [_NO_NAME] * len(piece)
                else:
                    seen = last_start.get(name)
                    distance += [0 if seen is None else len(text) - seen] * len(replacement)
                    last_start[name] = len(text)
                text += replacement
                if len(text) >= needed:
                    break
            else:
                text += b"\n"
                distance.append(_NO_NAME)
        return RenamedSequence(torch.frombuffer(text[:needed], dtype=torch.uint8), torch.tensor(distance[:needed]))

    def _line_start(self, source: bytes, generator: torch.Generator) -> int:
        """A random line of which ``tokens`` bytes follow; of a shorter source the first one."""
        place = int(torch.randint(max(len(source) - self.tokens, 0) + 1, (), generator=generator))
        return source.rfind(b"\n", 0, place) + 1


class _RandomNames(dict[bytes, bytes]):
    """Makes a name for each key when it is first asked for; no two are the same, and none is a keyword."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator, self._taken = generator, set(KEPT)

    def __missing__(self, key: bytes) -> bytes:
        while True:
            length, *letters = torch.randint(1 << 30, (9,), generator=self._generator).tolist()
            name = bytes(_LETTERS[letter % 26] for letter in letters[: 4 + length % 5])
            if name not in self._taken:
                break
        self._taken.add(name)
        self[key] = name
        return name


def _pieces(source: bytes, start: int) -> Iterator[tuple[bytes, bytes | None]]:
    """Cuts the source from ``start`` into names and what is between them: pairs of the bytes and the name, or None."""
    place = start
    for name in _names_of(source):
        if name.start < place:
            continue
        if name.start > place:
            yield source[place : name.start], None
        yield name.text, name.text
        place = name.end
    if place < len(source):
        yield source[place:], None


@lru_cache(maxsize=512)
def _names_of(source: bytes) -> list[Name]:
    return find_names(source)
