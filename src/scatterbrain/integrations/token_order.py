"""Image tokens along a Hilbert curve inside a vision transformer's blocks, and in the model's order everywhere else.

Positions are added to the tokens before the first block, or rotate queries and keys by angles that come with them, so
blocks can take patches in any order. Along a Hilbert curve
every run of patches, which shares a list of keys, is a compact piece of the picture. Tokens are reordered once before
the first block and put back once at the end of the model's own forward.
"""

from __future__ import annotations

import functools
import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scatterbrain.integrations.permutation import Permutation, grid_permutation
from scatterbrain.nn.warn import warn

CURE = "or replace attention with token_order='natural'"

# -------------------- state of a running forward

PermutationFor = Callable[[Tensor], Permutation | None]
"""Called with the tokens before the first block; None leaves them in the model's order."""


class Running(threading.local):
    """The forward that the current thread runs: each thread may run one of the same model, as nn.DataParallel's do."""

    def __init__(self) -> None:
        self.pending: PermutationFor | None = None
        self.applied: Permutation | None = None


class Order:
    """Shared by an ordered model and what reorders its tokens: the permutation of the running forward.

    Args:
        prefix: tokens before the patches.
        is_strict: whether a call that cannot be ordered raises; otherwise it runs in the model's own order and warns.
    """

    def __init__(self, prefix: int, is_strict: bool) -> None:
        self.prefix, self.is_strict = prefix, is_strict
        self.running = Running()

    def enter(self, tokens: Tensor) -> Permutation | None:
        """The permutation of these tokens before the first block; None leaves them as they are."""
        running = self.running
        running.applied = None if running.pending is None else running.pending(tokens)
        return running.applied

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "is_strict": self.is_strict}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["prefix"], state["is_strict"])

    def refuse(self, reason: str, error: type[Exception] = ValueError) -> None:
        """A call cannot be ordered."""
        if self.is_strict:
            raise error(f"token_order: {reason}, {CURE}")
        warn(f"token_order='auto' leaves the tokens of this call in the model's own order: {reason}", 2)

    def on_grid(self, height: int, width: int, device: torch.device) -> Permutation:
        """The permutation of images whose patches form one grid."""
        return grid_permutation(height, width, self.prefix, device)


class EntryHook:
    """Forward hook of the module that returns the tokens before the first block."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        permutation = self.order.enter(output)
        return output if permutation is None else permutation.apply(output)


class RotationHook:
    """Forward hook of the module that returns the rotations of the patches, called after :class:`EntryHook`."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def __call__(self, module: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        permutation = self.order.running.applied
        return output if permutation is None else tuple(map(permutation.apply_to_patches, output))


