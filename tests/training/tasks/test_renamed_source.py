from __future__ import annotations

import io
import re
import tokenize

import pytest
import torch

from scatterbrain.training.config import DataConfig
from scatterbrain.training.tasks.documents import Document, read_documents
from scatterbrain.training.tasks.names import Names
from scatterbrain.training.tasks.randomness import generator_of
from scatterbrain.training.tasks.renamed_source import FIRST_NAME, KEYWORDS, RenamedSource, lexemes

SOURCE = b'''import os  # os is used below
def area(width, height=0x1F):
    """The area of width by height."""

    name, text = 'it\\'s width', rb"""height
 width""" + b"area"
    if width > 1e5: return width * height
    return area(os, width), f'{width}', 'unfinished
'''
NUMBER, STRING, NEWLINE = (ord(character) for character in '0"\n')


def data(
    source: bytes = SOURCE, tokens: int = 200, distance: int = 0, seed: int = 0, names: int = 64, repeats=0.0
) -> RenamedSource:
    return RenamedSource([Document("a", source)], [Document("b", source)], tokens, names, distance, repeats, 2, seed)


def told(source: bytes) -> list[bytes]:
    """Lexemes for people: names and keywords by themselves, other tokens as their byte."""
    return [
        one.name if one.token is None else KEYWORDS[one.token - 256] if one.token >= 256 else bytes([one.token])
        for one in lexemes(source)
    ]


def of_python(source: bytes) -> list[bytes]:
    """The same by Python's own tokenizer, without ends of lines."""
    found = []
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.OP:
            found += [bytes([byte]) for byte in token.string.encode()]
        elif token.type in (tokenize.NAME, tokenize.STRING, tokenize.NUMBER):
            found.append({tokenize.STRING: b'"', tokenize.NUMBER: b"0"}.get(token.type, token.string.encode()))
    return found


def test_lexemes_are_those_of_pythons_own_tokenizer():
    """Over a part of the standard library; a string that is not closed has no other judge than the test below."""
    documents = read_documents(DataConfig(exclude=(*DataConfig().exclude, "encodings", "pydoc_data")))
    checked = 0
    for document in [document for document in documents if b"\n" in document.text][:60]:
        # An f-string is one token before Python 3.12 and several, with names, since.
        if re.search(rb"\b[rR]?[fF][rR]?['\"]", document.text):
            continue
        expected = of_python(document.text)
        assert [one for one in told(document.text) if one != b"\n"] == expected, document.name
        checked += len(expected)
    assert checked > 30_000


def test_comments_and_spaces_are_left_out_and_a_string_is_one_token():
    expected = (
        b'import os | def area ( width , height = 0 ) : | " | name , text = " , " + " | if width > 0 : return width '
        b'* height | return area ( os , width ) , " , " |'
    )
    assert told(SOURCE) == [b"\n" if part == b"|" else part for part in expected.split()]
    assert all(SOURCE.startswith(one.name, one.start) for one in lexemes(SOURCE) if one.name is not None)


def test_a_name_has_one_random_token_in_a_sequence_and_another_in_the_next():
    source, found = data(tokens=300), lexemes(SOURCE)  # more than the source has, so it starts at the first line
    rows = [source.sequence([SOURCE], generator_of(seed)).tokens.tolist() for seed in (0, 1)]
    maps = []
    for row in rows:
        assert [token if token < FIRST_NAME else None for token in row[: len(found)]] == [one.token for one in found]
        numbers = {one.name: token for one, token in zip(found, row) if one.name is not None}
        assert [numbers.get(one.name, token) for one, token in zip(found, row)] == row[: len(found)]
        assert len(set(numbers.values())) == len(numbers) == 6 and max(numbers.values()) < FIRST_NAME + 64
        maps.append(numbers)
    assert sum(maps[0][name] == maps[1][name] for name in maps[0]) < 3


def test_distances_are_those_to_the_nearest_earlier_occurrence():
    source = b"import os\nx = os\ny = x\n"  # import os | x = os | y = x |
    sequence = data(source, tokens=10).sequence([source], generator_of(3))
    assert sequence.distance.tolist() == [-1, 0, -1, 0, -1, 4, -1, 0, -1, 6, -1]
    assert sequence.tokens[1] == sequence.tokens[5] and sequence.tokens[3] == sequence.tokens[9]


def test_training_scores_every_token_and_validation_far_names_alone():
    batches = data(distance=20)
    training = batches.training_batch(0, 0.0)
    assert training.inputs.shape == training.targets.shape == (2, 200)
    assert torch.equal(training.inputs[:, 1:], training.targets[:, :-1]) and training.mask is None
    validation = batches.validation_batch(0)
    scored = validation.targets != -100
    assert torch.equal(validation.targets[:, :-1][scored[:, :-1]], validation.inputs[:, 1:][scored[:, :-1]])
    for row, kept in zip(validation.inputs.tolist(), scored.tolist(), strict=True):
        for place in range(1, len(row)):
            before = [earlier for earlier in range(place) if row[earlier] == row[place]]
            is_far = row[place] >= FIRST_NAME and before != [] and place - before[-1] >= 20
            assert kept[place - 1] == is_far
    assert scored.any() and (data(distance=0).validation_batch(0).targets != -100).all()


