"""Runs whole sequences through an engine, each in a slot borrowed for the call."""

from __future__ import annotations

import asyncio
from typing import Any

from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.errors import NotFinite

Array = NDArray[Any]


async def run_sequences(
    engine: Engine,
    sequences: list[Array],
    states: list[dict[str, Array] | None] | None,
    every_output: bool,
    return_states: bool,
    name: str = "sequences",
) -> tuple[list[Array], list[dict[str, Array]]]:
    """Runs sequences `[time, *features]` concurrently.

    Args:
        engine: The model's engine.
        sequences: The inputs.
        states: Initial states of each sequence; zeros where None.
        every_output: Whether to return the outputs of all time steps.
        return_states: Whether to return the final states.
        name: The sequences' name in the request, for error messages.

    Returns:
        The outputs, and the final states (empty unless requested).

    Raises:
        NotFinite: An output or state of a sequence is not finite; the error names the sequence.
    """
    if engine.whole is not None:
        engine.whole.check(states is not None, return_states)
        return await engine.whole.run(sequences, name), []
    waiting: list[asyncio.Future[Array]] = []
    with engine.scratch([None] * len(sequences) if states is None else states) as slots:
        try:
            for number, sequence in enumerate(sequences):
                waiting.append(engine.submit(slots[number : number + 1], sequence[None], every_output).awaited)
            outputs: list[Array] = []
            for number, done in enumerate(waiting):
                try:
                    outputs.append((await done)[0])
                except NotFinite as problem:
                    place = f"{name}[{number}]"
                    raise NotFinite(f"{place}: {problem.detail}", place=place, **problem.extensions) from None
            return outputs, [engine.arena.read(int(slot)) for slot in slots] if return_states else []
        finally:
            for done in waiting:
                if not done.cancel() and not done.cancelled():
                    done.exception()  # marks it as retrieved, or asyncio would log it
