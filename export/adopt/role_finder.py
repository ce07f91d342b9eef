"""Decides the role of each input and output of a foreign graph, and its axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cellserve.export.adopt.state_matching import Dims, Port, can_be_next, find_pairs, looks_like_a_state
from cellserve.export.adopt.tensor_roles import (
    CASTS,
    NO_AXIS,
    SERVED_TYPES,
    Axes,
    Context,
    Flags,
    InputFlag,
    InputRole,
    Roles,
    StateRole,
    listed,
    words,
)
from cellserve.export.errors import ExportError, did_you_mean


def find_roles(
    inputs: Sequence[Port], outputs: Sequence[Port], flags: Flags, recurrent: Mapping[str, tuple[int, int]]
) -> Roles:
    """Finds the role of each input.

    Args:
        inputs: The graph's inputs.
        outputs: The graph's outputs.
        flags: What the user says.
        recurrent: Inputs by name that a recurrent operator runs over, with their time and batch axes.

    Raises:
        ExportError: A role, an axis or a size is not clear; the message names the flag that decides it.
    """
    given = {flag.name: flag for flag in flags.inputs}
    for port in inputs:
        if port.name in recurrent and port.name not in {flag.name for flag in flags.states}:
            flag = given.get(port.name, InputFlag(port.name))
            if flag.time_axis is None and port.name not in flags.contexts:
                _check_time_axis(port, recurrent[port.name][0])
    states, found = _states(inputs, outputs, flags)
    left = [port for port in inputs if port.name not in states]
    _check_inputs(left, outputs, states, given, flags.contexts)
    if not states and not flags.contexts and len(inputs) == 1:
        raise ExportError(
            f"no state was found: {inputs[0].name} is the only input: export the model with its states as inputs, and "
            f"the next ones as outputs, or give --context {inputs[0].name}=ENTRIES if its steps overlap"
        )
    if not states and not flags.contexts:
        raise ExportError(
            f"no state was found, by names like h and hn or past_x and present_x: give --state INPUT=OUTPUT"
            f"{_example(inputs, outputs)} (inputs: {listed(inputs)}; outputs: {listed(outputs)})"
        )
    carried = [_port(inputs, name) for name in states]
    steps = tuple(
        _input_role(port, given.get(port.name, InputFlag(port.name)), carried, flags.contexts, recurrent.get(port.name))
        for port in left
    )
    timed = [role for role in steps if role.axes.time is not None]
    if timed and len(timed) < len(steps):
        without = next(role.port for role in steps if role.axes.time is None)
        where = (
            f", or say where its time is with --input {without.name}:time_axis=N" if len(without.dims or ()) > 1 else ""
        )
        raise ExportError(
            f"{timed[0].port.name} {words(timed[0].port.dims)} has a time axis and {without.name} "
            f"{words(without.dims)} has none: give its value with --constant {without.name}=VALUE{where}"
        )
    batch = _batch(steps)
    roles, fixed = [], batch if isinstance(batch, int) else None
    for name, following in states.items():
        axis_flag = next((flag.batch_axis for flag in flags.states if flag.name == name), None)
        port = _port(inputs, name)
        alone = all(role.axes.batch is None for role in steps)
        axis = _batch_axis(port, following, batch, NO_AXIS if alone and _has_no_rows(port, axis_flag) else axis_flag)
        size = 1 if axis is None else (port.dims or ())[axis]
        if isinstance(size, int):
            if fixed not in (None, size):
                raise ExportError(
                    f"{name} {words(port.dims)} has {size} rows at axis {axis}, the inputs have {fixed}: "
                    f"give another :batch_axis with --state {name}={following}:batch_axis=N"
                )
            fixed = size
        shape = _sizes(port, port.dims or (), () if axis is None else (axis,))
        roles.append(StateRole(port, following, axis, shape, name in found))
    return Roles(steps, tuple(roles), fixed, flags)


def _states(inputs: Sequence[Port], outputs: Sequence[Port], flags: Flags) -> tuple[dict[str, str], set[str]]:
    """Maps each state to its next state, and names those that were found."""
    pairs: dict[str, str] = {}
    for flag in flags.states:
        port, following = _port(inputs, flag.name), _port(outputs, flag.following, "output")
        if not can_be_next(port, following):
            raise ExportError(
                f"--state {flag.name}={flag.following}: {flag.name} is {port.type} {words(port.dims)}, "
                f"{flag.following} is {following.type} {words(following.dims)}: they must be alike"
            )
        pairs[flag.name] = flag.following
    told = {*pairs, *(flag.name for flag in flags.inputs)}
    free = [port for port in outputs if port.name not in pairs.values()]
    found = find_pairs([port for port in inputs if port.name not in told], free)
    return pairs | found, set(found)


def _check_inputs(
    left: Sequence[Port],
    outputs: Sequence[Port],
    states: Mapping[str, str],
    flags: Mapping[str, InputFlag],
    contexts: Mapping[str, Context],
) -> None:
    free = [port for port in outputs if port.name not in states.values()]
    all_named = any(flag == InputFlag(flag.name) for flag in flags.values())
    for name in (*flags, *contexts):
        if name in states:
            raise ExportError(f"{name} is a state, and no input of a time step: its next one is {states[name]}")
        _port(left, name)
    if not left:
        raise ExportError("every input looks like a state: say with --input NAME which is none")
    for port in left:
        if port.name in flags:
            continue
        example = _example([port], free)
        if port.dims == () and not example:
            raise ExportError(f"{port.name} is one number: give its value with --constant {port.name}=VALUE")
        if all_named or looks_like_a_state(port.name) or port.dims == ():
            what = "is no --input" if all_named else "looks like a state" if port.dims else "is one number"
            raise ExportError(
                f"{port.name} {words(port.dims)} {what}, and no output is its next state by name and shape: give "
                f"{example.removeprefix(', such as ') or f'--state {port.name}=OUTPUT'}, --constant {port.name}=VALUE "
                f"or --input {port.name} (outputs: {listed(free) or 'none is left'})"
            )
    for port in left:
        if port.type not in SERVED_TYPES and port.type not in CASTS:
            raise ExportError(f"{port.name} is {port.type}: inputs of {_types()} can be served")


def _example(inputs: Sequence[Port], outputs: Sequence[Port]) -> str:
    """Suggests the pairs that fit by their shapes and nothing else; empty if there are none."""
    pairs = []
    for port in inputs:
        fitting = [one.name for one in outputs if port.dims is not None and _alike(port, one)]
        if len(fitting) == 1:
            pairs.append(f"--state {port.name}={fitting[0]}")
    return f", such as {' '.join(pairs)}" if pairs else ""


def _alike(port: Port, following: Port) -> bool:
    """Whether an output has an input's sizes, wherever both are known, and shares at least half of them."""
    if not can_be_next(port, following) or following.dims is None or port.dims is None:
        return False
    same = sum(one == other for one, other in zip(port.dims, following.dims, strict=True))
    return 2 * same >= len(port.dims)


