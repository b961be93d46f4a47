from __future__ import annotations

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from scatterbrain.training.config import DataConfig, TrainConfig
from scatterbrain.training.data import find_files
from scatterbrain.training.tasks.documents import Document, label_documents, read_documents, split_documents
from scatterbrain.training.tasks.text_classification import TextClassification

FILES = {
    "neg/a.txt": "bad",
    "neg/b.txt": "worse",
    "neg/deep/c.txt": "worst",
    "pos/a.txt": "good",
    "pos/b.txt": "better, by far",
    "pos/empty.txt": " \n",
    "pos/same.txt": "good",
    "neutral/a.txt": "so",
    "neutral/b.txt": "so so",
    "neutral/c.md": "not text",
    "skipped/a.txt": "left out",
    "skipped/b.txt": "left out too",
    "README.txt": "of no class",
}


def write_folder(path: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return str(path)


def write_archive(path: Path, files: dict[str, str]) -> str:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return str(path.with_suffix(".zip"))


@pytest.fixture(params=[write_folder, write_archive], ids=["folder", "archive"])
def config(request, tmp_path: Path) -> Callable[[dict[str, str]], DataConfig]:
    def make(files: dict[str, str]) -> DataConfig:
        return DataConfig(path=request.param(tmp_path / "texts", files), glob="*.txt", exclude=("skipped",))

    return make


def texts(*members: str) -> list[bytes]:
    return sorted(FILES[name].encode() for name in members)


def test_documents_match_the_glob_outside_excluded_folders_and_no_text_comes_twice(config):
    found = {document.name: document.text.decode() for document in read_documents(config(FILES))}
    expected = {name for name in FILES if name.endswith("txt") and not name.startswith("skipped")}
    assert found == {name: FILES[name] for name in expected - {"pos/empty.txt", "pos/same.txt"}}


@pytest.mark.parametrize("around", ["", "reviews/"])
def test_what_macos_adds_is_no_document_and_no_class(config, around):
    files = {around + name: text for name, text in FILES.items() if name != "README.txt"}
    folders = {around + "neg/", around + "pos/deep/"}
    added = {f"__MACOSX/{folder}._{number}.txt": f"Mac {number}" for folder in folders for number in range(3)}
    added |= {f"{folder}._{number}.txt": f"Mac beside {number}" for folder in folders for number in range(3)}
    found = read_documents(config(files))
    assert read_documents(config(files | added)) == found
    assert label_documents(read_documents(config(files | added)), 0.4).classes == ("neg", "neutral", "pos")


def test_the_order_does_not_depend_on_where_the_texts_are_or_how_they_are_packed(tmp_path):
    packed = (write_folder(tmp_path / "one", FILES), write_archive(tmp_path / "two", FILES))
    found = [read_documents(DataConfig(path=path, glob="*.txt")) for path in packed]
    assert found[0] == found[1] and len(found[0]) == 10


@pytest.mark.parametrize("around", ["", "reviews/", "archive/reviews/"])
def test_a_folder_is_a_class_and_every_class_is_split(config, around):
    files = {around + name: text for name, text in FILES.items() if name != "README.txt"}
    labelled = label_documents(read_documents(config(files)), 0.4)
    assert labelled.classes == ("neg", "neutral", "pos")
    whole = [sorted(a + b) for a, b in zip(labelled.training, labelled.validation, strict=True)]
    assert whole[0] == texts("neg/a.txt", "neg/b.txt", "neg/deep/c.txt")
    assert whole[1] == texts("neutral/a.txt", "neutral/b.txt")
    assert whole[2] == texts("pos/a.txt", "pos/b.txt")
    assert [len(part) for part in labelled.validation] == [1, 1, 1]


def test_files_beside_the_class_folders_are_left_out(config):
    labelled = label_documents(read_documents(config(FILES)), 0.4)
    assert FILES["README.txt"].encode() not in sum(labelled.training + labelled.validation, [])
    assert labelled.classes == ("neg", "neutral", "pos")


@pytest.mark.parametrize("other", ["test", "valid"])
def test_folders_for_training_and_validation_are_the_parts(config, other):
    files = {f"imdb/train/{name}": f"learned {text}" for name, text in FILES.items() if "neutral" not in name}
    files |= {f"imdb/{other}/{name}": f"judged {text}" for name, text in FILES.items()}
    files |= {"imdb/vocabulary.txt": "words"}
    labelled = label_documents(read_documents(config(files)), 0.05)
    assert labelled.classes == ("neg", "pos")  # neutral has no training part
    assert sorted(labelled.training[0]) == sorted(b"learned " + text for text in texts(*list(FILES)[:3]))
    assert sorted(labelled.validation[1]) == [b"judged  \n", b"judged better, by far", b"judged good"]
    assert all(text.startswith(b"learned") for part in labelled.training for text in part)


def test_the_largest_classes_are_kept(config):
    labelled = label_documents(read_documents(config(FILES)), 0.4, largest=2)
    assert labelled.classes == ("neg", "pos")


def test_a_split_keeps_its_share_and_the_same_documents_whatever_their_order():
    documents = [Document(f"{number}.txt", b"%d" % number) for number in range(40)]
    training, validation = split_documents(documents, 0.25)
    assert len(validation) == 10 and sorted(training + validation) == sorted(documents)
    assert split_documents(documents[::-1], 0.25) == (training, validation)
    assert [len(part) for part in split_documents(documents[:3], 0.001)] == [2, 1]
    assert [len(part) for part in split_documents(documents[:3], 0.999)] == [1, 2]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a/x.md": "text"}, "no file .* matches data.glob '\\*.txt'"),
        ({"a/x.txt": "", "b/x.txt": "\n"}, "all files that match '\\*.txt' are empty"),
    ],
)
def test_no_texts_are_refused_by_name(config, files, message):
    with pytest.raises(ValueError, match=f"data.path: .*{message}"):
        read_documents(config(files))


