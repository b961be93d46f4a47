"""Program source in which every sequence has its own names: what a name is, only its earlier occurrences tell."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch

from scatterbrain.training.batch import Batch
from scatterbrain.training.tasks.documents import Document
from scatterbrain.training.tasks.fingerprint import fingerprint_of
from scatterbrain.training.tasks.randomness import generator_of

KEYWORDS = tuple(word.encode() for word in sorted({*keyword.kwlist, *keyword.softkwlist}))
"""Python's keywords, each of which is one token."""

FIRST_NAME = 256 + len(KEYWORDS)
"""Tokens below 256 are bytes; keywords follow, then names."""

_LEXER = re.compile(
    rb"""
    (?P<nothing> \#[^\n]* | \\\n | [^\S\n]+ )                # comments, joined lines, spaces
    | (?P<string> (?i:\b(?:r|u|b|f|rb|br|rf|fr))?             # with its prefix
      (?: \"\"\" (?:[^\\]|\\.)*? \"\"\"
        | ''' (?:[^\\]|\\.)*? '''
        | " (?:[^\\\n"]|\\.)* "?
        | ' (?:[^\\\n']|\\.)* '? ))
    | (?P<number> 0[xX][0-9A-Fa-f_]+ | \.? [0-9] (?: [eE][+-][0-9] | [0-9A-Za-z_.] )* )
    | (?P<name> [A-Za-z_\x80-\xff] [0-9A-Za-z_\x80-\xff]* )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_KEYWORD_TOKENS = {word: 256 + index for index, word in enumerate(KEYWORDS)}
_STRING, _NUMBER, _NEWLINE = ord('"'), ord("0"), ord("\n")
_NO_NAME = -1
_ATTEMPTS = 100
_PASSAGE = 64  # lexemes at least, and at most twice as many


class Lexeme(NamedTuple):
    """A part of a source: its first byte, and its token or, of a name, the name."""

    start: int
    token: int | None
    name: bytes | None


def lexemes(source: bytes) -> list[Lexeme]:
    """Python source as tokens, in order: a byte for every operator and bracket, " for a string, 0 for a number, one for
    the end of lines that are not empty, one for every keyword. Comments and spaces are left out.

    It needs no complete program, and reads other languages too, with their comments as source.
    """
    found: list[Lexeme] = []
    for match in _LEXER.finditer(source):
        text, kind = match.group(), match.lastgroup
        if kind == "nothing":
            continue
        if kind == "name" and text not in _KEYWORD_TOKENS:
            found.append(Lexeme(match.start(), None, text))
            continue
        token = {"string": _STRING, "number": _NUMBER}.get(kind) or _KEYWORD_TOKENS.get(text) or text[0]
        if token != _NEWLINE or (found and found[-1].token != _NEWLINE):
            found.append(Lexeme(match.start(), token, None))
    return found


class RenamedSequence(NamedTuple):
    """A sequence with names of its own.

    Args:
        tokens: int64 (tokens,).
        distance: int64 (tokens,). Of a name that occurred before, how many tokens before this occurrence the nearest
            earlier one is; 0 at the first occurrence of a name, -1 at bytes.
    """

    tokens: torch.Tensor
    distance: torch.Tensor


class RenamedSource:
    """Batches of program source (:func:`lexemes`) in which each sequence numbers the names at random.

    A sequence starts at a line of a document, goes on with another document where that one ends, and gives each name a
    random one of ``names`` tokens, the same one at every occurrence. If it has more names than there are tokens, a new
    name takes the token of the one that was not seen for longest. Of its passages, of some lines each, a share of
    ``repeats`` is one that starts ``distance`` tokens before or earlier, once more.

    Args:
        training: Documents to learn from. validation: Those of the validation sequences; none is in both.
        tokens: Of a sequence that are read; the target of each is the one after it.
        names: Tokens for names.
        distance: Validation scores the names alone whose nearest earlier occurrence is at least so many tokens before;
            0 for all tokens, names or not. Training scores all of them.
        repeats: Probability that a passage repeats an earlier one.
        batch: Sequences per batch.
        seed: Of the training sequences. Validation sequences are the same for every seed.
        tokens_at: Tokens of a training sequence when a share of the run is done; by default always ``tokens``. Shorter
            sequences have ``distance`` in proportion, but not below 128, and a batch as many more of them.
    """

    def __init__(
        self,
        training: list[Document],
        validation: list[Document],
        tokens: int,
        names: int,
        distance: int,
        repeats: float,
        batch: int,
        seed: int,
        tokens_at: Callable[[float], int] | None = None,
    ) -> None:
        self.training, self.validation = ([document.text for document in part] for part in (training, validation))
        self.tokens, self.names, self.distance, self.repeats = tokens, names, distance, repeats
        self.batch, self.seed = batch, seed
        self._tokens_at = tokens_at or (lambda fraction: tokens)
        self.input_size = self.classes = FIRST_NAME + names
        self.fingerprint = fingerprint_of([*self.training, *self.validation])
        scored = f"names seen {distance:,} tokens before or earlier" if distance else "all tokens"
        repeated = f", in which {repeats:.0%} of the passages repeat an earlier one" if repeats else ""
        self.description = (
            f"{len(training):,} files to train on, {len(validation):,} to validate on; every name is one of {names:,} "
            f"tokens, at random in each sequence of {tokens:,}{repeated}; validation scores {scored}"
        )

    def training_batch(self, number: int, fraction: float = 0.0) -> Batch:
        """Sequences drawn by ``number`` and the seed alone, of the length that ``fraction`` of the run has."""
        length = self._tokens_at(fraction)
        rows = [
            self.sequence(self.training, generator_of(self.seed, number, row), length)
            for row in range(self.batch * self.tokens // length)
        ]
        tokens = torch.stack([row.tokens for row in rows])
        return Batch(tokens[:, :-1], tokens[:, 1:])

    def validation_batch(self, number: int) -> Batch:
        """Always the same sequences of the validation documents. Each has tokens that are scored.

        Raises:
            ValueError: if none of many sequences has a name that comes again as far behind as it must.
        """
        rows = [self._scored_sequence(number, row) for row in range(self.batch)]
        tokens = torch.stack([row.tokens for row in rows])
        targets = tokens[:, 1:]
        if self.distance:
            distance = torch.stack([row.distance for row in rows])[:, 1:]
            targets = targets.masked_fill(distance < self.distance, -100)
        return Batch(tokens[:, :-1], targets)

    def _scored_sequence(self, number: int, row: int) -> RenamedSequence:
        for attempt in range(_ATTEMPTS):
            found = self.sequence(self.validation, generator_of("validation", number, row, attempt))
            if self.distance == 0 or int(found.distance[1:].max()) >= self.distance:
                return found
        raise ValueError(
            f"task.distance: expected validation texts in which names come again {self.distance} or more tokens "
            f"behind, got none in {_ATTEMPTS} sequences of {self.tokens}; use a smaller task.distance, more "
            "task.tokens or other files (data.path, data.glob)"
        )

    def sequence(
        self, documents: list[bytes], generator: torch.Generator, length: int | None = None
    ) -> RenamedSequence:
        """One sequence of ``length`` + 1 tokens, by default of ``tokens`` + 1."""
        length = self.tokens if length is None else length
        numbers = _RandomNumbers(self.names, generator)
        tokens, distance = [], []
        for place, lexeme in enumerate(islice(self._passages(documents, generator, length), length + 1)):
            token, behind = lexeme.token, _NO_NAME
            if token is None:
                number, seen = numbers.of(lexeme.name, place)
                token, behind = FIRST_NAME + number, 0 if seen is None else place - seen
            tokens.append(token)
            distance.append(behind)
        return RenamedSequence(torch.tensor(tokens), torch.tensor(distance))

    def _passages(self, documents: list[bytes], generator: torch.Generator, length: int) -> Iterator[Lexeme]:
        """Without an end: lexemes of the documents, and what was passed long before once more."""
        new = self._of_documents(documents, generator, length)
        passed: list[Lexeme] = []
        behind = max(self.distance * length // self.tokens, 2 * _PASSAGE)
        while True:
            source = new
            latest = len(passed) - behind
            if latest >= 0 and float(torch.rand((), generator=generator)) < self.repeats:
                start = _start_of_line(passed, int(torch.randint(latest + 1, (), generator=generator)))
                source = iter(passed[start : start + 2 * _PASSAGE])
            passage = list(_passage(source))
            passed += passage
            yield from passage

    def _of_documents(self, documents: list[bytes], generator: torch.Generator, length: int) -> Iterator[Lexeme]:
        """Without an end: one document after another, the first from a random line on that leaves ``length`` lexemes
        behind it where there are so many, or from its beginning."""
        is_first = True
        while True:
            found = _lexemes_of(documents[int(torch.randint(len(documents), (), generator=generator))])
            start = 0
            if is_first:
                start = int(torch.randint(max(len(found) - length, 0) + 1, (), generator=generator))
                start, is_first = _start_of_line(found, start), False
            yield from islice(found, start, None)
            yield Lexeme(0, _NEWLINE, None)


def _start_of_line(found: list[Lexeme], place: int) -> int:
    while place > 0 and found[place - 1].token != _NEWLINE:
        place -= 1
    return place


def _passage(source: Iterator[Lexeme]) -> Iterator[Lexeme]:
    """Whole lines of ``source``, but for one that is very long."""
    for count, lexeme in enumerate(islice(source, 2 * _PASSAGE), 1):
        yield lexeme
        if count >= _PASSAGE and lexeme.token == _NEWLINE:
            break


class _RandomNumbers:
    """Gives each name a number below ``count`` when it is first asked for."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self._free = torch.randperm(count, generator=generator).tolist()
        self._known: dict[bytes, tuple[int, int]] = {}  # number and last place; what was seen last is last

    def of(self, name: bytes, place: int) -> tuple[int, int | None]:
        """The number of a name that stands at ``place``, and where it stood before."""
        if name in self._known:
            number, before = self._known.pop(name)
        elif self._free:
            number, before = self._free.pop(), None
        else:
            number, before = self._known.pop(next(iter(self._known)))[0], None
        self._known[name] = number, place
        return number, before


_lexemes_of = lru_cache(maxsize=512)(lexemes)
