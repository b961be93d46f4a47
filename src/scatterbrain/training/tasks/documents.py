"""Documents of a folder, a .zip archive or the Python standard library, and the two parts that tasks make of them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

from scatterbrain.macos_files import without_macos_files
from scatterbrain.training.config import DataConfig
from scatterbrain.training.data import corpus_root, files_below, hash_of_name, kept_files, outside_excluded

TRAINING_FOLDER = "train"
VALIDATION_FOLDERS = ("test", "valid", "validation", "val", "dev")


class Document(NamedTuple):
    """A text file.

    Args:
        name: Path below the folder or inside the archive, with "/" between its parts.
        text: Its bytes.
    """

    name: str
    text: bytes


class LabelledTexts(NamedTuple):
    """Texts by class.

    Args:
        classes: Names, sorted.
        training: The texts of each class that are learned from.
        validation: The texts of each class that are kept for validation.
    """

    classes: tuple[str, ...]
    training: list[list[bytes]]
    validation: list[list[bytes]]


def read_documents(config: DataConfig) -> list[Document]:
    """The files of ``data.path`` that match ``data.glob`` outside ``data.exclude``, without empty ones.

    Of files with the same bytes the first by name is kept, so no text is in two parts of a split. The order is that of
    a hash of the names.

    Raises:
        ValueError: if the path does not exist or is no readable archive, or nothing there matches the glob, or
            ``data.exclude`` leaves out the part for validation.
    """
    root = corpus_root(config)
    if root.is_dir():
        names = files_below(root, config.glob)
        _check_no_part_is_excluded(root, config, names)
        found = [
            Document(path.relative_to(root).as_posix(), path.read_bytes()) for path in kept_files(root, names, config)
        ]
    elif zipfile.is_zipfile(root):
        found = _read_archive(root, config)
    else:
        found = [Document(root.name, root.read_bytes())]
    first: dict[bytes, Document] = {}
    for document in sorted(found):
        if document.text.strip():
            first.setdefault(document.text, document)
    if not first:
        raise ValueError(f"data.path: expected texts in {root}, and all files that match {config.glob!r} are empty")
    return sorted(first.values(), key=lambda document: hash_of_name(document.name))


def _check_no_part_is_excluded(root: Path, config: DataConfig, names: Iterable[PurePath]) -> None:
    """The tests of program text are left out by default. Beside a folder train they are half of the data, be these two
    what ``data.path`` names, or further down in it.

    Args:
        root: what is read.
        config: what is left out there.
        names: of all files that match.
    """
    if TRAINING_FOLDER in config.exclude:
        return
    excluded = [name for name in VALIDATION_FOLDERS if name in config.exclude]
    others = set(config.exclude).difference(excluded)
    below = [name.parts for name in outside_excluded(names, others)]
    common = _common_folders(below)
    tops = {parts[common] for parts in below if len(parts) > common + 1}
    beside = {path.name for path in root.iterdir() if path.is_dir()} if root.is_dir() else set()
    for found in (tops, beside):
        lost = [name for name in excluded if name in found]
        if lost and TRAINING_FOLDER in found:
            raise ValueError(
                f"data.exclude: expected to keep both train and {lost[0]} of {root}, got {list(config.exclude)}, which "
                f"leaves {lost[0]} out; set data.exclude, for instance to []"
            )


def split_documents(documents: list[Document], validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents: the last ones in the order of a hash of their names are for validation.

    Both parts have at least one document.

    Raises:
        ValueError: for fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError(
            f"data.path: expected at least 2 different documents, one of them for validation, got {len(documents)}; "
            "name a folder with more text files"
        )
    ordered = sorted(documents, key=lambda document: hash_of_name(document.name))
    kept = min(max(round(len(ordered) * validation_fraction), 1), len(ordered) - 1)
    return ordered[:-kept], ordered[-kept:]


def label_documents(documents: list[Document], validation_fraction: float, largest: int | None = None) -> LabelledTexts:
    """The documents by class, in one of two layouts; folders around the whole layout are allowed.

    * ``train/CLASS/FILE`` and ``test/CLASS/FILE`` (or valid, validation, val, dev in place of test), as in the archive
      of the IMDB reviews: the parts are those of the folders. A class that one of the parts lacks is left out.
    * ``CLASS/FILE``, deeper folders included: every class is split by itself, as :func:`split_documents` does.

    Files outside the class folders are left out.

    Args:
        documents: As :func:`read_documents` gives them.
        validation_fraction: Share of the documents of each class kept for validation, in the second layout.
        largest: Keep this many classes, those with the most bytes; None for all.

    Raises:
        ValueError: for fewer than two classes, or fewer than ``largest``.
    """
    below = _below_common_folders(documents)
    tops = {parts[0] for parts, _ in below if len(parts) > 2}
    validation_folder = next((name for name in VALIDATION_FOLDERS if name in tops), None)
    if TRAINING_FOLDER in tops and validation_folder is not None:
        training, validation = (
            _by_first_folder([(parts[1:], document) for parts, document in below if parts[0] == folder])
            for folder in (TRAINING_FOLDER, validation_folder)
        )
    else:
        together = {name: found for name, found in _by_first_folder(below).items() if len(found) > 1}
        split = {name: split_documents(found, validation_fraction) for name, found in together.items()}
        training, validation = ({name: parts[index] for name, parts in split.items()} for index in (0, 1))
    classes = _largest(training, validation, largest)
    return LabelledTexts(
        classes,
        [[document.text for document in training[name]] for name in classes],
        [[document.text for document in validation[name]] for name in classes],
    )


def _read_archive(path: Path, config: DataConfig) -> list[Document]:
    try:
        with zipfile.ZipFile(path) as archive:
            # By entry: a path has no "./" at its beginning, an entry may.
            entries = {PurePosixPath(entry.filename): entry for entry in archive.infolist() if not entry.is_dir()}
            names = without_macos_files(name for name in entries if _matches(name, config.glob))
            _check_no_part_is_excluded(path, config, names)
            kept = outside_excluded(names, config.exclude)
            found = [Document(name.as_posix(), archive.read(entries[name])) for name in kept]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, KeyError, zlib.error) as error:
        raise ValueError(
            f"data.path: expected a .zip archive without a password, got {path}, which cannot be read: {error}; "
            "unpack it and name the folder"
        ) from error
    if not found:
        raise ValueError(f"data.path: no file in {path} matches data.glob {config.glob!r} outside data.exclude")
    return found


def _matches(name: PurePosixPath, glob: str) -> bool:
    try:
        return name.match(glob)
    except ValueError as error:
        raise ValueError(f"data.glob: expected a pattern, such as '*.txt', got {glob!r}: {error}") from error


def _below_common_folders(documents: list[Document]) -> list[tuple[tuple[str, ...], Document]]:
    """Each document with the parts of its name, without the folders that all of them are in."""
    names = [tuple(document.name.split("/")) for document in documents]
    common = _common_folders(names)
    return [(parts[common:], document) for parts, document in zip(names, documents, strict=True)]


def _common_folders(names: list[tuple[str, ...]]) -> int:
    """How many folders all files are in, from the parts of their names."""
    common = 0
    while names and all(len(parts) > common + 1 for parts in names) and len({parts[common] for parts in names}) == 1:
        common += 1
    return common


def _by_first_folder(below: list[tuple[tuple[str, ...], Document]]) -> dict[str, list[Document]]:
    found: dict[str, list[Document]] = {}
    for parts, document in below:
        if len(parts) > 1:
            found.setdefault(parts[0], []).append(document)
    return found


def _largest(
    training: dict[str, list[Document]], validation: dict[str, list[Document]], largest: int | None
) -> tuple[str, ...]:
    """Names of the classes that both parts have, sorted; of more than ``largest`` those with the most bytes."""
    size = {
        name: sum(len(document.text) for document in training[name] + validation[name])
        for name in training.keys() & validation.keys()
    }
    wanted = 2 if largest is None else largest
    if len(size) < wanted:
        raise ValueError(
            f"data.path: expected at least {wanted} folders, one per class, with 2 or more text files each, or the "
            f"folders train and test with these in both, got {len(size)}: {', '.join(sorted(size)) or 'none'}; "
            "check data.path, data.glob and data.exclude"
        )
    return tuple(sorted(sorted(size, key=lambda name: (-size[name], name))[:largest]))
