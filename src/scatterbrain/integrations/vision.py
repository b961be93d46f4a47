"""The vision transformers of timm and transformers: where their tokens are, and which of them can be ordered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from scatterbrain.integrations.token_order import (
    FAMILIES,
    Family,
    Order,
    Permutation,
    PermutationFor,
    coordinate_order,
    order_tokens,
    warn_of_dropped_patches,
)
from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.supports import Full

# -------------------- timm


class Timm(Family):
    """timm.models.VisionTransformer and its subclasses in timm."""

    METHODS = ("forward_features", "forward_intermediates")
    INSIDE = ("blocks", "norm")

    def entry(self, model: nn.Module) -> nn.Module:
        return model.norm_pre

    def prefix(self, model: nn.Module) -> int:
        return model.num_prefix_tokens

    def prepare(self, model: nn.Module, arguments: dict[str, Any]) -> PermutationFor:
        _refuse_masks(arguments)
        height, width = self.grid(model, arguments["x"])
        order, training, dropout = model._token_order, model.training, model.patch_drop
        may_drop = training and getattr(dropout, "prob", 0) > 0
        return lambda tokens: _on_grid(order, height, width, may_drop, tokens)

    def grid(self, model: nn.Module, images: Tensor) -> tuple[int, int]:
        return model.patch_embed.dynamic_feat_size(images.shape[-2:])

    def put_back(self, permutation: Permutation, out: Any) -> Any:
        if isinstance(out, Tensor):
            return permutation.undo(out)
        if isinstance(out, tuple):  # last tokens and intermediates
            return permutation.undo(out[0]), self.put_back(permutation, out[1])
        undo = permutation.undo_patches
        if isinstance(out, list):  # intermediates, with or without prefix tokens
            return [(undo(x[0]), x[1]) if isinstance(x, tuple) else undo(x) for x in out]
        for name in ("image_features", "patches"):
            if name in out:
                out[name] = permutation.undo(out[name])
        if "image_intermediates" in out:
            out["image_intermediates"] = [undo(x) for x in out["image_intermediates"]]
        return out


class NaFlex(Timm):
    """timm.models.NaFlexVit, with images or with patches that carry their coordinates."""

    def obstacle(self, model: nn.Module) -> str | None:
        return None if model.rope is None else ROTARY

    def grid(self, model: nn.Module, images: Tensor) -> tuple[int, int]:
        return model.embeds.dynamic_feat_size(images.shape[-2:])

    def prepare(self, model: nn.Module, arguments: dict[str, Any]) -> PermutationFor:
        batch = arguments.get("patches", arguments.get("x"))
        given = {**arguments, **batch} if isinstance(batch, dict) else arguments
        coordinates, valid = given.get("patch_coord"), given.get("patch_valid")
        if coordinates is None:
            return super().prepare(model, {**arguments, "x": batch})
        _refuse_masks(given)
        prefix = model._token_order.prefix
        may_drop = model.training and model.patch_drop is not None

        def permutation(tokens: Tensor) -> Permutation | None:
            if may_drop and tokens.shape[1] != prefix + coordinates.shape[1]:
                return warn_of_dropped_patches()
            order = coordinate_order(coordinates, valid, prefix)
            return Permutation(order, order.argsort(-1), prefix)

        return permutation


def _refuse_masks(arguments: dict[str, Any]) -> None:
    for name in ("attn_mask", "is_causal"):
        if arguments.get(name) is not None and arguments[name] is not False:
            raise ValueError(
                f"token_order: {name} speaks of tokens in the model's order, which the blocks do not see; replace "
                "attention with token_order=None"
            )


def _on_grid(order: Order, height: int, width: int, may_drop: bool, tokens: Tensor) -> Permutation | None:
    expected = order.prefix + height * width
    if tokens.shape[1] == expected:
        return order.on_grid(height, width, tokens.device)
    if may_drop:
        return warn_of_dropped_patches()
    raise ValueError(
        f"token_order: expected {order.prefix} + {height} x {width} = {expected} tokens before the first block, got "
        f"{tokens.shape[1]}; replace attention of this model with token_order=None"
    )


# -------------------- transformers


class Transformers(Family):
    """A vision model of transformers: embeddings, layers, output with fields.

    Args:
        inside: submodules that see tokens along the curve.
        prefix: how many tokens come before the patches, from the model.
        entry: the submodule whose output are the tokens before the first layer.
    """

    def __init__(self, inside: tuple[str, ...], prefix: Callable[[nn.Module], int], entry: str = "embeddings") -> None:
        self.INSIDE, self._prefix, self._entry = inside, prefix, entry

    def entry(self, model: nn.Module) -> nn.Module:
        return getattr(model, self._entry)

    def prefix(self, model: nn.Module) -> int:
        return self._prefix(model)

    def prepare(self, model: nn.Module, arguments: dict[str, Any]) -> PermutationFor:
        order, images = model._token_order, arguments["pixel_values"]
        embeddings = model.embeddings
        patch = getattr(embeddings, "patch_embeddings", embeddings).patch_size
        patch = patch if isinstance(patch, (tuple, list)) else (patch, patch)
        height, width = images.shape[-2] // patch[0], images.shape[-1] // patch[1]
        mask = arguments.get("attention_mask")
        if mask is not None:
            if mask.dim() != 2:
                raise ValueError(
                    "token_order: expected attention_mask of shape (batch, tokens), got "
                    f"{tuple(mask.shape)}; replace attention with token_order=None for other masks"
                )
            arguments["attention_mask"] = mask.index_select(1, order.on_grid(height, width, mask.device).order)
        return lambda tokens: _on_grid(order, height, width, False, tokens)

    def run(self, model: nn.Module, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        as_dict = arguments.pop("return_dict", None)
        as_dict = model.config.return_dict if as_dict is None else as_dict
        out = super().run(model, function, {**arguments, "return_dict": True})
        return out if as_dict else out.to_tuple()

    def put_back(self, permutation: Permutation, out: Any) -> Any:
        for name, value in list(out.items()):
            if name in ("pooler_output", "image_embeds") or value is None:
                continue
            if name == "last_hidden_state":
                out[name] = permutation.undo(value)
            elif name == "hidden_states":
                out[name] = tuple(None if x is None else permutation.undo(x) for x in value)
            elif name == "attentions":
                out[name] = tuple(None if x is None else permutation.undo_pairs(x) for x in value)
            elif name == "feature_maps":
                undo = permutation.undo_patches
                out[name] = tuple(undo(x) if x.dim() == 4 else permutation.undo(x) for x in value)
            else:
                raise RuntimeError(
                    f"token_order: the output {name} may hold tokens along the curve; replace attention with "
                    "token_order=None"
                )
        return out


def _one(model: nn.Module) -> int:
    return 1


def _two(model: nn.Module) -> int:
    return 2


def _none(model: nn.Module) -> int:
    return 0


def _registers(model: nn.Module) -> int:
    return 1 + model.config.num_register_tokens


# -------------------- recognition

ROTARY = "its queries and keys are rotated by position (RoPE), in raster order"
BIASED = "its attention adds a bias for each pair of positions, in raster order"
WINDOWED = "its blocks cut the image into windows"
MASKED = "it drops patches at random"

FAMILIES |= {
    "timm.models.vision_transformer.VisionTransformer": Timm(),
    "timm.models.naflexvit.NaFlexVit": NaFlex(),
    "transformers.models.vit.modeling_vit.ViTModel": Transformers(("layers", "layernorm"), _one),
    "transformers.models.deit.modeling_deit.DeiTModel": Transformers(("layers", "layernorm"), _two),
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model": Transformers(("encoder", "layernorm"), _one),
    "transformers.models.dinov2.modeling_dinov2.Dinov2Backbone": Transformers(("encoder", "layernorm"), _one),
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel": Transformers(
        ("encoder", "layernorm"), _registers
    ),
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersBackbone": Transformers(
        ("encoder", "layernorm"), _registers
    ),
    "transformers.models.clip.modeling_clip.CLIPVisionModel": Transformers(
        ("encoder", "post_layernorm"), _one, "pre_layrnorm"
    ),
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": Transformers(("encoder", "post_layernorm"), _none),
}
# Vision models that must keep their order, by the name of their class.
REFUSED = {
    "Eva": ROTARY, "DINOv3ViTModel": ROTARY, "DINOv3ViTBackbone": ROTARY,
    "Beit": BIASED, "BeitModel": BIASED, "Data2VecVisionModel": BIASED, "VisionTransformerRelPos": BIASED,
    "VisionTransformerSAM": BIASED, "SwinTransformer": WINDOWED, "SwinTransformerV2": WINDOWED, "SwinModel": WINDOWED,
    "Swinv2Model": WINDOWED, "ViTMAEModel": MASKED,
}  # fmt: skip
# Packages whose layers take each token by itself or are known here.
KNOWN_PACKAGES = ("torch", "timm", "transformers", "scatterbrain", "peft", "torchao", "bitsandbytes")


def plan(model: nn.Module) -> tuple[list[tuple[str, str, nn.Module]], list[tuple[str, str]]]:
    """The vision transformers inside ``model``.

    Returns:
        (path, name of the family, module) of those that can be ordered, and (path, reason) of those that cannot.
    """
    possible, refused = [], []
    for path, module in model.named_modules():
        name = next(
            (n for base in type(module).__mro__ if (n := f"{base.__module__}.{base.__name__}") in FAMILIES), None
        )
        reason = None if name is None else _obstacle(module, FAMILIES[name])
        if name is None and type(module).__module__.startswith(("timm.", "transformers.")):
            reason = REFUSED.get(type(module).__name__)
        if reason is not None:
            refused.append((path, f"{type(module).__name__}: {reason}"))
        elif name is not None:
            possible.append((path, name, module))
    return possible, refused


def family_of(module: nn.Module) -> str | None:
    """The name under which :data:`FAMILIES` holds the family of ``module``; None if it is of none."""
    names = (f"{base.__module__}.{base.__name__}" for base in type(module).__mro__)
    return next((name for name in names if name in FAMILIES), None)


def exact_class_tokens(model: nn.Module, where: Callable[[str], bool] = lambda path: True) -> list[str]:
    """Lets the tokens before the patches attend to every key exactly, in every vision transformer inside ``model``.

    Class, register and distillation tokens look at the whole image: a list of keys that they share with the patches
    beside them leaves their rows several times the error of a patch's, and exact rows for them cost next to nothing.

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
            for layer, holder in getattr(module, inner).named_modules(prefix=dot + inner):
                for core in holder.children() if where(layer) else ():
                    if isinstance(core, ScatterbrainAttention) and not isinstance(core.support, Full):
                        core.exact_queries, found = tokens, True
        if found:
            what = "its first token attends" if tokens == 1 else f"its first {tokens} tokens attend"
            lines.append(f"{path or 'the model'}: {what} to every key exactly")
    return lines


