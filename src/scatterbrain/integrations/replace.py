"""Swapping the attention modules of a model in place, with a report of every one and a way back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Protocol

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from scatterbrain.integrations.restrictions import NotReplaceable, parallel_wrapper, query_by_query
from scatterbrain.low_rank import Favor, LowRank, Quadratic
from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.nn.multihead import LOW_RANK, SUPPORT, MultiheadAttention, attention_unless_exact
from scatterbrain.supports import SUPPORTS, Full, Support

# -------------------- report


@dataclass
class Entry:
    """One attention module of the model.

    Args:
        path: name of the module in the model; "" is the model itself.
        was: its class before.
        now: its class now; None if it was left as it was.
        note: why it was left, or what to know about the swap; "" for nothing.
    """

    path: str
    was: str
    now: str | None
    note: str = ""


@dataclass
class Report:
    """What :func:`replace_attention` did; ``print(report)`` shows it as a table.

    Args:
        settings: the support and the low-rank kernel of the modules that were swapped.
        entries: every module that looks like attention, in the model's order.
        notes: what was done beyond single modules, a line each: class tokens that attend exactly, token order.
    """

    settings: str
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[Entry]:
        """The modules that were swapped."""
        return [entry for entry in self.entries if entry.now is not None]

    @property
    def skipped(self) -> list[Entry]:
        """The modules that were left as they were."""
        return [entry for entry in self.entries if entry.now is None]

    def restore(self) -> None:
        """Gives every swapped module its own class and settings back. Weights stay as they are now, trained or not;
        what the attention inside owned (calibration, learned projections) is dropped. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        total = len(self.entries)
        summary = f"{len(self.replaced)} of {total} attention module{'' if total == 1 else 's'} replaced"
        if self.replaced:
            summary += f" with {self.settings}"
        summary = "\n".join([summary, *self.notes])
        if not self.entries:
            return summary
        header = ("module", "was", "now", "note")
        rows = [(e.path or "(the model)", e.was, e.now or "unchanged", e.note) for e in self.entries]
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, *rows)]
        return "\n".join([*lines, summary])


# -------------------- handlers