def test_other_missing_data_are_refused_with_what_is_expected(config, tmp_path):
    with pytest.raises(ValueError, match="data.path: expected .*'nowhere', which does not exist"):
        read_documents(DataConfig(path="nowhere"))
    with pytest.raises(ValueError, match="data.path: expected at least 2 different documents"):
        split_documents(read_documents(config({"a/x.txt": "text"})), 0.5)
    with pytest.raises(ValueError, match="data.path: expected at least 2 folders, one per class, .*, got 1: a;"):
        label_documents([Document(name, name.encode()) for name in ("a/x", "a/y", "b/z", "q")], 0.5)
    with pytest.raises(ValueError, match="expected at least 4 folders.* got 3: neg, neutral, pos"):
        label_documents(read_documents(config(FILES)), 0.4, largest=4)


def test_a_broken_archive_is_refused_by_name(tmp_path):
    path = Path(write_archive(tmp_path / "texts", FILES))
    damaged = bytearray(path.read_bytes())
    damaged[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="data.path: expected a .zip archive .*cannot be read"):
        read_documents(DataConfig(path=str(path), glob="*.txt"))


@pytest.mark.parametrize("around", ["", "reviews/", "archive/reviews/"])
@pytest.mark.parametrize("write", [write_folder, write_archive], ids=["folder", "archive"])
def test_a_default_that_would_lose_the_folder_test_is_refused(tmp_path, write, around):
    files = {f"{around}{part}/{name}/1.txt": f"{part} {name}" for part in ("train", "test") for name in ("pos", "neg")}
    config = DataConfig(path=write(tmp_path / "texts", files), glob="*.txt")
    with pytest.raises(ValueError, match=r"data.exclude: expected to keep both train and test of .* set data.exclude"):
        read_documents(config)
    assert len(read_documents(dataclasses.replace(config, exclude=()))) == 4
    assert len(read_documents(dataclasses.replace(config, exclude=("train",)))) == 2
    tests_of_source = {name.replace("train/", "code/"): text for name, text in files.items()}
    config = dataclasses.replace(config, path=write(tmp_path / "source", tests_of_source))
    assert len(read_documents(config)) == 2


def test_an_archive_of_the_current_folder_is_read_like_any_other(tmp_path):
    plain = write_archive(tmp_path / "plain", FILES)
    dotted = write_archive(tmp_path / "dotted", {f"./{name}": text for name, text in FILES.items()})
    found = [read_documents(DataConfig(path=path, glob="*.txt")) for path in (plain, dotted)]
    assert found[0] == found[1] and len(found[0]) == 10


@pytest.mark.parametrize(
    "error", [KeyError("x"), EOFError("x"), zlib.error("x")], ids=lambda error: type(error).__name__
)
def test_whatever_an_archive_cannot_be_read_for_is_said(tmp_path, monkeypatch, error):
    path = write_archive(tmp_path / "texts", FILES)

    def read(*_) -> bytes:
        raise error

    monkeypatch.setattr(zipfile.ZipFile, "read", read)
    with pytest.raises(ValueError, match="data.path: expected a .zip archive .*cannot be read"):
        read_documents(DataConfig(path=path, glob="*.txt"))


def test_a_file_name_that_is_no_text_ends_nothing(tmp_path):
    write_folder(tmp_path / "texts", FILES)
    config = DataConfig(path=str(tmp_path / "texts"), glob="*.txt")
    before = [document.name for document in read_documents(config)]
    odd = os.fsdecode(b"pos/na\xefve.txt")
    try:
        (tmp_path / "texts" / odd).write_text("naive")
    except OSError:
        pytest.skip("this file system takes no such name")
    found = [document.name for document in read_documents(config)]
    assert odd in found and [name for name in found if name != odd] == before
    assert odd in {str(path.relative_to(tmp_path / "texts")) for path in find_files(config)}


def test_a_class_whose_name_is_no_text_can_be_shown(tmp_path):
    folder = tmp_path / "texts"
    write_folder(folder, FILES)
    try:
        (folder / "neg").rename(folder / os.fsdecode(b"n\xefg"))
    except OSError:
        pytest.skip("this file system takes no such name")
    data = DataConfig(path=str(folder), glob="*.txt", exclude=("skipped",), validation_fraction=0.4)
    opened = TextClassification(tokens=8).open(data, TrainConfig(batch=2))
    assert opened.description.encode().endswith(b"3 classes: neutral, n?g, pos")


def test_a_glob_that_is_no_pattern_below_the_folder_is_refused_by_its_key(tmp_path):
    path = write_folder(tmp_path / "texts", FILES)
    with pytest.raises(ValueError, match="data.glob: expected a pattern of file names below data.path.*got "):
        read_documents(DataConfig(path=path, glob="/*.txt"))


def test_a_pattern_of_nothing_is_named_by_its_key(tmp_path: Path):
    path = write_archive(tmp_path / "texts", FILES)
    with pytest.raises(ValueError, match="data.glob: expected a pattern, such as '.*', got '': empty pattern"):
        read_documents(DataConfig(path=path, glob=""))
