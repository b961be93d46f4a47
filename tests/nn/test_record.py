"""What a module remembers is ordinary state: buffers of the same names and shapes from the start, which anything may
fill, and statistics that are believed only as far as the record beside them does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from testkit import low_ranks, qkv, rand
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.nn import kernel_state
from scatterbrain.nn.record import written_record

SCALE = 0.3
KINDS = low_ranks(rank=3)
FITTED = ["stored", "ema"]
STATISTICS = list(sb.ScatterbrainAttention(2, 8, low_rank=sb.Quadratic(3)).state_dict())[:-1]  # without the count


def fresh(kind: str = "stored") -> sb.ScatterbrainAttention:
    torch.manual_seed(0)
    return sb.ScatterbrainAttention(2, 8, 1, sb.Window(8, block_q=8), KINDS[kind]).eval()


def calibrated(kind: str = "stored", seed: int = 0) -> sb.ScatterbrainAttention:
    core = fresh(kind)
    with sb.calibrate(core), torch.no_grad():
        core(*qkv(seed=seed), scale=SCALE)
    return core


def run(core: nn.Module, **arguments: object) -> Tensor:
    with torch.no_grad():
        return core(*qkv(seed=3), scale=SCALE, **arguments)


# -------------------- the state dict


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_has_the_same_names_shapes_and_dtypes_before_and_after_use(kind: str) -> None:
    core = fresh(kind)
    before = [(name, t.shape, t.dtype) for name, t in core.state_dict().items()]
    if kind in FITTED:
        core = calibrated(kind)
    sb.update_statistics(core)
    after = core.state_dict()
    assert [(name, t.shape, t.dtype) for name, t in after.items()] == before
    assert list(after) == [name for name, _ in (*core.named_parameters(), *core.named_buffers())]
    torch.testing.assert_close(after, copy.deepcopy(after), rtol=0, atol=0)  # no NaN, which equals nothing


@pytest.mark.parametrize("kind", KINDS)
def test_exact_attention_stores_and_demands_nothing_whatever_the_kernel(kind: str) -> None:
    exact = sb.ScatterbrainAttention(2, 8, 1, sb.Full(), KINDS[kind])
    assert not exact.state_dict() and not list(exact.parameters())
    exact.load_state_dict({}, strict=True)
    exact.load_state_dict(calibrated(kind).state_dict() if kind in FITTED else fresh(kind).state_dict(), strict=True)
    assert torch.equal(run(exact), sb.attention(*qkv(seed=3), sb.Full(), None, scale=SCALE))


# -------------------- whatever fills the buffers


def by_copying(core: nn.Module, state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        core.get_buffer(name).copy_(tensor)


def behind_the_version_counters(core: nn.Module, state: dict[str, Tensor]) -> None:
    assert not core.is_calibrated  # it has looked
    for name, tensor in state.items():
        core.get_buffer(name).data.copy_(tensor)


def by_assigning(core: nn.Module, state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        setattr(core, name, tensor.clone())


def by_assigning_data(core: nn.Module, state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        core.get_buffer(name).data = tensor.clone()


def after_meta(core: nn.Module, state: dict[str, Tensor]) -> None:
    core.to("meta").to_empty(device="cpu")
    by_copying(core, state)


def in_inference_mode(core: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        by_assigning(core, state)
        assert core.is_calibrated
        core.query_mean.fill_(7)
        assert not core.is_calibrated  # tensors of inference mode count no versions
        core.query_mean.copy_(state["query_mean"])


FILLED = [by_copying, behind_the_version_counters, by_assigning, by_assigning_data, after_meta, in_inference_mode]


@pytest.mark.parametrize("fill", FILLED)
@pytest.mark.parametrize("kind", FITTED)
def test_a_module_is_calibrated_once_its_buffers_are_filled(kind: str, fill: Callable) -> None:
    core, other = calibrated(kind), fresh(kind)
    fill(other, core.state_dict())
    assert other.is_calibrated and other.scale == SCALE and torch.equal(run(other), run(core))


def test_counts_are_where_the_buffers_say() -> None:
    core = sb.ScatterbrainAttention(2, 8, low_rank=sb.Favor(8, redraw=2))
    for _ in range(5):
        sb.update_statistics(core)
    other = sb.ScatterbrainAttention(2, 8, low_rank=sb.Favor(8, redraw=2))
    by_copying(other, core.state_dict())
    assert (other.steps, other.draws) == (5, 2)
    sb.update_statistics(other)
    sb.update_statistics(core)
    assert torch.equal(other.projection, core.projection) and (other.steps, other.draws) == (6, 3)


def test_a_running_module_reads_its_record_once(monkeypatch: pytest.MonkeyPatch) -> None:
    core, reads = calibrated(), []
    read = kernel_state.read_record
    monkeypatch.setattr(kernel_state, "read_record", lambda *a: reads.append(1) or read(*a))
    run(core), run(core)
    assert not reads  # calibration has left it read
    core.query_mean.mul_(1)
    run(core), run(core)
    assert reads == [1]


# -------------------- what is not to be believed


def zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor)


def foreign(tensor: Tensor) -> Tensor:
    return rand(*tensor.shape, seed=9, dtype=tensor.dtype)


def memory(tensor: Tensor) -> Tensor:
    """What may lie in memory that nothing has filled."""
    return torch.full_like(tensor, 1e-310 if tensor.dtype == torch.float64 else 1e30)


def not_finite(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = float("nan")
    return tensor


@pytest.mark.parametrize("left", [zeros, foreign, memory, not_finite])
@pytest.mark.parametrize("missing", STATISTICS)
@pytest.mark.parametrize("kind", FITTED)
def test_statistics_without_one_of_them_are_refused(kind: str, missing: str, left: Callable) -> None:
    core, state = fresh(kind), calibrated(kind).state_dict()
    by_copying(core, state | {missing: left(state[missing])})
    assert not core.is_calibrated
    with pytest.raises(ValueError, match=r"not calibrated: .*(record|statistics).*load a whole checkpoint"):
        run(core)
    core.get_buffer(missing).copy_(state[missing])
    assert core.is_calibrated
    if not missing.startswith("moment"):  # which no call runs with
        core.get_buffer(missing).copy_(left(state[missing]))
        assert not core.is_calibrated


@pytest.mark.parametrize("missing", STATISTICS)
@pytest.mark.parametrize("kind", FITTED)
def test_a_state_dict_without_an_entry_is_refused_even_where_loading_is_not_strict(kind: str, missing: str) -> None:
    core, state = fresh(kind), calibrated(kind).state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
        fresh(kind).load_state_dict(state)
    core.load_state_dict(state, strict=False)
    assert not core.is_calibrated
    with pytest.raises(ValueError, match=f"not calibrated: .*{missing if missing != 'calibration' else 'statistics'}"):
        run(core)


def test_memory_that_nothing_has_filled_is_refused_until_it_is_reset() -> None:
    core = fresh("ema").to("meta").to_empty(device="cpu")
    for buffer in core.buffers():
        buffer.fill_(3)
    with pytest.raises(ValueError, match="not calibrated.*reset_parameters"):
        run(core)
    core.reset_parameters()
    assert run(core).isfinite().all()


def test_statistics_of_ones_own_are_believed_once_they_are_declared() -> None:
    core = calibrated()
    with torch.no_grad():
        core.query_mean.add_(0.1)
    assert not core.is_calibrated
    core.is_calibrated = True
    assert core.is_calibrated and core.scale == SCALE and run(core).isfinite().all()
    core.is_calibrated = False
    with pytest.raises(ValueError, match="not calibrated"):
        run(core)
    with pytest.raises(ValueError, match="needs the scale"):
        fresh().is_calibrated = True


# -------------------- what happens to whole models


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("fill", [by_assigning, by_copying])
@pytest.mark.parametrize("which", [(torch.float32, torch.float64), (torch.float32,)])
def test_a_checkpoint_that_was_cast_is_as_good_as_its_type(
    kind: str, dtype: torch.dtype, fill: Callable, which: tuple[torch.dtype, ...]
) -> None:
    for seed in range(8):
        core, other = calibrated(kind, seed), fresh(kind)
        fill(other, {name: t.to(dtype) if t.dtype in which else t for name, t in core.state_dict().items()})
        assert other.is_calibrated and abs(other.scale - SCALE) < 1e-6 * SCALE
        want = run(core)
        assert (run(other) - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("kind", FITTED)
def test_an_average_of_modules_is_calibrated(kind: str) -> None:
    cores = [calibrated(kind, seed) for seed in range(3)]
    average = torch.optim.swa_utils.AveragedModel(cores[0], use_buffers=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for core in cores:
            average.update_parameters(core)
    means = torch.stack([core.query_mean for core in cores]).mean(0)
    torch.testing.assert_close(average.module.query_mean, means)
    assert average.module.is_calibrated and run(average).isfinite().all()


def test_a_moving_average_of_a_model_in_place_keeps_its_calibration() -> None:
    core, average = calibrated(), calibrated()
    for _ in range(200):
        for mine, theirs in zip(average.state_dict().values(), core.state_dict().values()):
            mine.copy_(0.999 * mine + 0.001 * theirs)  # counts too, as timm's first moving average does
    assert average.is_calibrated and abs(average.scale - SCALE) < 1e-9


def test_a_copy_keeps_no_memory_of_the_original() -> None:
    core = calibrated()
    run(core)
    for other in (copy.deepcopy(core), copy.copy(core)):
        assert other.is_calibrated and torch.equal(run(other), run(core))
    assert not copy.deepcopy(core).__dict__["_seen"]


def test_a_record_has_the_same_bits_for_any_number_of_threads_and_any_place_in_memory() -> None:
    threads, moments = torch.get_num_threads(), rand(12, 64, 64, dtype=torch.float64)
    records = []
    for count, offset in ((1, 0), (2, 0), (3, 1), (1, 3)):
        torch.set_num_threads(count)
        moved = torch.empty(moments.numel() + offset, dtype=torch.float64)[offset:].view_as(moments).copy_(moments)
        records.append(written_record(SCALE, [moved]))
    torch.set_num_threads(threads)
    assert all(torch.equal(record, records[0]) for record in records)


# -------------------- under a trace


@pytest.mark.parametrize("kind", FITTED)
def test_a_compiled_module_knows_what_was_written_into_its_buffers(kind: str) -> None:
    core, other = calibrated(kind), fresh(kind)
    by_copying(other, core.state_dict())  # nothing has looked at them yet
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled), run(core))


def test_a_compiled_module_that_is_calibrated_again_for_another_scale_is_compiled_again() -> None:
    core, inputs = calibrated(), qkv(seed=3)
    torch._dynamo.reset()
    compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled), run(core))
    with sb.calibrate(core), torch.no_grad():
        core(*inputs, scale=0.5)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs, scale=0.5), core(*inputs, scale=0.5))
    core.reset_parameters()
    with pytest.raises(Exception, match="not calibrated"), torch.no_grad():
        compiled(*inputs, scale=0.5)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_module_has_its_statistics(strict: bool) -> None:
    core, inputs = fresh(), tuple(qkv(seed=3))
    core.load_state_dict(calibrated().state_dict())

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = core

        def forward(self, *tokens: Tensor) -> Tensor:
            return self.core(*tokens, scale=SCALE)

    with torch.no_grad():
        exported = torch.export.export(Scaled(), inputs, strict=strict)
        assert torch.equal(exported.module()(*inputs), run(core))


def test_transforms_run_with_what_is_known() -> None:
    core, (q, k, v) = calibrated(), qkv(seed=3)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda a, b, c: core(a[None], b[None], c[None], scale=SCALE)[0])(q, k, v)
        state = dict(core.state_dict())
        called = torch.func.functional_call(fresh(), state, (q, k, v), {"scale": SCALE})
    torch.testing.assert_close(mapped, run(core))
    assert torch.equal(called, run(core))