class Handler(Protocol):
    """How one family of attention modules is swapped. :func:`register_handler` adds one.

    A handler that must see the whole model first may have ``prepare(model)``, called before the first ``replace``.
    """

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is of this family."""

    def replace(self, module: nn.Module, support: Support, low_rank: LowRank) -> tuple[str, Callable[[], None]]:
        """Swaps the module in place, keeping its identity, parameters, hooks, mode and device.

        Returns:
            A note for the report ("" for none), and the function that undoes the swap.

        Raises:
            NotReplaceable: with the reason; the module is then as it was.
        """


class TorchHandler:
    """nn.MultiheadAttention becomes sb.MultiheadAttention by its class, so whoever holds the module or its parameters,
    an optimizer for one, still holds the right ones."""

    def matches(self, module: nn.Module) -> bool:
        return type(module) is nn.MultiheadAttention

    def replace(
        self, module: nn.MultiheadAttention, support: Support, low_rank: LowRank
    ) -> tuple[str, Callable[[], None]]:
        if module.bias_k is not None or module.add_zero_attn:
            name = "add_zero_attn" if module.bias_k is None else "add_bias_kv"
            raise NotReplaceable(f"{name}=True adds a key that no support holds")
        if "forward" in vars(module):
            raise NotReplaceable("its forward is overridden on the instance; replace attention before that is done")
        try:
            attention = attention_unless_exact(module, support, low_rank)
        except ValueError as error:
            raise NotReplaceable(str(error)) from error
        same = module._qkv_same_embed_dim

        def undo() -> None:
            del module.attention, module._warned
            module.__class__ = nn.MultiheadAttention
            module._qkv_same_embed_dim = same

        module.__class__ = MultiheadAttention
        module._attach(attention)
        if module.dropout > 0 and not isinstance(support, Full):
            return f"exact in training for its dropout={module.dropout} on weights; set .dropout = 0.0", undo
        return "", undo


HANDLERS: list[Handler] = [TorchHandler()]
# Packages whose modules are swapped by scatterbrain.integrations.<package>, which registers its handlers when imported.
PACKAGES: tuple[str, ...] = ("transformers", "timm", "diffusers")


def register_handler(handler: Handler) -> None:
    """Adds a family of attention modules to :func:`replace_attention`; handlers registered later are asked first."""
    HANDLERS.insert(0, handler)


def _load_handlers(model: nn.Module) -> None:
    """Imports the handlers of those packages that ``model`` has modules of, so that no other package is imported."""
    roots = {base.__module__.split(".")[0] for module in model.modules() for base in type(module).__mro__}
    for package in roots.intersection(PACKAGES):
        import_module(f"scatterbrain.integrations.{package}")


# -------------------- replace


def replace_attention(
    model: nn.Module,
    support: Support = SUPPORT,
    low_rank: LowRank = LOW_RANK,
    where: Callable[[str], bool] | None = None,
    token_order: str | None = None,
) -> Report:
    """Replaces the attention modules of ``model`` in place and reports each of them.

    nn.MultiheadAttention modules become :class:`scatterbrain.MultiheadAttention`, the same objects with the same
    parameters, requires_grad, hooks, mode, dtype and device. Every nn.TransformerEncoder that holds one stops using
    nested tensors, which only torch's own attention reads. A subclass of nn.MultiheadAttention is left alone, since its
    forward may do anything.

    The cross-attention of an nn.TransformerDecoderLayer is routed per query where a window or lists shared by a block of
    queries were asked for, and left alone with LSH or statistics="input": neither what the target tokens after a token
    are, nor how many, may choose its keys. In a decoder of your own choose such a support yourself, with ``where``.

    Attention layers of Hugging Face transformers get a :class:`scatterbrain.ScatterbrainAttention` as their submodule
    ``scatterbrain``; layers that are left out stay exact (:mod:`scatterbrain.integrations.transformers`).

    Statistics must be calibrated before use (``with sb.calibrate(model): model(batch)``) if low_rank says "stored", as
    the default does. "learned" adds parameters: create the optimizer afterwards.

    Args:
        model: any module.
        support: which keys are exact; default that of :func:`scatterbrain.presets.drop_in`.
        low_rank: the kernel of the rest; default that of :func:`scatterbrain.presets.drop_in`.
        where: called with a module's path, says whether to replace it; default all.
        token_order: "hilbert" lets image patches pass the blocks of every vision transformer in ``model`` (timm's
            VisionTransformer family and NaFlexVit; transformers' ViT, DeiT, DINOv2, CLIP and SigLIP) along a Hilbert
            curve, which makes every run of tokens a compact piece of the picture and the approximation better. Class,
            register and distillation tokens stay first, outputs and intermediate outputs are in the model's own order.
            Default None, the model's order.

    Returns:
        :class:`Report`: a table of every module that looks like attention, with what it is now or why it was left, and
        ``restore()``. If nothing could be replaced there is a warning too.

    Raises:
        TypeError: model, support or low_rank of a wrong type.
        ValueError: "learned" for a model that is in DistributedDataParallel or FSDP already.
        ValueError: token_order for a model without a vision transformer that can be ordered.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_attention: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(support, Support):
        raise TypeError(
            f"replace_attention: support must be one of {', '.join(s.__name__ for s in SUPPORTS.values())}, got {support!r}"
        )
    if low_rank is not None and not isinstance(low_rank, (Quadratic, Favor)):
        raise TypeError(f"replace_attention: low_rank must be Quadratic, Favor or None, got {low_rank!r}")
    if token_order not in (None, "hilbert"):
        raise ValueError(f"replace_attention: token_order must be 'hilbert' or None, got {token_order!r}")

    learned = isinstance(low_rank, Quadratic) and low_rank.statistics == "learned" and not isinstance(support, Full)
    if learned and (wrapper := parallel_wrapper(model)):
        raise ValueError(
            f"replace_attention: expected a model that is not yet in {wrapper}, which would neither shard nor synchronise "
            "the projections that statistics='learned' adds; replace attention first, then wrap the model"
        )
    _load_handlers(model)
    for handler in HANDLERS:
        prepare = getattr(handler, "prepare", None)
        if prepare is not None:
            prepare(model)
    settings = "exact attention" if isinstance(support, Full) else f"{support}, {low_rank}"
    report = Report(settings)
    crossing = {m.multihead_attn for m in model.modules() if isinstance(m, nn.TransformerDecoderLayer)}
    if token_order is not None:
        _order_tokens(model, report)
    done: dict[nn.Module, Entry] = {}
    for path, module in list(_attention_modules(model)):
        if module in done:  # one module under two names
            first = done[module]
            report.entries.append(Entry(path, first.was, first.now, f"the same module as {first.path}"))
            continue
        entry = done[module] = Entry(path, _class_name(module), None)
        report.entries.append(entry)
        if where is not None and not where(path):
            entry.note = "left out by where="
            continue
        handler = next((handler for handler in HANDLERS if handler.matches(module)), None)
        if handler is None:
            entry.note = _why_unhandled(module)
            continue
        try:
            own, why = query_by_query(support, low_rank) if module in crossing else (support, "")
            note, undo = handler.replace(module, own, low_rank)
        except NotReplaceable as reason:
            entry.note = str(reason)
            continue
        entry.note = "; ".join(text for text in (why, note) if text)
        now = _class_name(module)
        entry.now = now if now != entry.was else f"{now}, scatterbrain inside"
        report._undo.append(undo)
    report.notes += _exact_class_tokens(model, {entry.path for entry in report.replaced})
    _stop_nested_tensors(model, report)
    if not report.replaced:
        warnings.warn(f"replace_attention changed nothing: {report}", stacklevel=2)
    return report


def _exact_class_tokens(model: nn.Module, replaced: set[str]) -> list[str]:
    from scatterbrain.integrations.vision import exact_class_tokens

    return exact_class_tokens(model, replaced.__contains__)


def _order_tokens(model: nn.Module, report: Report) -> None:
    from scatterbrain.integrations.vision import apply_order

    ordered, refused, undo = apply_order(model)
    report._undo += undo
    report.notes += [f"{path or 'the model'}: tokens in Hilbert order" for path in ordered]
    report.notes += [f"{path or 'the model'}: tokens in their own order, {reason}" for path, reason in refused]


def _stop_nested_tensors(model: nn.Module, report: Report) -> None:
    """An nn.TransformerEncoder made before the swap turns padded batches into nested tensors, for torch's own layer."""
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoder) or not getattr(encoder, "use_nested_tensor", False):
            continue
        inside = (module for module in encoder.modules() if isinstance(module, MultiheadAttention))
        if all(module.attention is None for module in inside):
            continue
        encoder.use_nested_tensor = False
        report._undo.append(lambda encoder=encoder: setattr(encoder, "use_nested_tensor", True))


