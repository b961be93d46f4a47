"""Image tokens along a Hilbert curve inside a vision transformer's blocks, and in their own order everywhere else.

The blocks of a vision transformer do not know where a token lies: positions were added before them. So patches may pass
them in any order, and along a Hilbert curve every run of them, which shares a list of keys, is a compact piece of the
picture. The tokens are reordered once before the first block and put back once, at the end of the model's own forward.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain.hilbert import hilbert_distance, hilbert_order, inverse_order

# -------------------- permutations


@functools.lru_cache(maxsize=32)
def _grid_orders(height: int, width: int, prefix: int, device: torch.device) -> tuple[Tensor, Tensor]:
    patches = hilbert_order(height, width)
    order = torch.cat([torch.arange(prefix), patches + prefix])
    return order.to(device), inverse_order(order).to(device)


@torch.library.custom_op("scatterbrain::grid_order", mutates_args=())
def _grid_order(height: int, width: int, prefix: int, inverse: bool, device: torch.device) -> Tensor:
    """What compiled graphs call, whose sizes may be symbols. A copy, since a graph may write over what it is given."""
    return _grid_orders(height, width, prefix, device)[inverse].clone()


@_grid_order.register_fake
def _(height: int, width: int, prefix: int, inverse: bool, device: torch.device) -> Tensor:
    return torch.empty(prefix + height * width, dtype=torch.int64, device=device)


def coordinate_order(coordinates: Tensor, valid: Tensor | None, prefix: int) -> Tensor:
    """Order of tokens that carry their coordinates, row by row of the batch.

    Args:
        coordinates: integers (batch, patches, 2), row and column.
        valid: bool (batch, patches), False = padding, which keeps its place; None for no padding.
        prefix: tokens before the patches.

    Returns:
        int64 (batch, prefix + patches): entry t is the number of the t-th token.
    """
    batch, patches, _ = coordinates.shape
    side = 1 << max(patches - 1, 1).bit_length()  # no grid of so many patches has a longer side
    distance = hilbert_distance(coordinates[..., 0].clamp(0, side - 1), coordinates[..., 1].clamp(0, side - 1), side)
    if valid is None:
        order = distance.argsort(dim=-1, stable=True)
    else:
        tokens = distance.masked_fill(~valid, side * side).argsort(dim=-1, stable=True)
        slots = (~valid).to(torch.int8).argsort(dim=-1, stable=True)
        order = torch.empty_like(tokens).scatter_(1, slots, tokens)
    first = torch.arange(prefix, device=order.device).expand(batch, prefix)
    return torch.cat([first, order + prefix], 1)


class Permutation:
    """An order of (prefix + patches) tokens, the same for every row of the batch or one for each."""

    def __init__(self, order: Tensor, inverse: Tensor, prefix: int) -> None:
        self.order, self.inverse, self.prefix = order, inverse, prefix

    def apply(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, ...) into this order."""
        return _take(tokens, self.order)

    def undo(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, ...) back from this order."""
        return _take(tokens, self.inverse)

    def undo_patches(self, patches: Tensor) -> Tensor:
        """Patches without their prefix, (batch, patches, channels) or (batch, channels, height, width), back."""
        inverse = self.inverse[..., self.prefix :] - self.prefix
        if patches.dim() == 3:
            return _take(patches, inverse)
        return patches.flatten(2).index_select(2, inverse).view_as(patches)

    def undo_pairs(self, weights: Tensor) -> Tensor:
        """Attention weights (batch, heads, tokens, tokens) back."""
        return weights.index_select(2, self.inverse).index_select(3, self.inverse)


def _take(tokens: Tensor, order: Tensor) -> Tensor:
    if order.dim() == 1:
        return tokens.index_select(1, order)
    return tokens.gather(1, order[..., None].expand(*order.shape, tokens.shape[2]))


# -------------------- state of a running forward

PermutationFor = Callable[[Tensor], "Permutation | None"]


class Order:
    """What an ordered model and the hook before its first block share: the permutation of the forward that runs."""

    def __init__(self, prefix: int) -> None:
        self.prefix = prefix
        self.pending: PermutationFor | None = None
        self.applied: Permutation | None = None

    def on_grid(self, height: int, width: int, device: torch.device) -> Permutation:
        """The permutation of images whose patches form one grid."""
        if torch.compiler.is_compiling():
            order, inverse = (_grid_order(height, width, self.prefix, which, device) for which in (False, True))
        else:
            order, inverse = _grid_orders(height, width, self.prefix, device)
        return Permutation(order, inverse, self.prefix)


class EntryHook:
    """Forward hook of the module whose output are the tokens before the first block."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self.order.pending is None:
            return output
        self.order.applied = self.order.pending(output)
        return output if self.order.applied is None else self.order.applied.apply(output)


