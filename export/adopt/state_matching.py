"""Finds the outputs of a foreign graph that are its next states, by names and shapes: `h` and `hn`, and so on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cellserve.export.errors import ExportError

_BEFORE = {"past", "prev", "previous", "old", "in", "input", "init", "initial", "last"}
_AFTER = {"present", "next", "new", "out", "output", "final", "updated", "n"}
_STATE_WORDS = {"h", "c", "hx", "cx", "hc", "hidden", "cell", "state", "states", "past", "prev", "previous", "cache",
                "memory", "mem", "carry"}  # fmt: skip

Dims = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph."""

    name: str
    type: str  # NumPy's name of the type
    dims: Dims | None  # unnamed dynamic ones are NAME.AXIS; None if the graph has no shape


def find_pairs(inputs: Sequence[Port], outputs: Sequence[Port]) -> dict[str, str]:
    """Maps each input that is a state to its next state.

    Raises:
        ExportError: Several outputs could be an input's next state.
    """
    pairs: dict[str, str] = {}
    for port in inputs:
        found = [one.name for one in outputs if _names_agree(port.name, one.name) and can_be_next(port, one)]
        if len(found) > 1:
            raise ExportError(
                f"{port.name} could become {' or '.join(found)}: say which with --state {port.name}={found[0]}"
            )
        if found:
            pairs[port.name] = found[0]
    # If both `x` and `past_x` match `present_x`, `past_x` is the state.
    marked = {following for name, following in pairs.items() if _BEFORE & set(_tokens(name))}
    pairs = {name: one for name, one in pairs.items() if one not in marked or _BEFORE & set(_tokens(name))}
    for name, following in pairs.items():
        rivals = [other for other, one in pairs.items() if one == following]
        if len(rivals) > 1:
            raise ExportError(f"{' and '.join(rivals)} could each become {following}: say which with "
                              f"--state {name}={following}")  # fmt: skip
    return pairs


def looks_like_a_state(name: str) -> bool:
    """Whether a name is typical of a state."""
    tokens = _tokens(name)
    return bool(_STATE_WORDS & {*tokens, "".join(tokens).rstrip("0")})


def can_be_next(port: Port, following: Port) -> bool:
    """Whether an output can be fed back to an input, as far as the graph says their types and shapes."""
    if port.type != following.type:
        return False
    if port.dims is None or following.dims is None:
        return True
    if len(port.dims) != len(following.dims):
        return False
    pairs = zip(port.dims, following.dims, strict=True)
    return all(one == other or isinstance(one, str) or isinstance(other, str) for one, other in pairs)


def _names_agree(name: str, following: str) -> bool:
    return bool(_stems(name, _BEFORE) & _stems(following, _AFTER)) and name != following


def _stems(name: str, markers: set[str]) -> set[tuple[str, ...]]:
    """Name stems without time markers: `past_h` becomes `h`, `stateN` becomes `state`."""
    tokens = _tokens(name)
    kept = tuple(token for token in tokens if token not in markers) or tokens
    stems = {kept}
    for place, token in enumerate(tokens):  # a marker may be the name itself: n and n.next
        if token in markers and len(tokens) > 1:
            stems.add(tokens[:place] + tokens[place + 1 :])
    if markers is _BEFORE:
        stems.add(tokens)  # a marker may be part of the name: cache_last_time and cache_last_time_next
        if len(kept) > 1 and kept[-1] == "0":  # h0
            stems.add(kept[:-1])
    if markers is _AFTER and len(kept[-1]) > 1 and kept[-1].endswith("n"):  # hn
        stems.add((*kept[:-1], kept[-1][:-1]))
    return stems


def _tokens(name: str) -> tuple[str, ...]:
    return tuple(token.lower() for token in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)) or (name,)
