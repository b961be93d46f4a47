"""What a module remembers for its low-rank kernel, in parameters and plain persistent buffers: how they start, and how
they are read, written, loaded and moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain.low_rank import Heads, LowRank, State
from scatterbrain.low_rank.moments import Moments
from scatterbrain.nn.distributed import fill
from scatterbrain.nn.record import NOTHING, Record, read_record, size_of_record, written_record

RECORD = "calibration"  # buffer with the record of the statistics (scatterbrain.nn.record)
COUNTS = {"steps": "step_count", "draws": "draw_count"}  # buffers with the counts that a kernel names
_OWN = (RECORD, *COUNTS.values())  # buffers that no kernel makes


def _count(name: str, meaning: str) -> property:
    """A count of a module, and the way to set it."""
    return property(
        lambda module: module._value(name), lambda module, value: module._set_count(name, value), doc=meaning
    )


@dataclass(frozen=True)
class _Given:
    """The kernels that a module was given. Its copies remember the same ones: their own have copies of the modules that
    these compute with, and would be strangers to a choice of the same kernels."""

    low_rank: LowRank
    causal_low_rank: LowRank
    kernel_of_state: LowRank

    def __deepcopy__(self, memo: dict[int, Any]) -> _Given:
        return self


def _modules_of(low_rank: LowRank, causal_low_rank: LowRank) -> Iterator[tuple[LowRank, str, nn.Module, str]]:
    """(kernel, the name that it has for a module, the module that it was made with, the name that its owner has for
    it); one that occurs twice has one name there."""
    names: list[tuple[nn.Module, str]] = []
    for prefix, kernel in (("", low_rank), ("causal_", causal_low_rank)):
        for name, module in {} if kernel is None else kernel.modules().items():
            own = next((own for known, own in names if known is module), prefix + name)
            names.append((module, own))
            yield kernel, name, module, own


class KernelState(nn.Module):
    """The base of :class:`scatterbrain.ScatterbrainAttention`: the state of its low-rank kernel, of the one of its two
    kernels that has any.

    Anything may fill buffers at any time: loaders, collectives, averages of weights. So all that is known comes from
    reading them, and holds for as long as they are unchanged.

    Attributes:
        low_rank, causal_low_rank: the kernels of bidirectional and of causal calls.
        kernel_of_state: the one of them whose state this is.
        is_exact: whether the module never runs with its kernel; then it has no state, and takes none from checkpoints.
        gathered: moments of the forward passes since the last commit; None without any.
        gathered_scale: factor of q.k of these moments.
        is_blank: whether the memory of the state was made without content (``to_empty``, a move from the meta device)
            and neither :meth:`reset_parameters` nor a whole checkpoint of its own has filled it since.
        blank_modules: those of the modules that the kernels compute with of which the same holds.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int
    low_rank: LowRank
    causal_low_rank: LowRank
    kernel_of_state: LowRank
    is_exact: bool
    is_blank: bool = False
    blank_modules: Sequence[nn.Module] = ()
    _of_kernels: list[str] = []  # names of modules that the kernels compute with
    _given: _Given | None = None

    # -------------------- how it starts

    def _register_state(self) -> None:
        """For the end of ``__init__``, when heads and kernel are known."""
        self._forget()
        state = self._initial_state()
        for name, tensor in state.parameters.items():
            self.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in state.buffers.items():
            self.register_buffer(name, tensor)

    def _register_modules(self) -> None:
        """For whenever kernels are set: the modules that they compute with are those of this one. What was put in the
        place of one stays there if a kernel computes with the same one again."""
        given = self._given
        before = [] if given is None else [*_modules_of(given.low_rank, given.causal_low_rank)]
        present = [(module, self._modules.get(own)) for _, _, module, own in before]
        for own in self._of_kernels:
            self._modules.pop(own, None)
        self._given = _Given(self.low_rank, self.causal_low_rank, self.kernel_of_state)
        self._of_kernels = []
        for _, _, module, own in _modules_of(self.low_rank, self.causal_low_rank):
            if own not in self._of_kernels:
                put = (other for known, other in present if known is module and other is not None)
                self.add_module(own, next(put, module))
                self._of_kernels.append(own)

    def keeps_state_of(self, kernel: LowRank) -> bool:
        """Whether the state is that of this kernel: of one that is equal to it, or that it is a copy of."""
        return self.kernel_of_state == kernel or (self._given is not None and self._given.kernel_of_state == kernel)

    def _modules_of_kernels(self) -> list[nn.Module]:
        """The modules that the kernels compute with, as they are now."""
        return [self._modules[own] for own in self._of_kernels if self._modules.get(own) is not None]

    def kernel_that_runs(self, is_causal: bool) -> LowRank:
        """The kernel of causal or of bidirectional calls with the modules that this one has now: quantization, adapters
        and data parallelism put others in the place of those that it was made with."""
        kernel = self.causal_low_rank if is_causal else self.low_rank
        if not self._of_kernels:
            return kernel
        present = {
            name: self._modules.get(own, module)
            for made_for, name, module, own in _modules_of(self.low_rank, self.causal_low_rank)
            if made_for is kernel
        }
        made_with = kernel.modules()
        others = {name: module for name, module in present.items() if module is not made_with[name]}
        return kernel.with_modules(others) if others else kernel

    def _initial_state(self) -> State:
        if self.kernel_of_state is None:
            return State({}, {})
        parameters, buffers = self.kernel_of_state.initial_state(
            Heads(self.num_heads, self.head_dim, self.num_kv_heads)
        )
        buffers = dict(buffers)
        if self.kernel_of_state.is_calibrated_from_data and buffers:
            buffers[RECORD] = _record_of(None, list(buffers.values()))
        counts = {COUNTS[name]: torch.zeros((), dtype=torch.int64) for name in self.kernel_of_state.counts}
        return State(parameters, buffers | counts)

    def _forget(self) -> None:
        self.gathered: Moments | None = None
        self.gathered_scale: float | None = None
        self._known: dict[str, Any] = {RECORD: NOTHING} | dict.fromkeys(COUNTS, 0)
        self._decide()
        self._seen: dict[str, Callable[[dict[str, Tensor]], bool]] = {}  # what was read, and whether that still holds

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again, in place: projections redrawn, calibration forgotten. Also fills a module created on the meta
        device and moved with ``to_empty``, and with it the modules that its kernels compute with, as far as each
        part of them has a ``reset_parameters`` of its own."""
        self._reset_state()
        self.blank_modules = [module for module in self.blank_modules if not _reset(module)]

    def _reset_state(self) -> None:
        self._forget()
        state = self._initial_state()
        for name, tensor in (state.parameters | state.buffers).items():
            fill(getattr(self, name), tensor)
        self.is_blank = False

    @torch.no_grad()
    def state_for_original(self, prefix: str, device: torch.device) -> dict[str, Tensor]:
        """What a checkpoint of a model without this module lacks of its state dict: statistics start again, since they
        belong to the weights that they were fitted with, learned projections and random features stay as they are.
        Where there is no content yet, all of it is as in a new module; a module on the meta device gets tensors on
        ``device``, for a loader that assigns them. Of modules that the kernels compute with nothing is known but what
        they hold: those without content are left out, and a loader reports their entries as missing."""
        on_meta = {name: t for name, t in (self._parameters | self._buffers).items() if t.is_meta}
        if not on_meta and (self.is_blank or self.is_calibrated):
            self._reset_state()
        lacking = tuple(f"{prefix}{name}." for name in self._of_kernels if self._lacks_content(name))
        own = {name: entry for name, entry in self.state_dict(prefix=prefix).items() if not name.startswith(lacking)}
        if on_meta:
            with torch.device("cpu"):
                fresh = self._initial_state()
            tensors = fresh.parameters | fresh.buffers
            own |= {f"{prefix}{name}": tensors[name].to(device, t.dtype) for name, t in on_meta.items()}
        return own

    def _lacks_content(self, name: str) -> bool:
        """Whether the module of this name that the kernels compute with has memory that nothing has filled, or none."""
        module = self._modules.get(name)
        if module is None:
            return False
        is_blank = any(part is blank for part in module.modules() for blank in self.blank_modules)
        return is_blank or _is_on_meta(module)

    def tensors(self, names: Iterable[str]) -> list[Tensor]:
        """Parameters and buffers by name."""
        # Past nn.Module's slow lookup, unless something has taken their place, as parametrizations and sharding do.
        parameters, buffers = self._parameters, self._buffers
        return [
            parameters[name] if name in parameters else buffers[name] if name in buffers else getattr(self, name)
            for name in names
        ]

    @property
    def has_state(self) -> bool:
        """Whether there is anything to remember."""
        return any(True for _ in self.parameters()) or any(True for _ in self.buffers())

    # -------------------- what the buffers say

    @property
    def is_calibrated(self) -> bool:
        return self._value(RECORD).is_good

    @is_calibrated.setter
    def is_calibrated(self, value: bool) -> None:
        if value and self.scale is None:
            raise ValueError(
                "ScatterbrainAttention: is_calibrated = True needs the scale of q.k that the statistics hold for, and "
                "none is known; calibrate (sb.calibrate), or set gathered_scale first"
            )
        if value and self.lacks_memory:
            raise ValueError(
                "ScatterbrainAttention: is_calibrated = True needs statistics, and the buffers are on the meta device, "
                "which keeps none; load the module, or call to_empty and reset_parameters, first"
            )
        self._know(RECORD, Record(self.scale, "") if value else NOTHING)
        statistics = self.tensors(self._statistics())
        if statistics:
            fill(self._buffers[RECORD], _record_of(self._known[RECORD].scale, statistics))
            self._look(RECORD)
        if self.gathered is None:
            self.gathered_scale = None

    @property
    def lacks_memory(self) -> bool:
        """Whether statistics cannot be kept: their buffers are on the meta device, also where accelerate puts those
        that it has offloaded."""
        return any(self._buffers[name].is_meta for name in self._statistics())

    @property
    def calibrated_scale(self) -> float | None:
        """Factor of q.k that the statistics hold for; None before there are any.

        Raises:
            ValueError: the buffers hold statistics that are not to be used.
        """
        record = self._value(RECORD)
        if record.problem:
            raise ValueError(
                f"ScatterbrainAttention is not calibrated: {record.problem}; load a whole checkpoint, calibrate again "
                "(sb.calibrate), call reset_parameters(), or set is_calibrated = True for statistics of your own"
            )
        return record.scale

    @property
    def calibration_problem(self) -> str:
        """Why the statistics in the buffers cannot be used although there are some; "" otherwise."""
        return self._value(RECORD).problem

    @property
    def scale(self) -> float | None:
        """Factor of q.k of the moments that were gathered, or else of the statistics; None without either."""
        return self._value(RECORD).scale if self.gathered_scale is None else self.gathered_scale

    steps = _count("steps", "Optimizer steps that are over.")
    draws = _count("draws", "Projections drawn since the first.")

    def _statistics(self) -> list[str]:
        """Names of the buffers that the record is about."""
        return [name for name in self._buffers if name not in _OWN] if RECORD in self._buffers else []

    def commits_average(self) -> bool:
        """Whether the end of this step commits a moving average, if anything was gathered for it."""
        if self.kernel_of_state is None or not self.kernel_of_state.average_every:
            return False
        self._read(RECORD)
        self._read("steps")
        return self._average_is_due

    def _value(self, what: str) -> Any:
        self._read(what)
        return self._known[what]

    def _read(self, what: str) -> None:
        if torch.compiler.is_compiling():
            self._look_while_tracing()
            return
        seen = self._seen.get(what)
        if seen is None or not seen(self._buffers):
            self._look(what)

    def _know(self, what: str, value: Any) -> None:
        self._known[what] = value
        self._decide()

    def _decide(self) -> None:
        """What forward asks of the count of steps is decided where that is read or written: a graph that used the
        count itself would be compiled again in every step."""
        every = 0 if self.kernel_of_state is None else self.kernel_of_state.average_every
        is_first = not self._known[RECORD].is_good
        self._average_is_due = every > 0 and (is_first or (self._known["steps"] + 1) % every == 0)

    @torch.compiler.assume_constant_result
    def _look_while_tracing(self) -> bool:
        """For the compiler, which cannot trace the reading: its result is part of the graph, and another value that the
        module comes to know makes another graph."""
        for what in self._known:
            self._look(what)
        return True

    def _look(self, what: str) -> None:
        """Reads buffers: they may be filled by anything, at any time. Where they cannot be read, on the meta device or
        under a transform, what is known stays."""
        buffers, own = self._buffers, RECORD if what == RECORD else COUNTS[what]
        names = self._statistics() if what == RECORD else []
        if own not in buffers or not _are_readable([buffers[name] for name in (own, *names)]):
            return
        # What a call does not run with is looked at here alone, and not in every call.
        watched = [own, *(name for name in names if name in (self.kernel_of_state.runs_with or names))]
        copy = None
        if what == RECORD:
            value = read_record(buffers[own], names, [buffers[name] for name in names])
            if value == NOTHING and _is_without_buffers(self) and not any(bool(buffers[n].any()) for n in names):
                value = Record(None, "accelerate loads the buffers of offloaded layers only with offload_buffers=True")
            # What says that nothing is there yet is compared, since collectives write behind the version counters.
            copy = None if value.is_good else buffers[own].detach().clone()
        else:
            value = int(buffers[own])
        if value != self._known[what]:
            self._know(what, value)
        self._seen.pop(what, None)
        # Tensors of inference mode count no versions, and are read every time.
        if not any(buffers[name].is_inference() for name in watched) and not (what == RECORD and value.problem):
            self._seen[what] = _unchanged(buffers, watched, copy)

    @torch.no_grad()
    def _set_count(self, name: str, value: int) -> None:
        buffer = self._buffers.get(COUNTS[name])
        if buffer is None:
            self._know(name, value)
        else:
            fill(buffer, torch.tensor(value, dtype=buffer.dtype))
            self._look(name)

    # -------------------- loaded, copied and moved

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        entries = [name for name in state_dict if name.startswith(prefix)]
        if self.is_exact or (self.kernel_of_state is not None and not self.has_state):
            for name in entries:
                del state_dict[name]
            # A checkpoint of an earlier release has the entry _extra_state for every kernel, those without state too.
            of_statistics = any(name != f"{prefix}_extra_state" for name in entries)
            if of_statistics and not self.is_exact:  # exact attention needs nothing that an approximation saved
                self._tell_of_unused()
        self._translate(state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if all(f"{prefix}{name}" in state_dict for name in (*self._parameters, *self._buffers)):
            self.is_blank = False
        if self.blank_modules:
            self.blank_modules = self._still_blank(state_dict, prefix)
        for what in self._known:
            self._look(what)

    def _still_blank(self, state_dict: dict[str, Any], prefix: str) -> list[nn.Module]:
        """The blank modules but those that ``state_dict`` fills."""
        filled = [
            part
            for own in self._of_kernels
            if (module := self._modules.get(own)) is not None
            and all(name in state_dict for name in module.state_dict(prefix=f"{prefix}{own}."))
            for part in module.modules()
        ]
        return [module for module in self.blank_modules if not any(module is part for part in filled)]

    def _tell_of_unused(self) -> None:
        """Says that a checkpoint has entries for a kernel with state, and this module none."""

    def _translate(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
        """Checkpoints of earlier releases have an entry ``_extra_state`` in place of the record and the counts."""
        own = {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}
        if self.kernel_of_state is not None:
            misfit = self.kernel_of_state.misfit({name: tuple(tensor.shape) for name, tensor in own.items()})
            if misfit:
                error_msgs.append(f"ScatterbrainAttention: {misfit}")
        extra = state_dict.pop(f"{prefix}_extra_state", None)
        if extra is not None and not extra.is_meta:
            statistics = [own[name] for name in self._statistics() if name in own]
            if len(statistics) < len(self._statistics()):
                statistics = []
            for name, tensor in self._from_extra_state(extra, statistics).items():
                state_dict.setdefault(prefix + name, tensor)

    @property
    def made_from_extra_state(self) -> list[str]:
        """Entries of a state dict that checkpoints of earlier releases have in their ``_extra_state``."""
        return [name for name in self._buffers if name in _OWN]

    def load_extra_state(self, extra: Tensor) -> None:
        """Fills record and counts from the entry ``_extra_state`` of a checkpoint of an earlier release, whose other
        entries are in place; for loaders that go around :meth:`load_state_dict`."""
        statistics = self.tensors(self._statistics())
        for name, tensor in self._from_extra_state(extra, statistics).items():
            fill(self._buffers[name], tensor)

    def _from_extra_state(self, extra: Tensor, statistics: list[Tensor]) -> dict[str, Tensor]:
        """Record and counts, by the names of their buffers, from what earlier releases kept of a module with these
        statistics: calibrated, scale or NaN, rank, steps, draws."""
        calibrated, scale, _, *counts = extra.tolist()
        found = dict(zip(COUNTS.values(), (torch.tensor(int(n), dtype=torch.int64) for n in counts)))
        found = {name: tensor for name, tensor in found.items() if name in self._buffers}
        if statistics and _are_readable(statistics):
            found[RECORD] = written_record(scale if calibrated else None, statistics)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": {}}  # holds nothing but what can be read again

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "kernel_of_state" not in state:  # pickled when a module had one kernel
            self.kernel_of_state = self.low_rank
        if "_known" in state:
            self._decide()
            return
        # A module pickled by an earlier release.
        before = {name: self.__dict__.pop(name) for name in ("is_calibrated", "scale", "steps", "draws")}
        gathered = self.gathered
        self._forget()
        if self.is_exact:
            self.low_rank = self.kernel_of_state = None
            self._parameters.clear()
            self._buffers.clear()
        for name, tensor in self._initial_state().buffers.items():
            if name in _OWN:
                self.register_buffer(name, tensor)
        self.gathered, self.gathered_scale = gathered, before["scale"]
        self.is_calibrated = before["is_calibrated"]
        self.steps, self.draws = before["steps"], before["draws"]

    def _apply(self, fn, recurse: bool = True):
        """Moves buffers with the module but keeps the precision in which they were fitted: half a mantissa would undo
        the calibration."""
        self._seen.clear()  # or it would keep the memory that the buffers leave
        kept = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        originals = dict(self._buffers)
        # to_empty leaves memory without content behind, of tensors that had some too.
        empties = getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        had_none = empties or any(t.is_meta for t in (*self._parameters.values(), *originals.values()))
        made_anew = [m for m in self._modules_of_kernels() if recurse and (empties or _is_on_meta(m))]
        super()._apply(fn, recurse=False)
        for module in self.children() if recurse else ():
            module._apply(_without_16_bits(fn))
        for name, dtype in kept.items():
            if self._buffers[name].dtype != dtype:
                self._buffers[name] = originals[name].to(self._buffers[name].device)
        if had_none and not any(t.is_meta for t in (*self._parameters.values(), *self._buffers.values())):
            self.is_blank = bool(self._parameters or self._buffers)
        made_anew = [m for m in made_anew if not (_is_on_meta(m) or any(m is blank for blank in self.blank_modules))]
        self.blank_modules = [*self.blank_modules, *made_anew]
        return self


def _is_on_meta(module: nn.Module) -> bool:
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def _reset(module: nn.Module) -> bool:
    """Lets every part of the module fill its own memory. Whether all that have any could."""
    are_filled = True
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if reset is not None:
            reset()
        elif part._parameters or part._buffers:
            are_filled = False
    return are_filled


def _without_16_bits(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """For the modules that a kernel computes with: what they are given of tokens of 16 bits is float32."""

    def apply(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        is_narrower = applied.dtype in (torch.bfloat16, torch.float16) and applied.dtype != tensor.dtype
        return tensor.to(applied.device) if is_narrower else applied

    return apply


def _unchanged(
    buffers: dict[str, Tensor], names: list[str], copy: Tensor | None
) -> Callable[[dict[str, Tensor]], bool]:
    """A function that says whether buffers of these names are still those in ``buffers`` and unchanged since, and, if
    there is a ``copy`` of the first, equal to it. Every call of a module asks it, so it is as plain as can be."""
    select = itemgetter(*(names if len(names) > 1 else names * 2))  # of two or more names it gives a tuple
    kept = select(buffers)
    versions = [t._version for t in kept]

    def is_current(buffers: dict[str, Tensor]) -> bool:
        tensors = select(buffers)
        if not all(map(is_, tensors, kept)) or [t._version for t in tensors] != versions:
            return False
        return copy is None or torch.equal(copy, tensors[0])

    return is_current


def _are_readable(tensors: Sequence[Tensor]) -> bool:
    """Whether these are numbers in memory, and nothing watches or transforms what is done with them."""
    return not (torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()) and all(
        type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in tensors
    )


def _is_without_buffers(module: nn.Module) -> bool:
    """Whether accelerate has offloaded the module, and its buffers with it to nowhere."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "offload", False) and not getattr(hook, "offload_buffers", True)


def _record_of(scale: float | None, statistics: list[Tensor]) -> Tensor:
    """Their record, without content where they have none to be read."""
    if _are_readable(statistics):
        return written_record(scale, statistics)
    return torch.zeros(size_of_record(len(statistics)), dtype=torch.float64, device=statistics[0].device)