class Family(ABC):
    """How models of one kind are ordered."""

    METHODS: tuple[str, ...] = ("forward",)  # each takes images and returns tokens
    INSIDE: tuple[str, ...] = ()  # submodules that see tokens along the curve

    @abstractmethod
    def entry(self, model: nn.Module) -> nn.Module:
        """The module whose output are the tokens before the first block."""

    @abstractmethod
    def prefix(self, model: nn.Module) -> int:
        """Class, register and distillation tokens, which stay before the patches."""

    def obstacle(self, model: nn.Module) -> str | None:
        """Why this model cannot be ordered; None if it can."""
        return None

    @abstractmethod
    def prepare(self, model: nn.Module, arguments: dict[str, Any]) -> PermutationFor:
        """The permutation for a call with these arguments, which may be changed."""

    @abstractmethod
    def put_back(self, permutation: Permutation, out: Any) -> Any:
        """The output of a method with its tokens in their own order."""

    def run(self, model: nn.Module, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """``function`` of the model with its tokens along the curve between entry and output."""
        order: Order | None = getattr(model, "_token_order", None)
        # A new instance of an ordered class is not ordered; one of METHODS inside another lets that put the tokens back.
        if order is None or order.pending is not None:
            return function(model, **arguments)
        if not torch.compiler.is_compiling():
            check_hooks(model, self.INSIDE)
        order.pending = self.prepare(model, arguments)
        try:
            out = function(model, **arguments)
            return out if order.applied is None else self.put_back(order.applied, out)
        finally:
            order.pending = order.applied = None


# Code whose hooks work on tokens in any order, or whose finds are put back with the outputs.
HARMLESS_HOOKS = ("torch.", "scatterbrain.", "transformers.utils.output_capturing")


def check_hooks(model: nn.Module, inside: tuple[str, ...]) -> None:
    """Refuses forward hooks on modules that see tokens along the curve.

    Raises:
        RuntimeError: naming the module, and the way to intermediate outputs in the model's order.
    """
    for name in inside:
        for path, module in getattr(model, name).named_modules(prefix=name):
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                hook = getattr(hook, "func", hook)  # of functools.partial
                if not str(getattr(hook, "__module__", "")).startswith(HARMLESS_HOOKS):
                    raise RuntimeError(
                        f"token_order: a forward hook on {path} would see tokens in the order of a Hilbert curve; take "
                        "intermediate outputs from forward_intermediates (timm) or output_hidden_states=True "
                        "(transformers), which are in the model's order, or replace attention with token_order=None"
                    )


def warn_of_dropped_patches() -> None:
    """Patch dropout leaves no grid: its tokens come in random order, and nothing returns them to their places."""
    _warn("token_order has no effect in training with patch dropout, which shuffles the patches that it keeps")


@torch.compiler.assume_constant_result
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


# -------------------- ordered classes


def order_tokens(model: nn.Module, name: str, family: Family) -> Callable[[], None]:
    """Orders the tokens of ``model`` in place, by its class and a hook.

    Args:
        model: a vision transformer of the family.
        name: under which :data:`FAMILIES` holds the family.

    Returns:
        The function that undoes it.
    """
    base = type(model)
    model._token_order = Order(family.prefix(model))
    handle = family.entry(model).register_forward_hook(EntryHook(model._token_order))
    model.__class__ = ordered = ordered_class(name, base)

    def undo() -> None:
        if type(model) is not ordered:
            raise RuntimeError(
                f"restore: the model's class was changed to {type(model).__name__} after its tokens were ordered; undo "
                "that first"
            )
        handle.remove()
        del model._token_order
        model.__class__ = base

    return undo


FAMILIES: dict[str, Family] = {}


@functools.cache
def ordered_class(name: str, base: type[nn.Module]) -> type[nn.Module]:
    """``base``, under its own name, with the family's methods around its own."""
    family = FAMILIES[name]
    own: dict[str, Any] = {method: _wrapped(family, getattr(base, method)) for method in family.METHODS}
    own |= {"ORDERED": (name, base), "__reduce_ex__": _reduce}
    own |= {field: getattr(base, field) for field in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (base,), own)


def _wrapped(family: Family, function: Callable[..., Any]) -> Callable[..., Any]:
    names = tuple(inspect.signature(function).parameters)[1:]

    @functools.wraps(function)
    def ordered(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return family.run(self, function, {**dict(zip(names, args)), **kwargs})

    return ordered


def _reduce(self: nn.Module, protocol: int) -> tuple:
    # The class has its base's name, so it is made again rather than found.
    return _blank, type(self).ORDERED, self.__dict__


def _blank(name: str, base: type[nn.Module]) -> nn.Module:
    cls = ordered_class(name, base)
    return cls.__new__(cls)
