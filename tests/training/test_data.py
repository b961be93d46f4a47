from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scatterbrain.training.config import DataConfig
from scatterbrain.training.data import Batches, GrowingBatches, find_files, read_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        path = tmp_path / "corpus" / f"part{number % 3}" / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"x{number:03d}\n" * 50)
    (tmp_path / "corpus" / "notes.md").write_text("not source\n")
    (tmp_path / "corpus" / "tests").mkdir()
    (tmp_path / "corpus" / "tests" / "test_x.py").write_text("a test\n")
    return tmp_path / "corpus"


def test_a_folder_is_read_recursively_by_glob_without_the_excluded_folders(folder):
    names = {path.name for path in find_files(DataConfig(path=str(folder)))}
    assert names == {f"file{number}.py" for number in range(12)}
    assert [path.name for path in find_files(DataConfig(path=str(folder), glob="*.md"))] == ["notes.md"]


def test_what_macos_adds_is_no_text(folder):
    files = find_files(DataConfig(path=str(folder)))
    (folder / "__MACOSX").mkdir()
    for path in (folder / "__MACOSX" / "x.py", folder / "part1" / "._file1.py"):
        path.write_bytes(b"\x00\x05\x16\x07")
    assert find_files(DataConfig(path=str(folder))) == files


def test_the_split_is_the_same_every_time_and_no_byte_is_in_both_parts(folder):
    config = DataConfig(path=str(folder), validation_fraction=0.2)
    training, validation = read_corpus(config)
    again = read_corpus(config)
    joined = b"\n".join(path.read_bytes() for path in find_files(config))
    assert bytes(training.tolist()) + bytes(validation.tolist()) == joined
    assert validation.numel() == round(0.2 * len(joined))
    assert torch.equal(training, again[0]) and torch.equal(validation, again[1])


def test_the_split_does_not_depend_on_where_the_folder_is(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    before = read_corpus(DataConfig(path=str(folder)))
    folder.rename(moved)
    after = read_corpus(DataConfig(path=str(moved)))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_the_standard_library_is_found_without_installed_packages_and_tests():
    parts = {part for path in find_files(DataConfig()) for part in path.parts}
    assert any(path.name == "argparse.py" for path in find_files(DataConfig()))
    assert not parts & {"site-packages", "dist-packages", "test"}


@pytest.mark.parametrize("change", [{"path": "nowhere"}, {"glob": "*.nothing"}])
def test_missing_data_is_refused_by_name(folder, change):
    with pytest.raises(ValueError, match="data.path"):
        find_files(DataConfig(**({"path": str(folder)} | change)))


def test_a_text_shorter_than_the_context_is_refused():
    with pytest.raises(ValueError, match="validation part has 9 bytes, and train.context 8 needs at least 17"):
        Batches(torch.zeros(9, dtype=torch.uint8), context=8, batch=1, seed=0, name="validation")


def test_targets_are_the_next_bytes_and_a_pass_reads_no_byte_twice():
    tokens = torch.arange(200, dtype=torch.uint8)
    batches = Batches(tokens, context=8, batch=2, seed=3)
    passes = batches.sequences_per_pass // 2
    seen = []
    for number in range(passes):
        inputs, targets = batches[number]
        assert torch.equal(inputs[:, 1:], targets[:, :-1]) and torch.equal(targets, inputs + 1)
        seen += inputs.flatten().tolist()
    assert len(seen) == len(set(seen)) == passes * 16


def test_a_batch_depends_on_its_number_and_the_seed_only():
    tokens = torch.randint(256, (500,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    forward, backward = (Batches(tokens, context=8, batch=2, seed=3) for _ in range(2))
    first = [forward[number][0] for number in range(60)]
    second = [backward[number][0] for number in reversed(range(60))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = Batches(tokens, context=8, batch=2, seed=4)
    assert any(not torch.equal(first[number], other[number][0]) for number in range(3))


def test_growing_sequences_are_those_of_their_length_and_a_batch_has_fewer_of_them():
    tokens = torch.randint(256, (500,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    growing = GrowingBatches(tokens, 16, 2, 3, lambda fraction: 4 if fraction < 0.5 else 16)
    for number in (0, 7):
        for fraction, length, rows in ((0.0, 4, 8), (0.49, 4, 8), (0.5, 16, 2), (1.0, 16, 2)):
            found, wanted = growing.at(number, fraction), Batches(tokens, length, rows, 3)[number]
            assert found[0].shape == (rows, length)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
