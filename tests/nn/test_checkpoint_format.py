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
F32, F64, I64 = torch.float32, torch.float64, torch.int64
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
RECORD = {"calibration": ((32,), F64)}  # is calibrated, four parts of the scale, three sums of each of nine statistics
STEPS, DRAWS = {"step_count": ((), I64)}, {"draw_count": ((), I64)}
# low-rank kernel, its tensors in their order, what the module keeps beside them, and the entry _extra_state that stood
# in place of that in releases before: is calibrated, scale or NaN, rank or 0, steps, draws
FORMATS = {
    "none": (None, {}, {}, (0, math.nan, 0, 7, 0)),
    "stored": (sb.Quadratic(RANK), CALIBRATED, RECORD | STEPS, (1, 0.3, 3, 0, 0)),
    "input": (sb.Quadratic(RANK, "input"), {}, {}, (0, math.nan, 3, 7, 0)),
    "ema": (sb.Quadratic(RANK, "ema"), CALIBRATED, RECORD | STEPS, (1, 0.3, 3, 17, 0)),
    "learned": (sb.Quadratic(RANK, "learned"), LEARNED, {}, (0, math.nan, 3, 7, 0)),
    "favor": (sb.Favor(FEATURES), {"projection": ((6, 8), F32)}, STEPS | DRAWS, (0, math.nan, 0, 7, 0)),
    "hyperbolic": (
        sb.Favor(FEATURES, hyperbolic=True, redraw=2),
        {"projection": ((3, 8), F32)},
        STEPS | DRAWS,
        (0, math.nan, 0, 7, 3),
    ),
}
# Attributes that pickles of releases before do not have.
NEW = ("_known", "_average_is_due", "_seen", "gathered_scale", "said", "names")
SCALE = [0.30078125, -205 / 2**18, 205 / 2**28]  # of 0.3: eight bits each, and the rest
SCALE.append(0.3 - SCALE[0] - SCALE[1] - SCALE[2])


@pytest.fixture(params=FORMATS)
def kernel(request: pytest.FixtureRequest) -> str:
    return request.param


def attention(kernel: str) -> sb.ScatterbrainAttention:
    return sb.ScatterbrainAttention(HEADS, WIDTH, KV_HEADS, sb.Window(16), FORMATS[kernel][0])


def stored_tensors(kernel: str) -> dict[str, Tensor]:
    shapes = FORMATS[kernel][1].items()
    return {name: rand(*shape, seed=i, dtype=dtype) / 4 for i, (name, (shape, dtype)) in enumerate(shapes)}


def stored_state(kernel: str) -> dict[str, Tensor]:
    """A checkpoint made by hand from the tables."""
    state, extra = stored_tensors(kernel), FORMATS[kernel][3]
    beside = {"step_count": torch.tensor(extra[3]), "draw_count": torch.tensor(extra[4])}
    sums = [
        sum(math.cos(frequency * i) * x for i, x in enumerate(tensor.flatten().tolist())) / math.sqrt(tensor.numel())
        for tensor in state.values()
        for frequency in (1.0, 2.3, 3.7)
    ]
    beside["calibration"] = torch.tensor([1.0, *SCALE, *sums], dtype=F64)
    return state | {name: beside[name] for name in FORMATS[kernel][2]}


def state_of_releases_before(kernel: str) -> dict[str, Tensor]:
    return stored_tensors(kernel) | {"_extra_state": torch.tensor(FORMATS[kernel][3], dtype=F64)}


def assert_is_loaded(module: sb.ScatterbrainAttention, kernel: str) -> None:
    calibrated, scale, _, steps, draws = FORMATS[kernel][3]
    assert module.is_calibrated == bool(calibrated)
    assert module.scale == (None if math.isnan(scale) else scale)
    counted = FORMATS[kernel][2]
    assert module.steps == steps * ("step_count" in counted) and module.draws == draws * ("draw_count" in counted)


def test_a_state_dict_has_the_names_shapes_and_dtypes_of_the_format(kernel: str) -> None:
    _, tensors, beside, _ = FORMATS[kernel]
    state = attention(kernel).state_dict()
    assert [(name, (tuple(t.shape), t.dtype)) for name, t in state.items()] == list((tensors | beside).items())
    assert all(state[name].eq(0).all() for name in beside if kernel != "ema" or name != "calibration")


def test_only_learned_projections_are_parameters(kernel: str) -> None:
    assert list(dict(attention(kernel).named_parameters())) == (list(LEARNED) if kernel == "learned" else [])


def test_a_checkpoint_of_the_format_loads_and_is_saved_as_it_was(kernel: str) -> None:
    module, state = attention(kernel), stored_state(kernel)
    module.load_state_dict(state, strict=True)
    assert_is_loaded(module, kernel)
    saved = module.state_dict()
    assert list(saved) == list(state)
    for name, tensor in state.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_releases_before_loads_strictly_and_is_saved_in_the_format(kernel: str, assign: bool) -> None:
    module = attention(kernel)
    module.load_state_dict(state_of_releases_before(kernel), strict=True, assign=assign)
    assert_is_loaded(module, kernel)
    saved, state = module.state_dict(), stored_state(kernel)
    assert list(saved) == list(state)
    torch.testing.assert_close(dict(saved), state, rtol=1e-12, atol=1e-12)