def _input_role(
    port: Port,
    flag: InputFlag,
    states: Sequence[Port],
    contexts: Mapping[str, Context],
    recurrent: tuple[int, int] | None,
) -> InputRole:
    if port.dims is None or (not port.dims and flag.batch_axis != NO_AXIS):
        raise ExportError(f"{port.name}: the graph does not say its shape: export it with one")
    context = contexts.get(port.name)
    dims = _without_context(port, context) if context else port.dims
    for axis in (flag.batch_axis, flag.time_axis):
        if axis is not None and axis >= len(dims):
            raise ExportError(f"{port.name} {words(port.dims)}: it has no axis {axis}")
    batch = _input_batch_axis(dims, flag, states, recurrent)
    if flag.time_axis == NO_AXIS:
        axes = Axes(batch)
    elif flag.time_axis is not None:
        axes = _with_time(port, dims, batch, flag.time_axis)
    else:
        axes = _with_found_time(dims, batch, states, recurrent)
    if len(set(axes.leading)) < len(axes.leading) or any(axis >= len(dims) for axis in axes.leading):
        raise ExportError(f"{port.name} {words(dims)}: batch_axis and time_axis must be two of its axes")
    return InputRole(port, axes, _sizes(port, dims, axes.leading), flag, context)


def _without_context(port: Port, context: Context) -> Dims:
    """The dimensions of what a client sends: those of the graph without the entries of the step before."""
    dims = port.dims or ()
    axis = len(dims) - 1 if context.axis is None else context.axis
    if not 0 <= axis < len(dims):
        raise ExportError(f"--context {port.name}: {port.name} {words(dims)} has no axis {axis}")
    size = dims[axis]
    if isinstance(size, str):
        return dims  # a time axis, or a size that must be fixed, which is checked later
    if not context.entries < size:
        most = f"give from 1 to {size - 1}" if size > 1 else "there is no room for a context"
        raise ExportError(
            f"--context {port.name}={context.entries}: axis {axis} of {port.name} {words(dims)} has {size} "
            f"{'entry' if size == 1 else 'entries'}, context and new ones: {most}"
        )
    return (*dims[:axis], size - context.entries, *dims[axis + 1 :])