def _has_parts(module: nn.Module, family: Family) -> bool:
    return all(hasattr(module, inner) for inner in family.INSIDE)


def _obstacle(module: nn.Module, family: Family) -> str | None:
    if hasattr(module, "_token_order"):
        return "its tokens are ordered already; restore() the earlier report to change it"
    if not _has_parts(module, family):
        return f"it has no {' and '.join(family.INSIDE)} in this version of its library"
    for method in family.METHODS:
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


def apply_order(model: nn.Module) -> tuple[list[str], list[tuple[str, str]], list[Callable[[], None]]]:
    """Orders every vision transformer inside ``model`` along a Hilbert curve.

    Returns:
        Paths of those ordered, (path, reason) of those not, and the functions that undo it.

    Raises:
        ValueError: none can be ordered; says why.
    """
    possible, refused = plan(model)
    if not possible:
        reasons = "; ".join(f"{path or 'the model'} is {reason}" for path, reason in refused)
        names = ", ".join(name.split(".")[0] + "." + name.split(".")[-1] for name in FAMILIES)
        raise ValueError(
            f"replace_attention: token_order='hilbert' expected a model with a vision transformer among {names}, got "
            f"{reasons or type(model).__name__}; use token_order=None"
        )
    undo = [order_tokens(module, name, FAMILIES[name]) for _, name, module in possible]
    return [path for path, _, _ in possible], refused, undo
