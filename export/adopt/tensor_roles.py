"""Decides the role of each input and output of a foreign graph (input of a time step, state, output), and its axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cellserve.export.adopt.state_matching import Dims, Port, can_be_next, find_pairs, looks_like_a_state
from cellserve.export.errors import ExportError

SERVED_TYPES = ("float32", "int32", "int64")


@dataclass(frozen=True, slots=True)
class InputFlag:
    """The user's `--input` flag."""

    name: str
    batch_axis: int | None = None  # None if not given, -1 for an input without one
    time_axis: int | None = None
    bounds: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class StateFlag:
    """The user's `--state` flag."""

    name: str
    following: str
    batch_axis: int | None = None  # None if not given


@dataclass(frozen=True, slots=True)
class InputRole:
    """An input of a time step."""

    port: Port
    batch_axis: int | None  # None for an input without one: a batch of one
    time_axis: int | None
    shape: tuple[int, ...]  # one time step, without the batch axis
    flag: InputFlag

    @property
    def order(self) -> tuple[int, ...] | None:
        """Permutation that brings `[batch, time, ...]` to the graph's own order; None if it is the same."""
        if self.batch_axis is None:
            return None
        axes = [self.batch_axis] if self.time_axis is None else [self.batch_axis, self.time_axis]
        own = axes + [axis for axis in range(len(axes) + len(self.shape)) if axis not in axes]
        order = tuple(own.index(axis) for axis in range(len(own)))
        return None if order == tuple(range(len(order))) else order


@dataclass(frozen=True, slots=True)
class StateRole:
    """A state and its next one."""

    port: Port
    following: str
    batch_axis: int
    shape: tuple[int, ...]  # without the batch axis
    found: bool  # found by its name, not given by the user


@dataclass(frozen=True, slots=True)
class Roles:
    """All roles of a graph."""

    inputs: tuple[InputRole, ...]
    states: tuple[StateRole, ...]
    batch: int | None  # rows per run, if the graph fixes it

    @property
    def time_axis(self) -> bool:
        """Whether a run takes many time steps."""
        return self.inputs[0].time_axis is not None


def find_roles(
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    input_flags: Sequence[InputFlag],
    state_flags: Sequence[StateFlag],
    contexts: Mapping[str, int],
) -> Roles:
    """Finds the role of each input.

    Raises:
        ExportError: A role, an axis or a size is not clear; the message names the flag that decides it.
    """
    states, found = _states(inputs, outputs, input_flags, state_flags)
    left = [port for port in inputs if port.name not in states]
    flags = {flag.name: flag for flag in input_flags}
    _check_inputs(left, flags, contexts)
    if not states and not contexts:
        raise ExportError(
            "no state was found, by names like h and hn or past_x and present_x: give --state INPUT=OUTPUT "
            f"(inputs: {_names(inputs)}; outputs: {_names(outputs)})"
        )
    names = {dim for name in states for dim in _port(inputs, name).dims or () if isinstance(dim, str)}
    steps = tuple(_input_role(port, flags.get(port.name, InputFlag(port.name)), names) for port in left)
    timed = [role for role in steps if role.time_axis is not None]
    if timed and len(timed) < len(steps):
        without = next(role.port for role in steps if role.time_axis is None)
        raise ExportError(
            f"{timed[0].port.name} has a time axis and {without.name} {_words(without.dims)} has none: "
            f"say where it is with --input {without.name}:time_axis=N, or fix the other with --dim"
        )
    batch = _batch(steps)
    roles, fixed = [], batch if isinstance(batch, int) else None
    for name, following in states.items():
        axis_flag = next((flag.batch_axis for flag in state_flags if flag.name == name), None)
        port = _port(inputs, name)
        axis = _batch_axis(port, batch, axis_flag)
        size = (port.dims or ())[axis]
        if isinstance(size, int):
            if fixed not in (None, size):
                raise ExportError(f"{name} has {size} rows at axis {axis}, the inputs {fixed}: give its :batch_axis")
            fixed = size
        roles.append(StateRole(port, following, axis, _rest(port, (axis,)), name in found))
    return Roles(steps, tuple(roles), fixed)


def _states(
    inputs: Sequence[Port], outputs: Sequence[Port], input_flags: Sequence[InputFlag], state_flags: Sequence[StateFlag]
) -> tuple[dict[str, str], set[str]]:
    """Maps each state to its next state, and names those that were found."""
    pairs: dict[str, str] = {}
    for flag in state_flags:
        port, following = _port(inputs, flag.name), _port(outputs, flag.following, "output")
        if not can_be_next(port, following):
            raise ExportError(
                f"--state {flag.name}={flag.following}: {flag.name} is {port.type} {_words(port.dims)}, "
                f"{flag.following} is {following.type} {_words(following.dims)}: they must be alike"
            )
        pairs[flag.name] = flag.following
    told = {*pairs, *(flag.name for flag in input_flags)}
    free = [port for port in outputs if port.name not in pairs.values()]
    found = find_pairs([port for port in inputs if port.name not in told], free)
    return pairs | found, set(found)


