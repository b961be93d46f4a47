"""Tokens along a Hilbert curve inside the blocks: calls, hooks and masks that would see the curve are refused or run in
the model's order, and an ordered model compiles, traces and exports."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from testkit import COPIES
from testkit import assert_close_in_scale as close
from token_orders import EVERY_KEY, ORDERED, WINDOW

import scatterbrain as sb

timm = pytest.importorskip("timm")
import timm_models as models


class Allowed:
    """A hook that may see tokens along the curve."""

    __module__ = "scatterbrain.tests"

    def __init__(self, hook: Callable[..., None]) -> None:
        self.hook = hook

    def __call__(self, *args: object) -> None:
        self.hook(*args)


def test_one_model_takes_images_of_any_size():
    model = models.build("dynamic image size")
    sizes = [(14, 14), (28, 98), (98, 28), (70, 42)]
    images = [torch.randn(1, 3, *size) for size in sizes]
    with torch.no_grad():
        before = [model.forward_features(x) for x in images]
        sb.replace_attention(model, **ORDERED)
        for x, expected in zip(images, before):
            close(model.forward_features(x), expected)


def test_gradients_stay():
    model, x = models.build("distilled").train(), models.images("distilled").requires_grad_()
    sum(model(x)).square().sum().backward() if isinstance(model(x), tuple) else model(x).square().sum().backward()
    before = x.grad.clone()
    x.grad = None
    sb.replace_attention(model, **ORDERED)
    out = model(x)
    (sum(out) if isinstance(out, tuple) else out).square().sum().backward()
    close(x.grad, before)


@pytest.mark.parametrize("copied", [lambda model: model, *COPIES], ids=["itself", "deepcopy", "pickle"])
def test_threads_that_run_one_model_at_once_get_the_models_order(copied):
    model, images = models.build("vit"), models.images("vit").split(1)
    with torch.no_grad():
        before = [model.forward_features(x) for x in images]
    sb.replace_attention(model, **ORDERED)
    model, both = copied(model), threading.Barrier(2, timeout=60)

    def wait(*args: object) -> None:
        both.wait()

    model.patch_embed.register_forward_hook(wait)
    model.blocks[1].register_forward_hook(Allowed(wait))

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.forward_features(x)

    with ThreadPoolExecutor(2) as threads:
        for out, expected in zip(threads.map(run, images), before):
            close(out, expected)


# -------------------- what would see the curve


def test_masks_of_a_timm_model_are_refused():
    model, x = models.build("vit"), models.images("vit")
    sb.replace_attention(model, **ORDERED)
    for arguments in ({"attn_mask": torch.ones(16, 16, dtype=torch.bool)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="speaks of tokens in the model's order"):
            model.forward_features(x, **arguments)
        with pytest.raises(ValueError, match="speaks of tokens in the model's order"):
            model.forward_intermediates(x, **arguments)
    close(model(x), models.build("vit")(x))


@pytest.mark.parametrize("where", ["blocks.1", "blocks.0.attn.qkv", "norm"])
def test_hooks_that_would_see_the_curve_are_refused_by_name(where: str):
    model, x = models.build("vit"), models.images("vit")
    sb.replace_attention(model, **ORDERED)
    handle = model.get_submodule(where).register_forward_hook(lambda module, args, out: None)
    with pytest.raises(RuntimeError, match=f"a forward hook on {where} would see tokens in the order"):
        model(x)
    handle.remove()
    model.patch_embed.register_forward_hook(lambda module, args, out: None)
    close(model(x), models.build("vit")(x))


def hooks(module: torch.nn.Module) -> dict[str, Callable]:
    return {
        "forward": module.register_forward_hook,
        "backward": module.register_full_backward_hook,
        "backward, before": module.register_full_backward_pre_hook,
    }


@pytest.mark.parametrize(
    ("name", "where", "kind"),
    [("vit", where, kind) for where in ("blocks.1", "norm_pre") for kind in ("backward", "backward, before")]
    + [("vit", "norm_pre", "forward"), ("dinov3", "norm_pre", "forward"), ("eva02", "norm_pre", "forward")],
)
def test_hooks_of_gradients_and_where_the_curve_begins_see_the_models_order(name: str, where: str, kind: str):
    model, seen = models.build(name), []
    natural = copy.deepcopy(model)
    sb.replace_attention(model, **EVERY_KEY | {"token_order": "auto"})
    for ordered in (natural, model):
        hooks(ordered.get_submodule(where))[kind](lambda module, *args: seen.append(args[-1]))
    out = [natural(models.images(name))]
    with pytest.warns(UserWarning, match=f"a {kind[:8].strip(',')} hook on {where} would see (gradients of )?tokens"):
        out.append(model(models.images(name)))
    for result in out:
        result.square().sum().backward()
    close(*(x[0] if isinstance(x, tuple) else x for x in seen))


def test_hooks_on_every_module_are_refused():
    model, x = models.build("vit"), models.images("vit")
    sb.replace_attention(model, **ORDERED)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        with pytest.raises(RuntimeError, match="a forward hook on every module would see tokens"):
            model(x)
    finally:
        handle.remove()
    close(model(x), models.build("vit")(x))


def test_a_hook_before_the_curve_begins_changes_nothing():
    model, x, seen = models.build("vit"), models.images("vit"), []
    model.norm_pre.register_forward_hook(lambda module, args, out: seen.append(out))
    before = model(x)
    sb.replace_attention(model, **ORDERED)
    close(model(x), before)
    close(*seen)


def test_calls_that_speak_of_the_models_order_run_in_it_and_say_so():
    model, x = models.build("vit"), models.images("vit")
    natural = copy.deepcopy(model)
    sb.replace_attention(model, **WINDOW)
    sb.replace_attention(natural, **WINDOW, token_order="natural")
    ordered = model(x)
    mask, seen = torch.ones(2, 1, 1, x.shape[2] * x.shape[3] // 256 + 1, dtype=torch.bool), []
    mask[..., 5:] = False
    with torch.no_grad():
        with pytest.warns(UserWarning, match="own order: attn_mask speaks of tokens in the model's order"):
            assert torch.equal(model.forward_features(x, attn_mask=mask), natural.forward_features(x, attn_mask=mask))
        handle = model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
        natural.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
        with pytest.warns(UserWarning, match="own order: a forward hook on blocks.1 would see"):
            assert torch.equal(model(x), natural(x)) and torch.equal(*seen)
        handle.remove()
        assert torch.equal(model(x), ordered)


# -------------------- compile, trace, export


def test_a_compiled_model_with_a_hook_inside_shows_it_the_models_order():
    model, x, seen = models.build("vit", depth=1), models.images("vit"), []
    natural = model.blocks[0].norm1(model.norm_pre(model._pos_embed(model.patch_embed(x))))
    sb.replace_attention(model, **WINDOW)
    model.blocks[0].norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad(), pytest.warns(UserWarning, match="a forward hook on blocks.0.norm1"):
        torch.compile(model, backend="aot_eager")(x)
    close(seen[0], natural)


def test_compiled_models_take_images_of_several_sizes():
    model = models.build("dynamic image size", depth=1)
    sb.replace_attention(model, sb.Window(4), sb.Quadratic(4, "input"), token_order="hilbert")
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for size in ((70, 28), (56, 84), (28, 70)):
            x = torch.randn(1, 3, *size)
            close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_ordered_models_can_be_traced(name: str):
    model, x = models.build(name, depth=1), models.images(name)
    sb.replace_attention(model, **ORDERED)
    with torch.no_grad():
        close(torch.jit.trace(model, x, check_trace=False)(x + 1), model(x + 1))


def test_ordered_models_can_be_exported():
    model, x = models.build("vit", depth=1), models.images("vit")
    sb.replace_attention(model, sb.Window(4), sb.Quadratic(4, "input"), token_order="hilbert")
    close(torch.export.export(model, (x,)).module()(x), model(x))