class Family(ABC):
    """How the tokens of one family of models are ordered."""

    METHODS: tuple[str, ...] = ("forward",)  # each takes images and returns tokens
    INSIDE: tuple[str, ...] = ()  # submodules that see tokens along the curve
    BEHIND: tuple[str, ...] = ()  # paths of those that are given them all behind INSIDE; a model may lack any of them

    def entries(self) -> dict[str, type[EntryHook | RotationHook]]:
        """Submodules that return the tokens before the first block, and whatever else the blocks get with them, with
        the hooks that let these take the order."""
        return {}

    def attach(self, model: nn.Module, order: Order) -> list[RemovableHandle]:
        """Adds the hooks."""
        return [getattr(model, name).register_forward_hook(hook(order)) for name, hook in self.entries().items()]

    def overrides(self, base: type[nn.Module]) -> dict[str, Any]:
        """Methods besides METHODS that an ordered class has instead of those of ``base``."""
        return {}

    @abstractmethod
    def prefix(self, model: nn.Module) -> int:
        """Class, register and distillation tokens, which stay before the patches."""

    def obstacle(self, model: nn.Module) -> str | None:
        """Why this model cannot be ordered; None if it can."""
        return None

    def refused(self, model: nn.Module, arguments: dict[str, Any]) -> str | None:
        """Why a call with these arguments cannot be ordered; None if it can."""
        return None

    @abstractmethod
    def prepare(self, model: nn.Module, arguments: dict[str, Any]) -> PermutationFor:
        """The permutation for a call with these arguments. May change the arguments, such as masks over tokens."""

    @abstractmethod
    def put_back(self, permutation: Permutation, out: Any) -> Any:
        """The output of a method with its tokens in the model's order."""

    def run(self, model: nn.Module, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """``function`` of the model with its tokens along the curve between entry and output."""
        order: Order | None = getattr(model, "_token_order", None)
        # A new instance of an ordered class has no order. When one of METHODS calls another, the outer one puts the
        # tokens back.
        if order is None or order.running.pending is not None:
            return function(model, **arguments)
        for reason, error in (
            (hook_inside(model, self), RuntimeError),
            (self.refused(model, arguments), ValueError),
        ):
            if reason is not None:
                order.refuse(reason, error)
                return function(model, **arguments)
        running = order.running
        running.pending = self.prepare(model, arguments)
        try:
            out = function(model, **arguments)
            return out if running.applied is None else self.put_back(running.applied, out)
        finally:
            running.pending = running.applied = None


# Modules whose hooks work on tokens in any order, or whose results are put back with the outputs.
HARMLESS_HOOKS = ("torch.", "scatterbrain.", "transformers.utils.output_capturing")


def hook_inside(model: nn.Module, family: Family) -> str | None:
    """What a hook of somebody else would see along the curve; None without one."""
    for path, of_forward, of_backward in _hooks_inside(model, family):
        kinds = (("forward", "tokens", of_forward), ("backward", "gradients of tokens", of_backward))
        for kind, sees, hooks in kinds:
            if not all(map(_is_harmless, hooks)):
                return (
                    f"a {kind} hook on {path} would see {sees} in the order of a Hilbert curve; take "
                    "intermediate outputs from forward_intermediates (timm) or output_hidden_states=True "
                    "(transformers), which are in the model's order"
                )
    return None


def _hooks_inside(model: nn.Module, family: Family) -> Iterator[tuple[str, tuple, tuple]]:
    """(name of a module, its forward hooks, its backward hooks), those that get something along the curve."""
    for name in family.INSIDE:
        for path, module in getattr(model, name).named_modules(prefix=name):
            yield path, _forward_hooks(module), _backward_hooks(module)
    for path in family.BEHIND:  # but not what is inside of them, which is given what they made of the tokens
        module = functools.reduce(lambda part, name: getattr(part, name, None), path.split("."), model)
        if module is not None:
            yield path, _forward_hooks(module), _backward_hooks(module)
    for name in family.entries():
        module = getattr(model, name)
        hooks = tuple(module._forward_hooks.values())
        own = [isinstance(hook, (EntryHook, RotationHook)) for hook in hooks]
        yield name, hooks[own.index(True) :] if any(own) else (), _backward_hooks(module)
    of_all = torch.nn.modules.module
    forward = (*of_all._global_forward_pre_hooks.values(), *of_all._global_forward_hooks.values())
    backward = (*of_all._global_backward_pre_hooks.values(), *of_all._global_backward_hooks.values())
    yield "every module", forward, backward


def _forward_hooks(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    return *module._forward_pre_hooks.values(), *module._forward_hooks.values()


def _backward_hooks(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    return *module._backward_pre_hooks.values(), *module._backward_hooks.values()


def _is_harmless(hook: Callable[..., Any]) -> bool:
    hook = getattr(hook, "func", hook)  # of functools.partial
    return str(getattr(hook, "__module__", "")).startswith(HARMLESS_HOOKS)


def warn_of_dropped_patches() -> None:
    """Patch dropout keeps patches in random order and no grid, so there is no order to put them back from."""
    warn("token_order has no effect in training with patch dropout, which shuffles the patches that it keeps", 2)


# -------------------- ordered classes


def order_tokens(model: nn.Module, name: str, family: Family, is_strict: bool) -> Callable[[], None]:
    """Orders the tokens of ``model`` in place, by changing its class and adding a hook.

    Args:
        model: a vision transformer of the family.
        name: key of the family in :data:`FAMILIES`.
        is_strict: as :class:`Order`.

    Returns:
        The function that undoes it, and does nothing if :func:`restore_order` has undone it before.
    """
    base = type(model)
    model._token_order = order = Order(family.prefix(model), is_strict)
    model._token_order_hooks = family.attach(model, order)
    model.__class__ = ordered_class(name, base)

    def undo() -> None:
        if getattr(model, "_token_order", None) is order:
            restore_order(model)

    return undo


def restore_order(model: nn.Module) -> None:
    """The tokens of a model that :func:`order_tokens` has ordered stay in its own order again.

    Raises:
        RuntimeError: the model's class was changed since.
    """
    _, base = type(model).__dict__.get("ORDERED", (None, None))
    if base is None:
        raise RuntimeError(
            f"restore: the model's class was changed to {type(model).__name__} after its tokens were ordered; undo "
            "that first"
        )
    for handle in model._token_order_hooks:
        handle.remove()
    del model._token_order, model._token_order_hooks
    model.__class__ = base


@contextmanager
def natural_order(model: nn.Module) -> Iterator[None]:
    """Inside, ordered models in ``model`` run in their own order, in this thread."""
    orders = [module._token_order for module in model.modules() if hasattr(module, "_token_order")]
    for order in orders:
        order.running.pending = lambda tokens: None  # as inside of a method that puts nothing back
    try:
        yield
    finally:
        for order in orders:
            order.running.pending = order.running.applied = None


FAMILIES: dict[str, Family] = {}


@functools.cache
def ordered_class(name: str, base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``base`` of the same name, whose METHODS reorder tokens around those of ``base``."""
    family = FAMILIES[name]
    own: dict[str, Any] = {method: _wrapped(family, getattr(base, method)) for method in family.METHODS}
    own |= family.overrides(base)
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
    # Pickle would find the base class under this class's name, so the class is made again.
    return _blank, type(self).ORDERED, self.__dict__


def _blank(name: str, base: type[nn.Module]) -> nn.Module:
    cls = ordered_class(name, base)
    return cls.__new__(cls)
