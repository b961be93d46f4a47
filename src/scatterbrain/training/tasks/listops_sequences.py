"""Nested lists of digits under operators, and their values (Nangia and Bowman, NAACL-SRW 2018)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from scatterbrain.training.tasks.randomness import generator_of

Tree = int | list  # a digit, or an operator's index followed by its arguments

PADDING = 0
DIGIT = 1  # token of the digit 0; the others follow
OPERATOR = DIGIT + 10  # token of the first operator; the others follow
OPERATORS = ("MIN", "MAX", "MED", "SM")
CLOSE = OPERATOR + len(OPERATORS)
VOCABULARY = CLOSE + 1
NAMES = ("_", *map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]")
VALIDATION_SHARE = 8  # one sequence of so many, by its hash, is kept for validation
ATTEMPTS = 100_000  # draws after which a sequence is given up


class Shape(NamedTuple):
    """Which lists are drawn.

    Args:
        shortest, longest: tokens of a sequence, both included.
        depth: operators around a digit, at most.
        arguments: of an operator, at most; at least 2.
    """

    shortest: int
    longest: int
    depth: int
    arguments: int

    def usual_length(self) -> int:
        """Tokens of a list that is as deep everywhere as it may be, with the mean number of arguments."""
        arguments = (2 + self.arguments) / 2
        operators = sum(arguments**level for level in range(self.depth))
        return int(2 * operators + arguments**self.depth)

    def has_lists(self) -> bool:
        """Whether any list is as long as the shape says; for a longest list that is no longer than usual.

        Each of n operators takes its bracket and 2 to ``arguments`` arguments, in place of an argument of another but
        for the first. So lists have 1 + 3 n to 1 + (arguments + 1) n tokens, and with few arguments the lengths of n
        and n + 1 do not meet: two arguments make 4, 7, 10 and so on.
        """
        # No gap is wider than two lengths.
        lengths = range(max(self.shortest, self.longest - 2, 4), self.longest + 1)
        return any(1 + 3 * -(-(length - 1) // (self.arguments + 1)) <= length for length in lengths)


def draw_sequences(count: int, shape: Shape, seed: int, stream: str, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences of one part of the data.

    Args:
        count: Number of sequences.
        shape: Which lists are drawn.
        seed: Of the data.
        stream: "training" or "validation": a sequence's hash says which of them it belongs to.
        number: Of the batch.

    Returns:
        Tokens int64 (count, longest of these), values int64 (count,), and the mask bool (count, longest of these) that
        is True where a token is no padding.
    """
    uniform = uniform_numbers(generator_of(seed, "listops", stream, number))
    sequences: list[list[int]] = []
    values: list[int] = []
    rejected = 0
    while len(sequences) < count:
        tokens: list[int] = []
        value = write(draw_tree(shape, uniform), tokens)
        if len(tokens) >= shape.shortest and is_validation(tokens) == (stream == "validation"):
            sequences.append(tokens)
            values.append(value)
            rejected = 0
        elif (rejected := rejected + 1) >= ATTEMPTS:
            raise ValueError(
                f"task.shortest: expected lists for {stream} of {shape.shortest} to {shape.longest} tokens with depth "
                f"= {shape.depth} and arguments = {shape.arguments}, got none in {rejected} draws; lower it, or "
                "use a larger task.depth"
            )
    rows = [torch.tensor(tokens) for tokens in sequences]
    inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    return inputs, torch.tensor(values), inputs != PADDING


def is_validation(tokens: list[int]) -> bool:
    """Whether a sequence belongs to the validation part."""
    return hashlib.sha256(bytes(tokens)).digest()[0] % VALIDATION_SHARE == 0


def draw_tree(shape: Shape, uniform: Iterator[float]) -> list:
    """A list of a length drawn between the shape's two, up to two tokens shorter where no operator fits: digits become
    lists, each as likely as the others, until the length is reached."""
    length = below(shape.longest - shape.shortest + 1, uniform) + shape.shortest
    tree: list = [below(len(OPERATORS), uniform)]
    digits: list[tuple[list, int, int]] = []  # parent, place in it, operators around it

    def add_arguments(parent: list, depth: int, room: int) -> int:
        """Returns the number of tokens that the arguments take."""
        count = 2 + below(min(shape.arguments, room) - 1, uniform)
        for place in range(1, count + 1):
            parent.append(below(10, uniform))
            if depth < shape.depth:
                digits.append((parent, place, depth))
        return count

    used = 2 + add_arguments(tree, 1, length - 2)
    while digits and length - used >= 3:  # an operator, its bracket and two arguments in place of a digit
        chosen = below(len(digits), uniform)
        digits[chosen], digits[-1] = digits[-1], digits[chosen]
        parent, place, depth = digits.pop()
        parent[place] = [below(len(OPERATORS), uniform)]
        used += 1 + add_arguments(parent[place], depth + 1, length - used - 1)
    return tree


def write(tree: Tree, tokens: list[int]) -> int:
    """Appends the tokens of a tree, and returns its value."""
    if isinstance(tree, int):
        tokens.append(DIGIT + tree)
        return tree
    operator, *arguments = tree
    tokens.append(OPERATOR + operator)
    values = [write(argument, tokens) for argument in arguments]
    tokens.append(CLOSE)
    return value_of(OPERATORS[operator], values)


def value_of(operator: str, values: list[int]) -> int:
    """The value of an operator over digits. The median of an even number of them is the mean of the two in the middle,
    rounded down; SM is the sum modulo 10."""
    if operator == "MIN":
        return min(values)
    if operator == "MAX":
        return max(values)
    if operator == "SM":
        return sum(values) % 10
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def text_of(tokens: list[int]) -> str:
    """Tokens as they are read: "[MAX 2 9 [MIN 4 7 ] 0 ]"."""
    return " ".join(NAMES[token] for token in tokens if token != PADDING)


def below(bound: int, uniform: Iterator[float]) -> int:
    """An integer from 0 to below ``bound``."""
    return int(next(uniform) * bound)


def uniform_numbers(generator: torch.Generator) -> Iterator[float]:
    """Numbers from 0 to below 1, without end. One call of torch for many: a call for each would take longer than the
    rest."""
    while True:
        yield from torch.rand(4096, generator=generator, dtype=torch.float64).tolist()