def test_sequences_grow_and_a_batch_has_fewer_of_them():
    task = Names(tokens=512, names=64, distance=256, first_tokens=64, first_share=0.25, full_share=0.75)
    shares = (0.0, 0.24, 0.25, 0.3, 0.5, 0.6, 0.75, 1.0)
    assert [task.tokens_at(share, 512) for share in shares] == [64, 64, 64, 128, 256, 512, 512, 512]
    assert Names(tokens=512).tokens_at(0.0, 512) == 512
    documents = [Document("a", SOURCE)]
    batches = RenamedSource(documents, documents, 512, 64, 0, 0.5, 2, 0, lambda fraction: task.tokens_at(fraction, 512))
    short, long = batches.training_batch(3, 0.0), batches.training_batch(3, 1.0)
    assert short.inputs.shape == (16, 64) and long.inputs.shape == (2, 512)
    assert torch.equal(long.inputs, batches.training_batch(3, 0.8).inputs)
    assert batches.validation_batch(0).inputs.shape == (2, 512)


def test_every_validation_sequence_has_scored_tokens_or_the_distance_is_refused():
    far = b"name = 1\n" + b"1\n" * 40 + b"name\n"
    documents = [Document("far", far), *(Document(f"{i}", b"2\n" * 100) for i in range(6))]
    batches = RenamedSource(documents, documents, 105, 8, 64, 0.0, 2, 0)
    for number in range(6):
        assert (batches.validation_batch(number).targets != -100).any(dim=1).all()
    with pytest.raises(ValueError, match="task.distance: expected validation texts in which names come again 64"):
        RenamedSource(documents, documents[1:], 105, 8, 64, 0.0, 2, 0).validation_batch(0)


def test_a_sequence_goes_on_with_another_document_and_keeps_its_names():
    source = b"common = 1\n"
    tokens = data(source, tokens=99).sequence([source], generator_of(0)).tokens
    assert torch.equal(tokens.view(20, 5)[0].expand(20, 5), tokens.view(20, 5))


def test_a_long_document_starts_at_any_of_its_lines():
    source = b"".join(b"+" * number + b"-\n" for number in range(100))
    batches = data(source, tokens=70)
    starts = [batches.sequence([source], generator_of(seed)).tokens.tolist() for seed in range(600)]
    lengths = {start.index(ord("-")) for start in starts if ord("-") in start}
    assert len(lengths) > 50 and all(start[0] == ord("+") or start[0] == ord("-") for start in starts)


def test_batches_are_functions_of_number_and_seed_and_validation_of_the_number_alone():
    one, two = data(seed=0), data(seed=1)
    assert torch.equal(one.training_batch(4, 0.1).inputs, one.training_batch(4, 0.7).inputs)
    assert not torch.equal(one.training_batch(4).inputs, one.training_batch(5).inputs)
    assert not torch.equal(one.training_batch(4).inputs, two.training_batch(4).inputs)
    assert torch.equal(one.validation_batch(4).inputs, two.validation_batch(4).inputs)
    rows = one.training_batch(4).inputs
    assert not torch.equal(rows[0], rows[1])


def test_the_name_not_seen_for_longest_gives_its_token_to_a_new_one():
    source = b"a b c a d\n"  # of three tokens d takes that of b
    sequence = data(source, tokens=4, names=3).sequence([source], generator_of(0))
    a, b, c, again, d = sequence.tokens.tolist()
    assert len({a, b, c}) == 3 and again == a and d == b
    assert sequence.distance.tolist() == [0, 0, 0, 3, 0]


def test_a_share_of_passages_repeats_whole_lines_from_far_before():
    source = b"".join(b"left%d right%d\n" % (line, line) for line in range(2000))  # no name comes again by itself
    tokens, distance = 4499, 300
    shares = []
    for seed in range(6):
        batches = data(source, tokens=tokens, distance=distance, names=4000, repeats=0.5)
        found = batches.sequence([source], generator_of(seed))
        lines = found.tokens.view(-1, 3)
        assert (lines[:, 2] == NEWLINE).all() and (lines[:, :2] >= FIRST_NAME).all()
        first = {}
        for place, (token, behind) in enumerate(zip(found.tokens.tolist(), found.distance.tolist(), strict=True)):
            assert (behind > 0) == (token in first and token != NEWLINE)
            assert place - first.setdefault(token, place) >= distance or behind <= 0
        partners = {left: right for left, right in lines[:, :2].tolist()}
        assert len(partners) == len(set(partners.values())), "a name was repeated beside another one than before"
        shares.append(float((found.distance > 0).sum() / (found.distance >= 0).sum()))
    assert 0.4 < sum(shares) / len(shares) < 0.55
    assert data(source, tokens, distance, names=4000).sequence([source], generator_of(0)).distance.max() == 0