def test_a_checkpoint_of_releases_before_loads_inside_other_modules_and_in_an_exact_one() -> None:
    for support in (sb.Window(16), sb.Full()):
        module = sb.MultiheadAttention(32, 4, support=support, low_rank=sb.Quadratic(RANK))
        state = {name: t for name, t in module.state_dict().items() if not name.startswith("attention.")}
        old = dict(sb.ScatterbrainAttention(4, 8, low_rank=sb.Quadratic(RANK)).state_dict())
        old = {name: rand(*t.shape, dtype=t.dtype) for name, t in old.items() if name in CALIBRATED}
        old["_extra_state"] = torch.tensor([1, 0.5, 3, 0, 0], dtype=F64)
        module.load_state_dict(state | {f"attention.{name}": tensor for name, tensor in old.items()}, strict=True)
        assert module.attention is None or module.attention.is_calibrated
        core = sb.ScatterbrainAttention(4, 8, support=support, low_rank=sb.Quadratic(RANK))
        core.load_state_dict(old, strict=True)
        assert core.is_calibrated == (support != sb.Full())


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_of_another_rank_is_refused_with_the_cure(old: bool) -> None:
    module = sb.ScatterbrainAttention(HEADS, WIDTH, KV_HEADS, sb.Window(16), sb.Quadratic(4))
    state = state_of_releases_before("stored") if old else stored_state("stored")
    match = r"statistics of rank 3, this module rank 4; create it with Quadratic\(rank=3\)"
    with pytest.raises(RuntimeError, match=match):
        module.load_state_dict(state)
    assert not module.is_calibrated


def test_a_module_that_was_pickled_by_a_release_before_is_what_it_was(kernel: str) -> None:
    calibrated, scale, _, steps, draws = FORMATS[kernel][3]
    module = attention(kernel)
    module.load_state_dict(state_of_releases_before(kernel))
    state = {name: value for name, value in vars(module).items() if name not in NEW}
    state["_buffers"] = {name: t for name, t in state["_buffers"].items() if name not in FORMATS[kernel][2]}
    state |= {"is_calibrated": bool(calibrated), "scale": None if math.isnan(scale) else scale}
    state |= {"steps": steps, "draws": draws}
    old = sb.ScatterbrainAttention.__new__(sb.ScatterbrainAttention)
    old.__setstate__(state)
    assert (old.is_calibrated, old.scale, old.steps, old.draws) == (
        state["is_calibrated"],
        state["scale"],
        steps,
        draws,
    )
    torch.testing.assert_close(dict(old.state_dict()), dict(module.state_dict()), rtol=0, atol=0)
    assert vars(old).keys() == vars(module).keys()


def test_the_loaded_tensors_are_those_that_the_module_runs_with(kernel: str) -> None:
    module, state = attention(kernel), stored_state(kernel)
    module.load_state_dict(state, strict=True)
    tensors = [state[name] for name in FORMATS[kernel][1] if not name.startswith("moment_")]
    statistics = {
        "stored": lambda: sb.Statistics(*tensors, 0.3),
        "ema": lambda: sb.Statistics(*tensors, 0.3),
        "learned": lambda: sb.Projections(*tensors),
        "favor": lambda: sb.RandomFeatures(*tensors),
        "hyperbolic": lambda: sb.RandomFeatures(*tensors),
    }.get(kernel, lambda: None)()
    tokens = [rand(1, heads, 40, WIDTH, seed=30 + i) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    with torch.no_grad():
        out = module.eval()(*tokens, scale=0.3)
        want = sb.attention(*tokens, sb.Window(16), FORMATS[kernel][0], scale=0.3, statistics=statistics)
    assert torch.equal(out, want)


def test_inside_other_modules_the_entries_are_under_attention() -> None:
    module = sb.MultiheadAttention(16, 2, support=sb.Window(16), low_rank=sb.Quadratic(RANK, "learned"))
    outer = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert list(module.state_dict()) == outer + [f"attention.{name}" for name in LEARNED]


@pytest.mark.parametrize("setting", [sb.Full(), sb.Empty(), sb.Window(8), sb.Routed(64), sb.LSH(8), sb.Quadratic(5)])
def test_pickled_settings_are_found_where_they_used_to_be(setting: object) -> None:
    module = "low_rank" if isinstance(setting, sb.Quadratic) else "support"
    fields = {**vars(setting)}
    class_ = f"cscatterbrain.{module}\n{type(setting).__name__}\n".encode()
    state = pickle.dumps(fields, protocol=0)[:-1]  # without its stop
    assert pickle.loads(class_ + b")\x81" + state + b"b.") == setting
