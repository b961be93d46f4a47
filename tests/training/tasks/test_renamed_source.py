from __future__ import annotations

import io
import re
import tokenize

import pytest
import torch

from scatterbrain.training.config import DataConfig
from scatterbrain.training.tasks import renamed_source
from scatterbrain.training.tasks.documents import Document, read_documents
from scatterbrain.training.tasks.randomness import generator_of
from scatterbrain.training.tasks.renamed_source import KEPT, RenamedSource, find_names

SOURCE = b'''import os  # os is used below
def area(width, height=0x1F):
    """The area of width by height."""
    name, text = 'it\\'s width', rb"""height
 width""" + b"area"
    if width > 1e5: return width * height
    return area(os, width), f'{width}', 'unfinished
'''


def data(source: bytes = SOURCE, tokens: int = 200, distance: int = 0, seed: int = 0) -> RenamedSource:
    return RenamedSource([Document("a", source)], [Document("b", source)], tokens, distance, 2, seed)


def test_names_are_those_of_pythons_own_tokenizer():
    """Over a part of the standard library; a string that is not closed has no other judge than the test below."""
    documents = read_documents(DataConfig(exclude=(*DataConfig().exclude, "encodings", "pydoc_data")))
    checked = 0
    for document in [document for document in documents if b"\n" in document.text][:60]:
        found = tokenize.tokenize(io.BytesIO(document.text).readline)
        # An f-string is one token before Python 3.12 and several, with names, since.
        if re.search(rb"\b[rR]?[fF][rR]?['\"]", document.text):
            continue
        expected = [t.string.encode() for t in found if t.type == tokenize.NAME and t.string.encode() not in KEPT]
        assert [name.text for name in find_names(document.text)] == expected, document.name
        checked += len(expected)
    assert checked > 10_000


def test_names_in_comments_strings_and_keywords_are_left_out():
    found = find_names(SOURCE)
    assert [SOURCE[name.start : name.end] for name in found] == [name.text for name in found]
    assert b" ".join(name.text for name in found) == (
        b"os area width height name text width width height area os width"
    )


def renamed_back(text: bytes, source: bytes) -> dict[bytes, set[bytes]]:
    """The names of ``source`` with what stands for them in ``text``, by walking both side by side."""
    found: dict[bytes, set[bytes]] = {}
    place = 0
    end = 0
    for name in find_names(source):
        between = source[end : name.start]
        assert text[place : place + len(between)] == between[: len(text) - place]
        place, end = place + len(between), name.end
        match = re.compile(rb"[a-z]{4,8}").match(text, place)
        if match is None or match.end() == len(text):  # cut by the sequence's end
            return found
        found.setdefault(name.text, set()).add(match.group())
        place = match.end()
    return found


def test_a_name_has_one_random_name_in_a_sequence_and_another_in_the_next():
    whole = data(tokens=300)  # more than the source has, so it starts at the first line
    rows = [bytes(whole.sequence([SOURCE], generator_of(seed)).text.tolist()) for seed in (0, 1)]
    maps = [renamed_back(row, SOURCE) for row in rows]
    for mapping in maps:
        assert mapping.keys() >= {b"os", b"area", b"width", b"height"}
        assert all(len(names) == 1 for names in mapping.values())
        assert len(set.union(*mapping.values())) == len(mapping)
    assert not set.union(*maps[0].values()) & set.union(*maps[1].values())


def test_distances_are_those_to_the_nearest_earlier_occurrence():
    sequence = data(b"import os\nx = os\ny = x\n", tokens=40).sequence([b"import os\nx = os\ny = x\n"], generator_of(3))
    text = bytes(sequence.text.tolist())
    assert len(text) == 41 == sequence.distance.numel()
    assert text.startswith(b"import ")
    seen: dict[bytes, int] = {}
    for match in re.finditer(rb"[a-z]+|[^a-z]+", text):
        distance = set(sequence.distance[slice(*match.span())].tolist())
        if not match.group().isalpha() or match.group() == b"import":
            assert distance == {-1}
        else:
            if match.end() < len(text):
                assert distance == {match.start() - seen[match.group()] if match.group() in seen else 0}
            seen[match.group()] = match.start()
    assert len(seen) >= 3


