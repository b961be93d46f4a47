from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scatterbrain.training.config import DataConfig
from scatterbrain.training.tasks import tokenized_text
from scatterbrain.training.tasks.tokenized_text import (
    encode,
    read_text_parts,
    read_tokenizer,
    token_count,
    train_tokenizer,
)

TEXT = " = Head = \n\n the cat and the dog <unk> the cat\n naïve 猫\n" * 20


def test_words_are_split_at_white_space_and_a_line_end_is_a_word():
    tokenizer = train_tokenizer(TEXT, "words", 6)
    assert token_count(tokenizer) == 6
    found = encode(tokenizer, "the cat\nthe horse \n")
    assert [tokenizer.id_to_token(token) for token in found.tokens.tolist()] == [
        *("the", "cat", "<eos>", "the", "<unk>", "<eos>")
    ]
    assert (found.words, found.unknown, found.bytes) == (6, 1, 19)
    assert encode(tokenizer, "<unk> the\n").unknown == 1  # as WikiText writes it


def test_the_vocabulary_holds_the_most_frequent_words():
    vocabulary = train_tokenizer(TEXT, "words", 5).get_vocab()
    assert vocabulary == {"<unk>": 0, "<eos>": 1, "the": 2, "=": 3, "cat": 4}


def test_byte_pairs_are_joined_and_every_text_comes_back():
    tokenizer = train_tokenizer(TEXT, "bpe", 300)
    assert tokenizer.get_vocab_size() <= 300
    for text in (TEXT, "other\r\n\ttext ☃ \x00 <unk>"):
        found = encode(tokenizer, text)
        assert tokenizer.decode(found.tokens.tolist()) == text
        assert found.bytes == len(text.encode()) and found.unknown == 0
    assert encode(tokenizer, TEXT).tokens.numel() < len(TEXT.encode()) / 2


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_training_is_deterministic_and_a_stored_tokenizer_is_the_same(kind, tmp_path):
    tokenizer = train_tokenizer(TEXT, kind, 280)
    assert train_tokenizer(TEXT, kind, 280).to_str() == tokenizer.to_str()
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    assert torch.equal(encode(read_tokenizer(str(path)), TEXT).tokens, encode(tokenizer, TEXT).tokens)


@pytest.mark.parametrize("end", ["\n", " ", "    ", "\r"])
@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_chunks_of_lines_change_nothing(kind, end, monkeypatch):
    text = "".join(f"line {number} of text{end}" for number in range(300))
    tokenizer = train_tokenizer(text, kind, 290)
    whole = encode(tokenizer, text)
    monkeypatch.setattr(tokenized_text, "_CHUNK", 50)
    parts = encode(tokenizer, text)
    assert torch.equal(parts.tokens, whole.tokens) and parts[1:] == whole[1:]
    assert train_tokenizer(text, kind, 290).to_str() == tokenizer.to_str()


def test_files_of_wikitext_are_the_two_parts(tmp_path):
    for part in ("train", "valid", "test"):
        (tmp_path / f"wiki.{part}.tokens").write_text(f"the {part} text\n", encoding="utf-8")
    assert read_text_parts(DataConfig(path=str(tmp_path))) == ("the train text\n", "the valid text\n")


@pytest.mark.parametrize("beside", ["wiki.train.tokens.bak", "wiki.train.raw", "._wiki.train.tokens", "b.valid.txt"])
def test_other_files_beside_those_of_wikitext_are_left_out(tmp_path, beside):
    for name in ("wiki.train.tokens", "wiki.valid.tokens", beside):
        (tmp_path / name).write_text(f"the {name}\n", encoding="utf-8")
    assert read_text_parts(DataConfig(path=str(tmp_path))) == ("the wiki.train.tokens\n", "the wiki.valid.tokens\n")


