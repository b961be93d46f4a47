"""A model whose attention something else computes for a while."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain import functional
from scatterbrain.analysis.layer_call import LayerCall
from scatterbrain.integrations.replace import attention_modules, replace_attention
from scatterbrain.integrations.report import Report
from scatterbrain.integrations.token_order import natural_order
from scatterbrain.layer_settings import without_wrappers
from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.supports import Window


@contextmanager
def stand_in(
    model: nn.Module, attend: Callable[[LayerCall, bool], Any], token_order: str | None = "auto"
) -> Iterator[Stage]:
    """Inside, ``attend(call, return_lse)`` computes the model's attention: what :func:`scatterbrain.attention` would
    return. In a model that was swapped before, layers that were left as they were stay so. What torch.compile made of
    it does not run, so it is still there afterwards; paths are those of the model that was not compiled."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    report = None
    if not any(isinstance(module, ScatterbrainAttention) for module in model.modules()):
        report = _replaced(model, token_order)
    named = model.named_modules()
    cores = {without_wrappers(path): m for path, m in named if isinstance(m, ScatterbrainAttention)}
    layers = layer_paths(model, cores)
    # What others may have set too, such as hooks of accelerate.
    before = {core: {name: vars(core)[name] for name in _REPLACED if name in vars(core)} for core in cores.values()}
    try:
        for path, core in cores.items():
            core.forward = _StandIn(layers[path], core, attend)
            core.lacks_statistics = lambda is_causal: False  # nothing is computed with those of the module
            core.bypassed = None
        order = natural_order(model) if token_order in ("natural", None) else nullcontext()
        with order, _no_compiled_code():
            yield Stage(model, report, {layers[path]: core for path, core in cores.items()})
    finally:
        for core, own in before.items():
            for name in _REPLACED:
                vars(core).pop(name, None)
            vars(core).update(own)
        if report is not None:
            report.restore()


_REPLACED = ("forward", "lacks_statistics", "bypassed")


def layer_paths(model: nn.Module, cores: Iterable[str]) -> dict[str, str]:
    """Of every ScatterbrainAttention, by its path, the path of its layer: the attention module that
    :func:`scatterbrain.replace_attention` names, in modules of a user's own the one that holds it. Where one module
    holds several they are layers themselves."""
    modules = sorted({path for path, _ in _attention_modules(model)}, key=len, reverse=True)
    found = {}
    for core in cores:
        found[core] = next((path for path in modules if _is_in(core, path)), core.rpartition(".")[0] or core)
    shared = Counter(found.values())
    return {core: path if shared[path] == 1 else core for core, path in found.items()}


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((without_wrappers(path), module) for path, module in attention_modules(model))


def uncompiled(model: nn.Module) -> nn.Module:
    """What torch.compile was given; any other module as it is."""
    dynamo = sys.modules.get("torch._dynamo")  # whose import takes seconds; without it nothing is compiled
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._orig_mod
    return model


def _no_compiled_code() -> AbstractContextManager[Any]:
    """Code compiled for forwards that change with every run would soon reach the compiler's limit, and what a user
    compiled would never run again."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _is_in(path: str, outer: str) -> bool:
    """Whether a module is the one at ``outer`` or inside of it."""
    return path == outer or outer == "" or path.startswith(f"{outer}.")


@dataclass(frozen=True)
class Stage:
    """A model while its attention is stood in for.

    Args:
        model: the model.
        report: what was replaced for it; None in a model that was swapped before.
        cores: by the path of their layer.
    """

    model: nn.Module
    report: Report | None
    cores: dict[str, ScatterbrainAttention]

    def left(self, measured: Collection[str]) -> dict[str, str]:
        """Why modules that look like attention, or calls of them, were not stood in for, by path."""
        notes = (
            {} if self.report is None else {without_wrappers(entry.path): entry.note for entry in self.report.skipped}
        )
        found, seen = {}, set()
        for path, module in _attention_modules(self.model):
            if module not in seen and not any(_is_in(other, path) for other in measured):
                found[path] = notes.get(path) or self._why_left(path)
            seen.add(module)
        for path, core in self.cores.items():
            if core.bypassed is not None:
                found[path] = f"{'some of its calls ran' if path in measured else 'it ran'} exactly: {core.bypassed}"
            elif path not in measured and path not in found:
                found[path] = self._why_left(path)
        return found

    def _why_left(self, path: str) -> str:
        inside = [core for other, core in self.cores.items() if _is_in(other, path)]
        if not inside:
            return "it was left as it is when other layers were replaced; restore() that report to look at it"
        if all(core.support.is_full for core in inside):
            return "its support is every key: it runs exact attention"
        return "it did not run on this batch, or with one query a call"


def _replaced(model: nn.Module, token_order: str | None) -> Report:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "replace_attention changed nothing")
        # Never computed with: the recorder stands in its place. A window gains from the order of image patches.
        report = replace_attention(model, Window(64), None, token_order=token_order)
    if report.replaced:
        return report
    looked_at = "\n".join(f"  {entry.path or 'the model'}: {entry.was}: {entry.note}" for entry in report.entries)
    raise ValueError(
        f"expected a model with attention layers that replace_attention knows, got {type(model).__name__}; modules "
        f"that look like attention:\n{looked_at or '  none'}\n"
        "layers of torch, transformers, timm and diffusers are known; for others let the layer call a "
        "ScatterbrainAttention, or register a replacer (scatterbrain.integrations.register_replacer)"
    )


class _StandIn:
    """Stands in for the forward of a :class:`ScatterbrainAttention`."""

    def __init__(self, path: str, core: ScatterbrainAttention, attend: Callable[[LayerCall, bool], Any]) -> None:
        self.path, self.core, self.attend = path, core, attend

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        query_padding_mask: Tensor | None = None,
        query_offset: int | Tensor = 0,
        return_lse: bool = False,
    ) -> Any:
        scale = functional.default_scale(query, scale)
        masks = key_padding_mask, query_padding_mask
        tokens = (t.detach() for t in functional.cast_for_autocast(query, key, value))
        first = 0 if is_causal else min(self.core.exact_queries, query.shape[2])
        by_query = self.core.is_query_by_query
        call = LayerCall(self.path, *tokens, *masks, is_causal, scale, query_offset, first, by_query)
        return self.attend(call, return_lse)
