"""Text cut into tokens by a tokenizer: training, reading and storing one, and the tokens of both parts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from scatterbrain.training.config import DataConfig
from scatterbrain.training.data import corpus_root, files_below, find_files, outside_excluded, read_corpus

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
KINDS = ("words", "bpe")
WIKITEXT = ("wiki.train.tokens", "wiki.valid.tokens")
_CHUNK = 1 << 20  # characters encoded at once, so that a large corpus is never held as a list of words


class Tokens(NamedTuple):
    """A text as tokens.

    Args:
        tokens: int32 (tokens,).
        bytes: Bytes of the text in UTF-8.
        words: Words of the text, parts between white space, and line ends.
        unknown: Tokens that stand for a word the tokenizer does not have.
    """

    tokens: Tensor
    bytes: int
    words: int
    unknown: int


def read_text_parts(config: DataConfig) -> tuple[str, str]:
    """The training text and the validation text.

    A folder with one file named ``*.train.*`` and one named ``*.valid.*``, as WikiText comes (wiki.train.tokens,
    wiki.valid.tokens), gives these two, whatever ``data.glob`` says. Of several it gives the two that the glob matches.
    Where the glob is the default and matches none of them, or matches nothing, it gives those of WikiText. Any other
    text, such as that of a glob that matches none of the parts but other files, is split as bytes are
    (:func:`scatterbrain.training.data.read_corpus`), at the line end behind the boundary, or at white space where none
    follows.

    Raises:
        ValueError: if the path does not exist, or what is there is no UTF-8 text or too short for two parts, or several
            files may be one of the parts.
    """
    root = corpus_root(config)
    if root.is_dir() and (files := _files_of_parts(root, config)) is not None:
        training, validation = (_decode(path.read_bytes(), path) for path in files)
        return _both(training, validation, config)
    for path in find_files(config):  # by themselves, so that an error can name the file
        _decode(path.read_bytes(), path)
    whole = b"".join(part.numpy().tobytes() for part in read_corpus(config))
    boundary = len(whole) - round(len(whole) * config.validation_fraction)
    boundary = _cut_behind(whole, boundary)
    return _both(_decode(whole[:boundary], root), _decode(whole[boundary:], root), config)


def _cut_behind(text: bytes, boundary: int) -> int:
    """Where the text is cut: behind the first line end from ``boundary`` on that leaves a validation part, or else
    behind white space: some corpora, such as text8, are a single line."""
    start = max(boundary - 1, 0)
    line_end = text.find(b"\n", start) + 1
    if line_end and text[line_end:].strip():
        return line_end
    space = re.compile(rb"\s+").search(text, start)
    return len(text) if space is None else space.end()


def train_tokenizer(text: str, kind: str, vocabulary: int) -> Tokenizer:
    """A tokenizer of ``text``.

    Args:
        text: Training text alone: nothing of the validation part is looked at.
        kind: "words" has the most frequent words, parts between white space, and <eos> for the end of a line; all other
            words are <unk>, as in the published figures of WikiText-2 and WikiText-103. "bpe" joins the most frequent
            pairs of bytes (byte-pair encoding; Sennrich et al., ACL 2016); every text comes back from its tokens.
        vocabulary: Entries at most.

    Raises:
        ValueError: for a vocabulary that has no room for what every text needs.
    """
    needed = {"words": 3, "bpe": 257}[kind]
    if vocabulary < needed:
        raise ValueError(
            f"task.vocabulary: expected {needed} or more entries with task.tokenizer {kind}, got {vocabulary}"
        )
    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel(_most_frequent_words(text, vocabulary), unk_token=UNKNOWN))
        tokenizer.add_special_tokens([UNKNOWN, END_OF_LINE])
        tokenizer.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(_chunks(text), trainer)
    return tokenizer


def read_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a file in the format of the ``tokenizers`` library (tokenizer.json), without a limit of length
    and without padding: those of a model that reads short texts would cut a whole corpus to a few tokens.

    Raises:
        ValueError: if there is no such file, or it holds no tokenizer.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"task.tokenizer: expected words, bpe or the path of a tokenizer.json, got {path!r}, which does not exist"
        )
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(
            f"task.tokenizer: expected a file of the tokenizers library, as Tokenizer.save writes it, got {file}, "
            f"which cannot be read: {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Tokens:
    """The tokens of ``text``, encoded by chunks of whole lines or words."""
    parts, words = [], 0
    for chunk in _chunks(text):
        words += len(chunk.split()) + chunk.count("\n")
        parts.append(torch.tensor(tokenizer.encode(chunk, add_special_tokens=False).ids, dtype=torch.int32))
    tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
    unknown = tokenizer.token_to_id(UNKNOWN)
    count = 0 if unknown is None else int((tokens == unknown).sum())
    return Tokens(tokens, len(text.encode()), words, count)


def token_count(tokenizer: Tokenizer) -> int:
    """Size of an embedding for every token: the largest number of a token, and one more for the number 0."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _most_frequent_words(text: str, vocabulary: int) -> dict[str, int]:
    """Numbers of the words; of those as frequent as one another the first in the order of their characters is kept."""
    count = Counter(word for chunk in _chunks(text) for word in chunk.split())
    for word in (UNKNOWN, END_OF_LINE):
        count.pop(word, None)
    kept = sorted(count, key=lambda word: (-count[word], word))[: vocabulary - 2]
    return {word: number for number, word in enumerate((UNKNOWN, END_OF_LINE, *kept))}