def _check_inputs(left: Sequence[Port], flags: Mapping[str, InputFlag], contexts: Mapping[str, int]) -> None:
    for name in (*flags, *contexts):
        _port(left, name)
    if not left:
        raise ExportError("every input looks like a state: say with --input NAME which is none")
    for port in left:
        if port.name in flags:
            continue
        if port.dims == ():
            raise ExportError(f"{port.name} is one number: give its value with --constant {port.name}=VALUE")
        if flags or looks_like_a_state(port.name):
            raise ExportError(
                f"{port.name} {_words(port.dims)} {'is no --input' if flags else 'looks like a state'}, and no output "
                f"is its next state by name and shape: give --state {port.name}=OUTPUT, --constant {port.name}=VALUE "
                f"or --input {port.name}"
            )
    for port in left:
        if port.type not in SERVED_TYPES:
            raise ExportError(f"{port.name} is {port.type}: inputs of {', '.join(SERVED_TYPES)} can be served")


def _input_role(port: Port, flag: InputFlag, state_dims: set[str]) -> InputRole:
    dims = port.dims
    if dims is None or (not dims and flag.batch_axis != -1):
        raise ExportError(f"{port.name}: the graph does not say its shape: export it with one")
    batch_axis, time_axis = flag.batch_axis, flag.time_axis
    if batch_axis == -1:
        chosen: int | None = None
    elif batch_axis is not None:
        chosen = batch_axis
    else:
        # Time first, as PyTorch has it: the states share the name of the second dimension and not of the first.
        second = len(dims) > 1 and isinstance(dims[0], str) and dims[0] not in state_dims and dims[1] in state_dims
        chosen = 1 if time_axis == 0 or second else 0
    if time_axis is None:
        place = 0 if chosen is None else 1 - chosen if chosen < 2 else 0
        time_axis = place if place < len(dims) and isinstance(dims[place], str) else None
    axes = tuple(axis for axis in (chosen, time_axis) if axis is not None)
    if any(axis >= len(dims) for axis in axes) or len(set(axes)) < len(axes):
        raise ExportError(f"{port.name} {_words(dims)}: batch_axis and time_axis must be two of its axes")
    return InputRole(port, chosen, time_axis, _rest(port, axes), flag)


def _batch(steps: Sequence[InputRole]) -> int | str:
    """The number of rows per run, or the name of the dimension."""
    sizes = [1 if role.batch_axis is None else (role.port.dims or ())[role.batch_axis] for role in steps]
    fixed = {size for size in sizes if isinstance(size, int)}
    if len(fixed) > 1:
        raise ExportError(f"the inputs have different numbers of rows, {sorted(fixed)}: say which axes are their batch")
    return fixed.pop() if fixed else sizes[0]


def _batch_axis(port: Port, batch: int | str, told: int | None) -> int:
    dims = port.dims
    if not dims:
        raise ExportError(f"{port.name}: the graph does not say its shape: export it with one")
    if port.type not in SERVED_TYPES:
        raise ExportError(f"{port.name} is {port.type}: states of {', '.join(SERVED_TYPES)} can be served")
    if told is not None:
        if told >= len(dims):
            raise ExportError(f"{port.name} {_words(dims)}: it has no axis {told}")
        return told
    dynamic = [axis for axis, dim in enumerate(dims) if isinstance(dim, str)]
    alike = [axis for axis, dim in enumerate(dims) if dim == batch]
    if len(alike) == 1 or (alike and batch == 1):  # any of several axes of size one will do
        return alike[0]
    if len(dynamic) == 1:
        return dynamic[0]
    ones = [axis for axis, dim in enumerate(dims) if dim == 1]
    if ones and not dynamic:
        return ones[0]
    raise ExportError(
        f"{port.name} {_words(dims)}: which axis is the batch is not clear: give --state "
        f"{port.name}=OUTPUT:batch_axis=N, or fix the sizes of others with --dim NAME=VALUE"
    )


def _rest(port: Port, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the other axes."""
    sizes = []
    for axis, dim in enumerate(port.dims or ()):
        if axis not in axes:
            if isinstance(dim, str):
                raise ExportError(
                    f"{port.name} {_words(port.dims)}: the size of {dim!r} must be fixed: give --dim {dim}=VALUE"
                )
            sizes.append(dim)
    return tuple(sizes)


def _port(ports: Sequence[Port], name: str, kind: str = "input") -> Port:
    for port in ports:
        if port.name == name:
            return port
    raise ExportError(f"there is no such {kind} {name!r}: the candidates are {_names(ports) or 'none'}")


def _names(ports: Sequence[Port]) -> str:
    return ", ".join(port.name for port in ports)


def _words(dims: Dims | None) -> str:
    return "[?]" if dims is None else f"[{', '.join(map(str, dims))}]"