def test_several_files_of_a_part_are_refused_until_the_glob_chooses(tmp_path):
    for name in ("a.train.txt", "a.valid.txt", "b.train.txt", "a.train.raw", "a.valid.raw"):
        (tmp_path / name).write_text(f"the {name}\n", encoding="utf-8")
    for glob in ("*.py", "*.txt", "*"):
        with pytest.raises(
            ValueError,
            match=r"data.path: expected one file \*.train.\* and one \*.valid.\* in .*, got a.train.raw, a.train.txt, "
            r"b.train.txt and a.valid.raw, a.valid.txt; choose one of each with data.glob",
        ):
            read_text_parts(DataConfig(path=str(tmp_path), glob=glob))
    for glob, ending in (("a.*.txt", "txt"), ("*.raw", "raw")):
        found = read_text_parts(DataConfig(path=str(tmp_path), glob=glob))
        assert found == (f"the a.train.{ending}\n", f"the a.valid.{ending}\n")


PARTS_OF_WIKITEXT = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.train.raw", "wiki.valid.raw")
SEVERAL = ("a.train.txt", "b.train.txt", "a.valid.txt")


@pytest.mark.parametrize("parts", [PARTS_OF_WIKITEXT, SEVERAL], ids=["wikitext", "several"])
@pytest.mark.parametrize(("glob", "read"), [("mine.txt", ["mine"]), ("*ne.t*", ["mine", "nine"]), ("*.md", ["deep"])])
def test_a_glob_that_matches_files_but_none_of_the_parts_reads_these_files(tmp_path, parts, glob, read):
    (tmp_path / "below").mkdir()
    for name in (*parts, "mine.txt", "nine.txt", "below/deep.md"):
        (tmp_path / name).write_text(f"{Path(name).stem}\n" * 8, encoding="utf-8")
    training, validation = read_text_parts(DataConfig(path=str(tmp_path), glob=glob, validation_fraction=0.25))
    assert sorted((training + validation).split()) == sorted(read * 8)