# -------------------- recognition


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a handler takes or that are attention by class or name, under every name they have; of nested ones
    only the innermost."""
    found = [
        (path, module) for path, module in model.named_modules(remove_duplicate=False) if _looks_like_attention(module)
    ]
    paths = {path for path, _ in found}
    for path, module in found:
        prefix = f"{path}." if path else ""
        if not any(other != path and other.startswith(prefix) for other in paths):
            yield path, module


def _looks_like_attention(module: nn.Module) -> bool:
    if isinstance(module, ScatterbrainAttention):  # listed as the module that holds it
        return False
    if isinstance(module, nn.MultiheadAttention) or any(handler.matches(module) for handler in HANDLERS):
        return True
    name = type(module).__name__.lower()
    return name.endswith(("attention", "attn")) and next(module.parameters(), None) is not None


def _class_name(module: nn.Module) -> str:
    """Class with its package: torch.nn.MultiheadAttention, timm.Attention."""
    cls = type(module)
    if cls is nn.MultiheadAttention:
        return "torch.nn.MultiheadAttention"
    package = cls.__module__.split(".")[0]
    return cls.__name__ if package in ("__main__", "builtins") else f"{package}.{cls.__name__}"


def _family(module: nn.Module) -> str:
    """The family that a class of transformers belongs to: the name of its folder."""
    parts = type(module).__module__.split(".")
    return parts[2] if parts[1:2] == ["models"] and len(parts) > 2 else type(module).__name__


def _why_unhandled(module: nn.Module) -> str:
    package = type(module).__module__.split(".")[0]
    if any(isinstance(inside, (ScatterbrainAttention, MultiheadAttention)) for inside in module.modules()):
        return "it runs Scatterbrain already; restore() the earlier report to change it"
    if is_parametrized(module):
        return "it is parametrized (torch.nn.utils.parametrize); replace attention before that is done"
    if isinstance(module, nn.MultiheadAttention):
        return "a subclass of nn.MultiheadAttention, whose forward may differ; derive it from sb.MultiheadAttention"
    if package == "transformers":
        return f"{_family(module)} computes attention in its own code, without transformers' AttentionInterface"
    if package in PACKAGES:
        return f"attention modules of this class are not handled for {package}"
    return "an attention module of its own; use sb.attention or sb.ScatterbrainAttention in its forward"
