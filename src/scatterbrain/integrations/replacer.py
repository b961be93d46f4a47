"""How families of attention modules are replaced, and which families are known."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Protocol

from torch import nn

from scatterbrain.integrations.restrictions import NotReplaceable, errors_as_reasons
from scatterbrain.low_rank import LowRank
from scatterbrain.nn.host_module import HostModule, attention_unless_exact
from scatterbrain.nn.pairs import Choice, Pairs
from scatterbrain.supports import Support


class Replacer(Protocol):
    """How one family of attention modules is replaced. :func:`register_replacer` adds one.

    A replacer whose modules have causal calls takes further arguments of ``replace``: ``causal_support``, the support
    of those calls, None for the same one, and ``causal_low_rank``, their kernel. One that must see the whole model
    first may have ``prepare(model)``, called before the first ``replace``.
    """

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is of this family."""

    def replace(self, module: nn.Module, support: Support, low_rank: LowRank) -> tuple[str, Callable[[], None]]:
        """Replaces attention in the module in place; its identity, parameters, hooks, mode and device stay.

        Returns:
            A note for the report ("" for none), and the function that undoes the replacement.

        Raises:
            NotReplaceable: with the reason; the module is then as it was.
        """


class ClassReplacer:
    """Modules of exactly the class ``original`` become ``host`` by changing their class. The objects stay, so
    references to the module or its parameters, in an optimizer for one, stay valid.

    Args:
        original: a class whose modules have ``num_heads`` and ``head_dim``, and ``num_kv_heads`` where keys and values
            have fewer heads.
        host: a subclass of HostModule and ``original``.
        dropout: note on the module's dropout of attention weights, which runs exactly in training; "" for none.
        refuse: raises NotReplaceable for modules that have no approximation.
        is_never_causal: models have no causal calls of these modules, which then remember nothing for them.
    """

    def __init__(
        self,
        original: type[nn.Module],
        host: type[HostModule],
        dropout: Callable[[nn.Module], str],
        refuse: Callable[[nn.Module], None] = lambda module: None,
        is_never_causal: bool = False,
    ) -> None:
        self.original, self.host, self.dropout, self.refuse = original, host, dropout, refuse
        self.is_never_causal = is_never_causal

    def matches(self, module: nn.Module) -> bool:
        return type(module) is self.original

    def replace(
        self,
        module: nn.Module,
        support: Support,
        low_rank: LowRank,
        causal_support: Support | None = None,
        causal_low_rank: Choice = ...,
    ) -> tuple[str, Callable[[], None]]:
        self.refuse(module)
        if "forward" in vars(module):
            raise NotReplaceable("its forward is overridden on the instance; replace attention before that is done")
        with errors_as_reasons():
            kv_heads = getattr(module, "num_kv_heads", None)
            pairs = Pairs(support, low_rank, causal_support, ... if self.is_never_causal else causal_low_rank)
            attention = attention_unless_exact(module.num_heads, module.head_dim, pairs, num_kv_heads=kv_heads)

        def undo() -> None:
            module._detach()
            module.__class__ = self.original

        module.__class__ = self.host
        module._attach(attention)
        return "" if attention is None else self.dropout(module), undo


REPLACERS: list[Replacer] = []
# Packages whose modules are replaced by scatterbrain.integrations.<package>, which registers its replacers on import.
PACKAGES: tuple[str, ...] = ("transformers", "timm", "diffusers")


def register_replacer(replacer: Replacer) -> None:
    """Adds a family of attention modules to :func:`replace_attention`; replacers registered later are asked first."""
    REPLACERS.insert(0, replacer)


def prepare_replacers(model: nn.Module) -> None:
    """Imports the replacers of those packages that ``model`` has modules of, so that no other package is imported, and
    shows all of them the model."""
    roots = {base.__module__.split(".")[0] for module in model.modules() for base in type(module).__mro__}
    for package in roots.intersection(PACKAGES):
        import_module(f"scatterbrain.integrations.{package}")
    for replacer in REPLACERS:
        prepare = getattr(replacer, "prepare", None)
        if prepare is not None:
            prepare(model)


def causal_arguments(replacer: Replacer, pairs: Pairs) -> dict[str, object]:
    """What a replacer that tells causal calls from others takes of their support and kernel."""
    taken = inspect.signature(replacer.replace).parameters
    return {name: getattr(pairs, name) for name in ("causal_support", "causal_low_rank") if name in taken}


def replacer_of(module: nn.Module) -> Replacer | None:
    """The replacer of the module's family; None if there is none."""
    return next((replacer for replacer in REPLACERS if replacer.matches(module)), None)