@pytest.mark.parametrize("glob", ["*.txt", "*", "a.train.txt", "*.raw"])
def test_a_glob_that_does_not_choose_one_of_each_part_is_refused_also_beside_wikitext(tmp_path, glob):
    for name in (*PARTS_OF_WIKITEXT[:3], *SEVERAL):
        (tmp_path / name).write_text(f"the {name}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="data.path: expected one file .*; choose one of each with data.glob"):
        read_text_parts(DataConfig(path=str(tmp_path), glob=glob))


def test_wikitext_is_read_where_the_glob_matches_nothing_or_is_the_default(tmp_path):
    for name in (*PARTS_OF_WIKITEXT, "prepare.py", "test/mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"the {name}\n" * 8, encoding="utf-8")
    wikitext = ("the wiki.train.tokens\n" * 8, "the wiki.valid.tokens\n" * 8)
    assert read_text_parts(DataConfig(path=str(tmp_path))) == wikitext
    assert read_text_parts(DataConfig(path=str(tmp_path), glob="*.md")) == wikitext
    assert read_text_parts(DataConfig(path=str(tmp_path), glob="mine.txt")) == wikitext  # below data.exclude


def test_any_text_is_split_behind_a_line_end(tmp_path):
    path = tmp_path / "text.txt"
    lines = [f"zeile {number} ü\n" for number in range(100)]
    path.write_text("".join(lines), encoding="utf-8")
    training, validation = read_text_parts(DataConfig(path=str(path), validation_fraction=0.25))
    assert training + validation == "".join(lines)
    assert training.endswith("\n") and validation.startswith("zeile")
    assert abs(len(validation.encode()) - 0.25 * path.stat().st_size) < 16


@pytest.mark.parametrize("between", [" ", "\r", " \t ", "\u3000 "], ids=["spaces", "CR", "tabs", "wide spaces"])
@pytest.mark.parametrize("end", ["", "\n", " \n\n"], ids=["no end", "line end", "blank lines"])
def test_a_text_of_a_single_line_is_split_at_white_space(tmp_path, between, end):
    path = tmp_path / "text8"
    words = [f"word{number}ü" for number in range(100)]
    path.write_bytes((between.join(words) + end).encode())
    training, validation = read_text_parts(DataConfig(path=str(path), validation_fraction=0.25))
    assert training + validation == between.join(words) + end
    assert training.split() + validation.split() == words and 20 <= len(validation.split()) <= 30


def test_data_and_tokenizers_that_cannot_be_used_are_refused_by_key(tmp_path):
    with pytest.raises(ValueError, match="data.path: .*'nowhere', which does not exist"):
        read_text_parts(DataConfig(path="nowhere"))
    path = tmp_path / "text.txt"
    path.write_bytes(b"line\n" * 9 + b"\xff\n" * 9)
    with pytest.raises(ValueError, match="data.path: expected text in UTF-8"):
        read_text_parts(DataConfig(path=str(path), validation_fraction=0.5))
    path.write_text("a-single-word")
    with pytest.raises(ValueError, match="data.path: .*the validation part is empty"):
        read_text_parts(DataConfig(path=str(path), validation_fraction=0.5))
    with pytest.raises(ValueError, match="task.tokenizer: .*path of a tokenizer.json, got 'word'"):
        read_tokenizer("word")
    with pytest.raises(ValueError, match="task.tokenizer: expected a file of the tokenizers library"):
        read_tokenizer(str(path))
    path.write_text('{"model": 1}')
    with pytest.raises(ValueError, match="task.tokenizer: expected a file of the tokenizers library"):
        read_tokenizer(str(path))
    for kind, least in (("words", 3), ("bpe", 257)):
        with pytest.raises(ValueError, match=f"task.vocabulary: expected {least} or more .* got 2"):
            train_tokenizer(TEXT, kind, 2)


def test_the_file_that_is_no_text_is_named_with_the_place_in_it(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("line\n" * 20)
    (tmp_path / "broken.txt").write_bytes(b"four" * 2 + b"\xff\n")
    for fraction in (0.1, 0.9):
        with pytest.raises(ValueError, match="data.path: expected text in UTF-8 .*broken.txt: .* 0xff in position 8:"):
            read_text_parts(DataConfig(path=str(tmp_path), glob="*.txt", validation_fraction=fraction))


def test_training_does_not_write_over_the_terminal(capfd):
    train_tokenizer(TEXT, "bpe", 280)
    out, err = capfd.readouterr()
    assert out + err == ""


def test_a_folder_without_named_parts_is_read_by_the_glob(tmp_path: Path):
    (tmp_path / "a.train.txt").write_text("one\n" * 8)
    (tmp_path / "b.txt").write_text("two\n" * 8)
    training, validation = read_text_parts(DataConfig(path=str(tmp_path), glob="*.txt", validation_fraction=0.25))
    assert sorted((training + validation).split()) == ["one"] * 8 + ["two"] * 8


def test_a_tokenizer_whose_numbers_have_gaps_counts_up_to_the_largest(tmp_path):
    path = tmp_path / "tokenizer.json"
    stored = train_tokenizer(TEXT, "words", 5).to_str().replace('"cat": 4', '"cat": 9').replace('"cat":4', '"cat":9')
    path.write_text(stored)
    tokenizer = read_tokenizer(str(path))
    assert token_count(tokenizer) == 10 == int(encode(tokenizer, TEXT).tokens.max()) + 1


@pytest.mark.parametrize("length", [8, 10_000])
def test_a_tokenizer_that_cuts_or_pads_what_a_model_reads_keeps_a_whole_text(tmp_path, length):
    tokenizer = train_tokenizer(TEXT, "words", 8)
    whole = encode(tokenizer, TEXT).tokens
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    assert torch.equal(encode(read_tokenizer(str(path)), TEXT).tokens, whole)


@pytest.mark.parametrize("text", ["many words " * 400, "\n" + "many words " * 400 + "\n", "of\nlines\n" * 300])
def test_no_chunk_is_much_longer_than_it_has_to_be(text, monkeypatch):
    monkeypatch.setattr(tokenized_text, "_CHUNK", 50)
    chunks = list(tokenized_text._chunks(text))
    assert "".join(chunks) == text and max(map(len, chunks)) <= 100
