"""What every low-rank kernel is: the class to derive from, what it runs with, and the state that a module
keeps for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from scatterbrain.operators.arguments import KernelInputs
from scatterbrain.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn

    from scatterbrain.call import Call
    from scatterbrain.low_rank.moments import Moments
    from scatterbrain.operators.untraced import Projection


class Coefficients:
    """Tensors that a low-rank kernel runs with: ``statistics=`` of :func:`scatterbrain.attention`. A frozen dataclass
    that derives from this class.

    Attributes:
        can_be_prepared: these are constants with ``tensors()`` and ``scale``, so a call with them can be kept
            (scatterbrain.prepared).
    """

    can_be_prepared: ClassVar[bool] = False

    @classmethod
    def unchecked(cls, *values: object) -> Coefficients:
        """From the values of all fields, which the package made itself: a module does so in every call."""
        coefficients = object.__new__(cls)
        for name, value in zip(cls.__match_args__, values):
            object.__setattr__(coefficients, name, value)
        return coefficients

    def to(self, *args: object, **kwargs: object) -> Coefficients:
        """The same on another device or in another dtype."""
        tensors = {name: t.to(*args, **kwargs) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)

    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that gradients flow to; the others are constants of the backward pass."""
        return ()


def check_shapes(owner: Coefficients, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensors of ``owner``, in the order of its fields, have these shapes."""
    for field, shape in zip(fields(owner), shapes):
        if tuple(getattr(owner, field.name).shape) != shape:
            raise ValueError(
                f"{type(owner).__name__}: {field.name} must be of shape {shape}, got "
                f"{tuple(getattr(owner, field.name).shape)}"
            )


class Heads(NamedTuple):
    """Geometry of a module's heads."""

    num_heads: int
    head_dim: int
    num_kv_heads: int


class State(NamedTuple):
    """Tensors of a module, by name, each in its final shape."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


class LowRankKernel:
    """A positive kernel with a finite feature expansion, ``L_ij = exp(rho_i + kappa_j) K(x_i, y_j)``: the weight of the
    pairs that a support leaves out. A frozen dataclass that derives from this class is a low-rank kernel; what it must
    have is :meth:`coordinates`. :func:`register` makes it known by its name to YAML files and to the benchmark.

    Attributes:
        kind: name in configuration files, lower case.
        takes: classes of coefficients that the kernel runs with.
        code: how the attention operator evaluates K. 2: ``x.y`` of non-negative features. 1: ``(1 + x.y / 2)^2``, the
            quadratic kernel's. 3: the centroid kernel's, from clusters.
        is_configurable: numbers and names make it, so a configuration file can.
        can_be_prepared: the kernel has :meth:`constant_projection`, :meth:`own_projection` or :meth:`own_clusters`.
        training_defaults: values of fields with which a model can be trained from scratch.
        reads_input: the kernel looks at the whole sequence, so causal attention would see the future.
        adds_parameters: a module with this kernel has parameters of its own.
        is_calibrated_from_data: :func:`scatterbrain.calibrate`, or a moving average, fits the kernel's statistics.
        least_head_dim: width of the narrowest heads that it takes.
        runs_with: names of the buffers that :meth:`coefficients` reads, where those are not all of them.
        counts: what a module must count for the kernel, and save: "steps", "draws".
        average_every: optimizer steps from one commit of a moving average of moments to the next, counted as "steps";
            the first step's moments are committed too. 0 without one.
    """

    kind: ClassVar[str]
    takes: ClassVar[tuple[type[Coefficients], ...]] = ()
    code: ClassVar[int] = 2
    is_configurable: ClassVar[bool] = True
    can_be_prepared: ClassVar[bool] = False
    training_defaults: ClassVar[dict[str, Any]] = {}
    # Properties where they depend on a field.
    reads_input = False
    adds_parameters = False
    is_calibrated_from_data = False
    least_head_dim = 1
    counts: tuple[str, ...] = ()
    runs_with: tuple[str, ...] = ()
    average_every = 0

    # -------------------- a call

    def check(self, is_causal: bool) -> None:
        """Raises ValueError, with the cure, where causality rules the kernel out."""

    def check_head_dim(self, head_dim: int) -> None:
        """Raises ValueError for heads narrower than ``least_head_dim``."""
        if head_dim < self.least_head_dim:
            raise ValueError(
                f"{type(self).__name__}: rank must be at most head_dim={head_dim}, got {self.least_head_dim}"
            )

    def check_from_scratch(self, is_causal: bool = True) -> None:
        """Raises ValueError where the kernel cannot be part of a model, causal or bidirectional, that is trained from
        scratch."""

    def check_coefficients(self, coefficients: Coefficients | None, call: Call) -> None:
        """Raises TypeError or ValueError unless these are what the kernel needs for a call of this geometry and
        scale."""
        if coefficients is not None:
            raise TypeError(f"low_rank={type(self).__name__} takes no statistics, got {type(coefficients).__name__}")

    def can_run(self, coefficients: Coefficients | None) -> bool:
        """Whether the kernel has what it needs."""
        return True

    def fitting(self, coefficients: Coefficients) -> LowRankKernel:
        """This kernel with the size of the coefficients: their rank, their clusters, their features."""
        return self

    def coordinates(self, call: Call) -> tuple[Tensor, Tensor]:
        """query_map (B, Hq, N, r + 1) and key_map (B, Hkv, M, r + 1): coordinates x and y, then the log scales rho and
        kappa in the last column; float32 (float64 for float64 inputs), differentiable. Padded tokens may hold
        anything."""
        raise NotImplementedError(f"{type(self).__name__} must define coordinates(call)")

    def with_coefficients(self, call: Call) -> Call:
        """The call with what the kernel makes of its tokens in place of coefficients that were not given."""
        return call

    def inputs(self, call: Call) -> KernelInputs:
        """What the attention operator evaluates the kernel with: the coordinates, unless a kernel has a ``code`` of its
        own."""
        return KernelInputs(*self.coordinates(call))

    def projection(self, call: Call) -> Projection | None:
        """The affine maps that the coordinates are, where they are: one operator then projects, routes and attends
        without :meth:`coordinates`, so a class that overrides one of the two overrides both. For kernels of code 1."""
        return None

    def constant_projection(self, call: Call) -> Any:
        """:meth:`projection` with what it was made from, where it can be kept for later calls; else None."""
        return None

    def own_projection(self, call: Call) -> Any:
        """A function that makes :meth:`projection` from the queries and keys of a call like this one, where it is
        fitted to them; else None."""
        return None

    def own_clusters(self, call: Call) -> int:
        """Into how many clusters the operator is to sort the call's keys, where that makes all that the kernel needs;
        else 0."""
        return 0

    # -------------------- the state of a module

    def modules(self) -> dict[str, nn.Module]:
        """Modules of the caller's that the kernel computes with, by name. A module with this kernel has them as its
        own: they are trained, saved and moved with it."""
        return {}

    def with_modules(self, modules: dict[str, nn.Module]) -> LowRankKernel:
        """This kernel with others under some of the names of :meth:`modules`. By default those are fields."""
        return replace(self, **modules)

    def initial_state(self, heads: Heads) -> State:
        """State of a new module."""
        return State({}, {})

    def coefficients(self, owner: StateOwner) -> Coefficients | None:
        """What the state of a module comes to; None where there is nothing, or nothing yet."""
        return None

    def misfit(self, shapes: dict[str, tuple[int, ...]]) -> str:
        """Why a checkpoint with tensors of these shapes, by name, is for another kernel than this, and the cure; "" if
        nothing says so."""
        return ""

    def needs_calibration(self, owner: StateOwner) -> bool:
        """Whether running the module now would raise for want of statistics."""
        return False

    def store(self, owner: StateOwner, moments: Moments, is_average: bool = False) -> None:
        """Fits the statistics of a kernel that ``is_calibrated_from_data`` and writes them into the module."""
        raise NotImplementedError(
            f"{type(self).__name__} must define store(owner, moments, is_average), since it is_calibrated_from_data"
        )

    def check_step(self, owner: StateOwner) -> None:
        """Raises ValueError where the moments that were gathered cannot be committed. Of all modules of a model it is
        called before :meth:`finish_step` of the first."""

    def finish_step(self, owner: StateOwner) -> None:
        """An optimizer step is over: commits the moments that were gathered, redraws features."""

    def redraw_projection(self, owner: StateOwner, generator: torch.Generator) -> None:
        """New random features, for kernels that have them."""
        raise ValueError(f"redraw: only Favor has a random projection, this module has low_rank={self}")


class StateOwner(Protocol):
    """The module that holds a kernel's state: :class:`scatterbrain.ScatterbrainAttention`.

    Attributes:
        steps: optimizer steps that are over. draws: projections drawn since the first.
        gathered: moments of the forward passes since the last commit; None without any.
        gathered_scale: factor of q.k of these moments.
        scale: the same, or else that of the statistics; None without either.
        is_calibrated: whether statistics are in place; :meth:`LowRankKernel.store` sets it.
        calibrated_scale: factor of q.k that the statistics hold for, None before there are any; raises ValueError for
            statistics that were loaded in part.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int
    steps: int
    draws: int
    scale: float | None
    gathered: Moments | None
    gathered_scale: float | None
    is_calibrated: bool
    calibrated_scale: float | None

    def tensors(self, names: Iterable[str]) -> list[Tensor]:
        """Parameters and buffers by name."""

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def buffers(self) -> Iterable[Tensor]: ...


LOW_RANK_KERNELS = Registry(LowRankKernel)
register = LOW_RANK_KERNELS.register


def check_low_rank(low_rank: object, name: str = "low_rank") -> None:
    """Raises TypeError for anything but a low-rank kernel or None. ``name``: of the argument."""
    if low_rank is not None and not isinstance(low_rank, LowRankKernel):
        cure = (
            "; a function that makes features goes into sb.Features, a dense one (q, k) -> L into "
            "sb.reference.attention alone"
        )
        raise TypeError(
            f"{name} must be {LOW_RANK_KERNELS.names()}, Features or None, got {type(low_rank).__name__}"
            f"{cure if callable(low_rank) else ''}"
        )


def check_kind_of_coefficients(statistics: object) -> None:
    """Raises TypeError for anything but coefficients or None."""
    if statistics is not None and not isinstance(statistics, Coefficients):
        raise TypeError(
            "statistics must be Statistics, Projections, RandomFeatures, Clusters or None, got "
            f"{type(statistics).__name__}"
        )


def check_coefficients(low_rank: LowRankKernel | None, statistics: Coefficients | None, call: Call) -> None:
    """Raises unless the low-rank kernel has what it needs for this call."""
    if low_rank is not None:
        low_rank.check_coefficients(statistics, call)
        if statistics is not None and not call.query.is_meta:
            _check_values(statistics)
    elif statistics is not None:
        raise ValueError(f"statistics={type(statistics).__name__} needs a low-rank kernel, got low_rank=None")


def _check_values(statistics: Coefficients) -> None:
    """Raises ValueError for tensors without content. On another device than the tokens they are moved in every call."""
    for name, tensor in vars(statistics).items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise ValueError(
                f"statistics={type(statistics).__name__}: {name} is on the meta device and holds no values; load or "
                "fit them first"
            )