def _files_of_parts(root: Path, config: DataConfig) -> tuple[Path, Path] | None:
    """The files of a folder that are its two parts by their names; None where there are none for both, or several and
    the glob matches other files alone.

    Raises:
        ValueError: there are several, and the glob does not choose one of each. Any choice here, and the whole
            folder too, may train on a copy of the validation part.
    """
    named = [sorted(files_below(root, f"*.{part}.*")) for part in ("train", "valid")]
    named = [[name for name in names if name.parent == Path()] for names in named]
    if not all(named):
        return None
    if any(len(names) > 1 for names in named):
        matching = set(outside_excluded(files_below(root, config.glob), config.exclude))
        chosen = [[name for name in names if name in matching] for names in named]
        if not any(chosen):
            if matching and config.glob != DataConfig.glob:  # the default is nobody's choice of other files
                return None
            chosen = [[name for name in names if str(name) in WIKITEXT] for names in named]
        if any(len(names) != 1 for names in chosen):
            found = " and ".join(", ".join(map(str, names)) for names in named)
            raise ValueError(
                f"data.path: expected one file *.train.* and one *.valid.* in {root}, got {found}; choose one of each "
                "with data.glob, such as '*.tokens', or remove the others"
            )
        named = chosen
    return root / named[0][0], root / named[1][0]


def _both(training: str, validation: str, config: DataConfig) -> tuple[str, str]:
    for name, part in (("training", training), ("validation", validation)):
        if not part.strip():
            raise ValueError(
                f"data.path: expected text for training and validation in {config.path!r}, and the {name} part is "
                "empty; use more text, or another data.validation_fraction"
            )
    return training, validation


def _decode(text: bytes, source: Path) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.path: expected text in UTF-8 for task.tokenizer, got {source}: {error}; convert it, or use "
            "the task language, which reads bytes"
        ) from error


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces that end at line ends or, where none is near, in front of white space."""
    start, space = 0, re.compile(r"(?<=\S)\s")
    while start < len(text):
        end = text.find("\n", start + _CHUNK, start + 2 * _CHUNK) + 1
        if not end:
            # In front of all of it, as byte pairs have a space with the word behind it.
            found = space.search(text, start + _CHUNK)
            end = len(text) if found is None else found.start()
        yield text[start:end]
        start = end
