"""What each input and output of a foreign graph is: an input of a time step, a state, an output; and its axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cellserve.export.adopt.state_matching import Dims, Port

SERVED_TYPES = ("float32", "int32", "int64")
# Other types, each with the type that stands for it in the service: the graph gets a Cast.
CASTS = {"bool": "int32", "float16": "float32", "float64": "float32", "int8": "int32", "uint8": "int32",
         "int16": "int32", "uint16": "int32"}  # fmt: skip
NO_AXIS = -1  # an axis flag's `none`


@dataclass(frozen=True, slots=True)
class InputFlag:
    """The user's `--input` flag."""

    name: str
    batch_axis: int | None = None  # None if not given, NO_AXIS for an input without one
    time_axis: int | None = None  # None if not given, NO_AXIS for an input without one
    bounds: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class StateFlag:
    """The user's `--state` flag."""

    name: str
    following: str
    batch_axis: int | None = None  # None if not given, NO_AXIS for a state without one


@dataclass(frozen=True, slots=True)
class OutputFlag:
    """The user's `--output` flag."""

    name: str
    batch_axis: int | None = None  # None if not given, NO_AXIS for an output without one
    time_axis: int | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """The user's `--context` flag: how many of an input's last entries precede those of the next step."""

    entries: int
    axis: int | None = None  # None for the last

    def __str__(self) -> str:
        """As the user gives it."""
        return str(self.entries) if self.axis is None else f"{self.entries}:axis={self.axis}"


@dataclass(frozen=True, slots=True)
class Flags:
    """Everything that the user says about roles and axes."""

    inputs: Sequence[InputFlag] = ()
    states: Sequence[StateFlag] = ()
    outputs: Sequence[OutputFlag] = ()
    contexts: Mapping[str, Context] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Axes:
    """Which axes of a tensor of the graph are special."""

    batch: int | None = None  # None for a tensor without one: a batch of one
    time: int | None = None
    single: int | None = None  # a time axis of size one, which clients do not see

    @property
    def leading(self) -> tuple[int, ...]:
        """The axes that are not part of a time step's own shape, in the order of the service."""
        return tuple(axis for axis in (self.batch, self.time, self.single) if axis is not None)


@dataclass(frozen=True, slots=True)
class InputRole:
    """An input of a time step."""

    port: Port
    axes: Axes
    shape: tuple[int, ...]  # what a client sends for one time step
    flag: InputFlag
    context: Context | None = None


@dataclass(frozen=True, slots=True)
class StateRole:
    """A state and its next one."""

    port: Port
    following: str
    batch_axis: int | None  # None for a state without one
    shape: tuple[int, ...]  # without the batch axis
    found: bool  # found by its name, not given by the user


@dataclass(frozen=True, slots=True)
class Roles:
    """All roles of a graph."""

    inputs: tuple[InputRole, ...]
    states: tuple[StateRole, ...]
    batch: int | None  # rows per run, if the graph fixes it
    flags: Flags

    @property
    def time_axis(self) -> bool:
        """Whether a run takes many time steps."""
        return self.inputs[0].axes.time is not None


def served_type(name: str) -> str:
    """Returns the type by which the service carries a tensor of this type."""
    return CASTS.get(name, name)


def listed(ports: Sequence[Port]) -> str:
    """Names and shapes, for messages."""
    return ", ".join(f"{port.name} {words(port.dims)}" for port in ports)


def words(dims: Dims | None) -> str:
    """A shape, for messages."""
    return "[?]" if dims is None else f"[{', '.join(map(str, dims))}]"
