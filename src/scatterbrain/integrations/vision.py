"""Vision transformers inside a model: which can have their tokens ordered, and class tokens that attend exactly."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from scatterbrain.integrations.token_order import FAMILIES, Family, order_tokens
from scatterbrain.integrations.vision_families import ROTARY
from scatterbrain.nn.attention import ScatterbrainAttention

BIASED = "its attention adds a bias for each pair of positions, in raster order"
WINDOWED = "its blocks cut the image into windows"
MASKED = "it drops patches at random"

Undo = Callable[[], None]

# Vision models that must keep their order, by class name.
REFUSED = {
    "DeepseekVitEncoder": ROTARY, "Qwen3VitEncoder": ROTARY, "Gemma4VitEncoder": ROTARY,
    "Beit": BIASED, "BeitModel": BIASED, "Data2VecVisionModel": BIASED, "VisionTransformerRelPos": BIASED,
    "VisionTransformerSAM": BIASED, "SwinTransformer": WINDOWED, "SwinTransformerV2": WINDOWED, "SwinModel": WINDOWED,
    "Swinv2Model": WINDOWED, "ViTMAEModel": MASKED,
}  # fmt: skip
# Packages whose layers treat each token by itself, or are handled here.
KNOWN_PACKAGES = ("torch", "timm", "transformers", "scatterbrain", "peft", "torchao", "bitsandbytes")


def plan(model: nn.Module) -> tuple[list[tuple[str, str, nn.Module]], list[tuple[str, nn.Module, str]]]:
    """The vision transformers inside ``model``.

    Returns:
        (path, name of the family, module) of those that can be ordered, and (path, module, reason) of those that
        cannot.
    """
    possible, refused = [], []
    for path, module in model.named_modules():
        name = family_of(module)
        reason = None if name is None else obstacle(module, FAMILIES[name])
        if name is None and type(module).__module__.startswith(("timm.", "transformers.")):
            reason = REFUSED.get(type(module).__name__)
        if reason is not None:
            refused.append((path, module, f"{type(module).__name__}: {reason}"))
        elif name is not None:
            possible.append((path, name, module))
    return possible, refused


def family_of(module: nn.Module) -> str | None:
    """The key in :data:`FAMILIES` of the family of ``module``; None if it has none."""
    names = (f"{base.__module__}.{base.__name__}" for base in type(module).__mro__)
    return next((name for name in names if name in FAMILIES), None)


def exact_class_tokens(model: nn.Module, where: Callable[[str], bool] = lambda path: True) -> list[str]:
    """Lets the tokens before the patches attend to every key exactly, in every vision transformer inside ``model``.

    Class, register and distillation tokens look at the whole image. With a list of keys that they share with the
    patches beside them their error is several times that of a patch, and a few exact rows cost next to nothing.

    Args:
        model: holds :class:`ScatterbrainAttention` modules.
        where: called with the path of the attention layer that holds one, says whether to set it.

    Returns:
        A line for each vision transformer that has such tokens.
    """
    lines = []
    for path, module in model.named_modules():
        name = family_of(module)
        tokens = 0 if name is None else FAMILIES[name].prefix(module)
        if tokens == 0 or not _has_parts(module, FAMILIES[name]):
            continue
        dot, found = f"{path}." if path else "", False
        for inner in FAMILIES[name].INSIDE:
            for layer, host in getattr(module, inner).named_modules(prefix=dot + inner):
                for core in host.children() if where(layer) else ():
                    if isinstance(core, ScatterbrainAttention) and not core.is_exact:
                        core.exact_queries, found = tokens, True
        if found:
            what = "its first token attends" if tokens == 1 else f"its first {tokens} tokens attend"
            lines.append(f"{path or 'the model'}: {what} to every key exactly")
    return lines


def _has_parts(module: nn.Module, family: Family) -> bool:
    return all(hasattr(module, inner) for inner in family.INSIDE)


def obstacle(module: nn.Module, family: Family) -> str | None:
    """Why the tokens of a vision transformer of this family cannot be ordered; None if they can."""
    if hasattr(module, "_token_order"):
        return "its tokens are ordered already; restore() the earlier report to change it"
    if not _has_parts(module, family):
        return f"it has no {' and '.join(family.INSIDE)} in this version of its library"
    for method in (*family.METHODS, *family.overrides(type(module))):
        where = getattr(type(module), method).__module__
        if method in vars(module) or not where.startswith(("timm.", "transformers.")):
            return f"its {method} is not the library's own"
    for name in family.INSIDE:
        for inner in getattr(module, name).modules():
            if type(inner).__module__.split(".")[0] not in KNOWN_PACKAGES:
                return (
                    f"{type(inner).__module__}.{type(inner).__name__} inside {name} may depend on the order of tokens"
                )
            if isinstance(inner, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)):
                return f"{type(inner).__name__} inside {name} depends on the order of tokens"
    return family.obstacle(module)


# -------------------- choosing an order

TOKEN_ORDERS = ("auto", "hilbert", "natural", None)
CONFIGURED = "scatterbrain_token_order"  # the attribute of a transformers configuration that says which


def check_token_order(token_order: object, owner: str) -> None:
    """Raises ValueError for anything but a value of ``token_order=``."""
    if token_order not in TOKEN_ORDERS:
        raise ValueError(f"{owner} must be 'auto', 'hilbert', or 'natural' (or None), got {token_order!r}")


def gaining_cores(model: nn.Module) -> list[ScatterbrainAttention]:
    """The attention inside ``model`` that is better where neighbours in the sequence are neighbours in the image."""
    return [m for m in model.modules() if isinstance(m, ScatterbrainAttention) and m.support.gains_from_order]


def apply_order(model: nn.Module, owner: str = "replace_attention: token_order") -> tuple[list[str], list[Undo]]:
    """Orders every vision transformer inside ``model`` along a Hilbert curve.

    Returns:
        A line for each vision transformer, and the functions that undo it.

    Raises:
        ValueError: none can be ordered; with the reasons.
    """
    possible, refused = plan(model)
    if not possible:
        reasons = "; ".join(f"{path or 'the model'} is {reason}" for path, _, reason in refused)
        names = ", ".join(name.split(".")[0] + "." + name.split(".")[-1] for name in FAMILIES)
        raise ValueError(
            f"{owner}='hilbert' expected a model with a vision transformer among {names}, got "
            f"{reasons or type(model).__name__}; use 'auto' or 'natural'"
        )
    undo = [order_tokens(module, name, FAMILIES[name], is_strict=True) for _, name, module in possible]
    return _lines([path for path, _, _ in possible], refused), undo


def apply_order_where_possible(model: nn.Module) -> tuple[list[str], list[Undo]]:
    """Orders every vision transformer inside ``model`` that can be ordered, whose attention gains from it and whose
    configuration, if it has one, does not refuse it. Returns as :func:`apply_order`."""
    possible, refused = plan(model)
    refused = [entry for entry in refused if gaining_cores(entry[1])]
    ordered, undo = [], []
    for path, name, module in possible:
        if not gaining_cores(module):
            continue
        choice = getattr(getattr(module, "config", None), CONFIGURED, "auto")
        if choice in ("natural", None):
            refused.append((path, module, f"its configuration says {CONFIGURED}={choice!r}"))
            continue
        undo.append(order_tokens(module, name, FAMILIES[name], is_strict=False))
        ordered.append(path)
    return _lines(ordered, refused), undo


def _lines(ordered: list[str], refused: list[tuple[str, nn.Module, str]]) -> list[str]:
    return [f"{path or 'the model'}: tokens in Hilbert order" for path in ordered] + [
        f"{path or 'the model'}: tokens in their own order, {reason}" for path, _, reason in refused
    ]