def test_training_scores_every_byte_and_validation_far_names_alone():
    batches = data(distance=60)
    training = batches.training_batch(0, 0.0)
    assert training.inputs.shape == training.targets.shape == (2, 200)
    assert torch.equal(training.inputs[:, 1:], training.targets[:, :-1]) and training.mask is None
    validation = batches.validation_batch(0)
    scored = validation.targets != -100
    assert scored.any()
    assert torch.equal(validation.targets[:, :-1][scored[:, :-1]], validation.inputs[:, 1:][scored[:, :-1]])
    for row, kept in zip(validation.inputs.tolist(), scored.tolist(), strict=True):
        text = bytes(row)
        for place, is_scored in enumerate(kept[:-1]):
            if is_scored:
                name = next(m for m in re.finditer(rb"[a-z]+", text) if m.start() <= place + 1 < m.end())
                if name.end() < len(text):
                    before = text.rfind(name.group(), 0, name.start())
                    assert before >= 0 and name.start() - before >= 60
    all_bytes = data(distance=0).validation_batch(0)
    assert (all_bytes.targets != -100).all()


def test_every_validation_sequence_has_scored_bytes_or_the_distance_is_refused():
    far = b"name = 1\n" + b"# filler\n" * 10 + b"name\n"
    documents = [Document("far", far), *(Document(f"{i}", b"# nothing\n" * 30) for i in range(6))]
    batches = RenamedSource(documents, documents, 105, 64, 2, 0)
    for number in range(6):
        assert (batches.validation_batch(number).targets != -100).any(dim=1).all()
    with pytest.raises(ValueError, match="task.distance: expected validation texts in which names come again 64"):
        RenamedSource(documents, documents[1:], 105, 64, 2, 0).validation_batch(0)


def test_a_sequence_goes_on_with_another_document_and_keeps_its_names():
    batches = data(b"common = 1\n", tokens=100)
    text = bytes(batches.sequence([b"common = 1\n"], generator_of(0)).text.tolist())
    assert len(set(re.findall(rb"[a-z]{4,8} =", text))) == 1 and text.count(b" = 1\n\n") >= 5


def test_a_long_document_starts_at_any_of_its_lines():
    source = b"".join(b"# %04d\n" % number for number in range(100))
    batches = data(source, tokens=70)
    starts = {bytes(batches.sequence([source], generator_of(seed)).text[:6].tolist()) for seed in range(300)}
    assert len(starts) > 70 and all(re.fullmatch(rb"# \d{4}", start) for start in starts)


def test_batches_are_functions_of_number_and_seed_and_validation_of_the_number_alone():
    one, two = data(seed=0), data(seed=1)
    assert torch.equal(one.training_batch(4, 0.1).inputs, one.training_batch(4, 0.7).inputs)
    assert not torch.equal(one.training_batch(4).inputs, one.training_batch(5).inputs)
    assert not torch.equal(one.training_batch(4).inputs, two.training_batch(4).inputs)
    assert torch.equal(one.validation_batch(4).inputs, two.validation_batch(4).inputs)
    rows = one.training_batch(4).inputs
    assert not torch.equal(rows[0], rows[1])


def test_random_names_are_never_the_same(monkeypatch):
    monkeypatch.setattr(renamed_source, "_LETTERS", b"ab" * 13)  # 496 names in all
    source = b" ".join(b"n%d" % number for number in range(200))
    batches = data(source, tokens=1000)
    names = bytes(batches.sequence([source], generator_of(0)).text.tolist()).split()[:-1]
    assert len(set(names)) == len(names) > 100
    assert {len(name) for name in names} == {4, 5, 6, 7, 8}