def _input_batch_axis(
    dims: Dims, flag: InputFlag, states: Sequence[Port], recurrent: tuple[int, int] | None
) -> int | None:
    if flag.batch_axis is not None:
        return None if flag.batch_axis == NO_AXIS else flag.batch_axis
    if recurrent is not None:
        return recurrent[1]
    if flag.time_axis == 0:
        return 1
    carried = {dim for port in states for dim in port.dims or () if isinstance(dim, str)}
    shared = [axis for axis, dim in enumerate(dims) if dim in carried]
    if shared:
        return shared[0]
    time_first = len(dims) > 2 and isinstance(dims[0], str) and states and not carried
    if time_first and all(dims[1] in (port.dims or ()) for port in states):  # as many rows as the states have
        return 1
    if len(dims) > 2 and dims[0] == 1 and isinstance(dims[1], str) and carried:  # the rows that the states have
        return 1
    sizes = {dim for port in states for dim in port.dims or ()}
    if len(dims) == 1 and states and not isinstance(dims[0], str) and dims[0] != 1 and not sizes & {dims[0], *carried}:
        return None  # features without a batch
    return 0


def _with_time(port: Port, dims: Dims, batch: int | None, time: int) -> Axes:
    _check_time_axis(port, time, dims)
    return Axes(batch, single=time) if dims[time] == 1 else Axes(batch, time)


def _check_time_axis(port: Port, time: int, dims: Dims | None = None) -> None:
    size = (dims or port.dims or ())[time : time + 1]
    if size and isinstance(size[0], int) and size[0] > 1:
        raise ExportError(
            f"{port.name} fixes its time axis at {size[0]} steps: export it with a dynamic one, or take {size[0]} as "
            f"one step with --input {port.name}:time_axis=none"
        )


def _with_found_time(dims: Dims, batch: int | None, states: Sequence[Port], recurrent: tuple[int, int] | None) -> Axes:
    if recurrent is not None and recurrent[0] != batch and dims[recurrent[0]] != 1:
        if isinstance(dims[recurrent[0]], str):
            return Axes(batch, recurrent[0])
        return Axes(batch)
    place = 0 if batch is None else 1 - batch if batch < 2 else 0
    if recurrent is not None and recurrent[0] != batch:
        place = recurrent[0]
    if place < len(dims) and isinstance(dims[place], str):
        return Axes(batch, place)
    carried = {dim for port in states for dim in port.dims or ()}
    dynamic = [axis for axis, dim in enumerate(dims) if isinstance(dim, str) and axis != batch and dim not in carried]
    if len(dynamic) == 1:  # channels first
        return Axes(batch, dynamic[0])
    single = place < len(dims) and dims[place] == 1 and batch is not None
    if single and (len(dims) == 3 or (len(dims) == 2 and batch == 1)):
        return Axes(batch, single=place)
    return Axes(batch)


def _batch(steps: Sequence[InputRole]) -> int | str:
    """The number of rows per run, or the name of the dimension."""
    sizes = [1 if role.axes.batch is None else (role.port.dims or ())[role.axes.batch] for role in steps]
    fixed = {size for size in sizes if isinstance(size, int)}
    if len(fixed) > 1:
        raise ExportError(f"the inputs have different numbers of rows, {sorted(fixed)}: say which axes are their batch")
    return fixed.pop() if fixed else sizes[0]


def _batch_axis(port: Port, following: str, batch: int | str, told: int | None) -> int | None:
    dims = port.dims
    if port.type not in SERVED_TYPES and port.type not in CASTS:
        raise ExportError(f"{port.name} is {port.type}: states of {_types()} can be served")
    if dims is None:
        raise ExportError(f"{port.name}: the graph does not say its shape: export it with one")
    if told == NO_AXIS or not dims:
        return None
    if told is not None:
        if told >= len(dims):
            raise ExportError(f"{port.name} {words(dims)}: it has no axis {told}")
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
    sizes = ", or fix the sizes of others with --dim NAME=VALUE" if dynamic else ", =none if it has no such axis"
    raise ExportError(
        f"{port.name} {words(dims)}: which axis is the batch is not clear: give --state "
        f"{port.name}={following}:batch_axis=N{sizes}"
    )


def _has_no_rows(port: Port, told: int | None) -> bool:
    """Whether a state, of a graph whose inputs have no batch axis, has none either."""
    return told is None and port.dims is not None and all(isinstance(dim, int) and dim != 1 for dim in port.dims)


def _sizes(port: Port, dims: Dims, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the axes that are not special."""
    sizes = []
    for axis, dim in enumerate(dims):
        if axis not in axes:
            if isinstance(dim, str):
                raise ExportError(
                    f"{port.name} {words(port.dims)}: the size of {dim!r} must be fixed: give --dim {dim}=VALUE"
                )
            sizes.append(dim)
    return tuple(sizes)


def _port(ports: Sequence[Port], name: str, kind: str = "input") -> Port:
    for port in ports:
        if port.name == name:
            return port
    names = [port.name for port in ports]
    raise ExportError(
        f"there is no such {kind} {name!r}{did_you_mean(name, names)}: the candidates are {', '.join(names) or 'none'}"
    )


def _types() -> str:
    return ", ".join((*SERVED_TYPES, *CASTS))
