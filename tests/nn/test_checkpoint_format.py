"""The format of checkpoints: names, shapes and dtypes that must keep loading. A table that has to be changed breaks the
checkpoints that exist."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from testkit import rand
from torch import Tensor

import scatterbrain as sb

HEADS, KV_HEADS, RANK, WIDTH, FEATURES = 4, 2, 3, 8, 6  # in the shapes below
F32, F64 = torch.float32, torch.float64
EXTRA = {"_extra_state": ((5,), F64)}  # is calibrated, scale or NaN, rank or 0, steps, draws
CALIBRATED = {
    "query_projection": ((2, 3, 8), F32),
    "query_mean": ((2, 8), F32),
    "key_projection": ((2, 3, 8), F32),
    "key_mean": ((2, 8), F32),
    "moment_tokens": ((2,), F64),
    "moment_query_mean": ((2, 8), F64),
    "moment_query_second": ((2, 8, 8), F64),
    "moment_key_mean": ((2, 8), F64),
    "moment_key_second": ((2, 8, 8), F64),
}
LEARNED = {
    "query_projection": ((4, 3, 8), F32),
    "query_bias": ((4, 8), F32),
    "query_log_scale": ((4,), F32),
    "key_projection": ((2, 3, 8), F32),
    "key_bias": ((2, 8), F32),
}
# low-rank kernel, its tensors in their order, extra state of a new module, extra state of one that was used
FORMATS = {
    "none": (None, {}, (0, math.nan, 0, 0, 0), (0, math.nan, 0, 7, 0)),
    "stored": (sb.Quadratic(RANK), CALIBRATED, (0, math.nan, 3, 0, 0), (1, 0.25, 3, 0, 0)),
    "input": (sb.Quadratic(RANK, "input"), {}, (0, math.nan, 3, 0, 0), (0, math.nan, 3, 7, 0)),
    "ema": (sb.Quadratic(RANK, "ema"), CALIBRATED, (0, math.nan, 3, 0, 0), (1, 0.25, 3, 17, 0)),
    "learned": (sb.Quadratic(RANK, "learned"), LEARNED, (0, math.nan, 3, 0, 0), (0, math.nan, 3, 7, 0)),
    "favor": (sb.Favor(FEATURES), {"projection": ((6, 8), F32)}, (0, math.nan, 0, 0, 0), (0, math.nan, 0, 7, 0)),
    "hyperbolic": (
        sb.Favor(FEATURES, hyperbolic=True, redraw=2),
        {"projection": ((3, 8), F32)},
        (0, math.nan, 0, 0, 0),
        (0, math.nan, 0, 7, 3),
    ),
}


@pytest.fixture(params=FORMATS)
def kernel(request: pytest.FixtureRequest) -> str:
    return request.param


def attention(kernel: str) -> sb.ScatterbrainAttention:
    return sb.ScatterbrainAttention(HEADS, WIDTH, KV_HEADS, sb.Window(16), FORMATS[kernel][0])


def stored_state(kernel: str) -> dict[str, Tensor]:
    """A checkpoint made by hand from the tables."""
    _, tensors, _, extra = FORMATS[kernel]
    state = {name: rand(*shape, seed=i, dtype=dtype) / 4 for i, (name, (shape, dtype)) in enumerate(tensors.items())}
    return state | {"_extra_state": torch.tensor(extra, dtype=F64)}


def test_a_state_dict_has_the_names_shapes_and_dtypes_of_the_format(kernel: str) -> None:
    _, tensors, extra, _ = FORMATS[kernel]
    state = attention(kernel).state_dict()
    assert [(name, (tuple(t.shape), t.dtype)) for name, t in state.items()] == list((tensors | EXTRA).items())
    torch.testing.assert_close(state["_extra_state"], torch.tensor(extra, dtype=F64), rtol=0, atol=0, equal_nan=True)


def test_only_learned_projections_are_parameters(kernel: str) -> None:
    assert list(dict(attention(kernel).named_parameters())) == (list(LEARNED) if kernel == "learned" else [])


def test_a_checkpoint_of_the_format_loads_and_is_saved_as_it_was(kernel: str) -> None:
    module, state = attention(kernel), stored_state(kernel)
    module.load_state_dict(state, strict=True)
    calibrated, scale, _, steps, draws = FORMATS[kernel][3]
    assert module.is_calibrated == bool(calibrated)
    assert (module.scale, module.steps, module.draws) == (None if math.isnan(scale) else scale, steps, draws)
    saved = module.state_dict()
    assert list(saved) == list(state)
    for name, tensor in state.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_the_loaded_tensors_are_those_that_the_module_runs_with(kernel: str) -> None:
    module, state = attention(kernel), stored_state(kernel)
    module.load_state_dict(state, strict=True)
    tensors = [state[name] for name in FORMATS[kernel][1] if not name.startswith("moment_")]
    statistics = {
        "stored": lambda: sb.Statistics(*tensors, 0.25),
        "ema": lambda: sb.Statistics(*tensors, 0.25),
        "learned": lambda: sb.Projections(*tensors),
        "favor": lambda: sb.RandomFeatures(*tensors),
        "hyperbolic": lambda: sb.RandomFeatures(*tensors),
    }.get(kernel, lambda: None)()
    tokens = [rand(1, heads, 40, WIDTH, seed=30 + i) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    with torch.no_grad():
        out = module.eval()(*tokens, scale=0.25)
        want = sb.attention(*tokens, sb.Window(16), FORMATS[kernel][0], scale=0.25, statistics=statistics)
    assert torch.equal(out, want)


def test_inside_other_modules_the_entries_are_under_attention() -> None:
    module = sb.MultiheadAttention(16, 2, support=sb.Window(16), low_rank=sb.Quadratic(RANK, "learned"))
    outer = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert list(module.state_dict()) == outer + [f"attention.{name}" for name in (LEARNED | EXTRA)]


@pytest.mark.parametrize("setting", [sb.Full(), sb.Empty(), sb.Window(8), sb.Routed(64), sb.LSH(8), sb.Quadratic(5)])
def test_pickled_settings_are_found_where_they_used_to_be(setting: object) -> None:
    module = "low_rank" if isinstance(setting, sb.Quadratic) else "support"
    fields = {**vars(setting)}
    class_ = f"cscatterbrain.{module}\n{type(setting).__name__}\n".encode()
    state = pickle.dumps(fields, protocol=0)[:-1]  # without its stop
    assert pickle.loads(class_ + b")\x81" + state + b"b.") == setting
