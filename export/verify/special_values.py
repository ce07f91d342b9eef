"""Inputs and states with special numbers in them, where conversions that hold for ordinary numbers are found out."""

from __future__ import annotations

import numpy as np

from cellserve.models.signature import Signature, StateSpec, TensorSpec
from cellserve.service.runtime.batch_invariance import Array, random_inputs
from cellserve.service.runtime.tensor_layout import TensorLayout, unpack

ROWS, STEPS = 24, 12
LARGE = 1e6  # of states: what comes of larger ones is not judged

_NUMBERS: tuple[float, ...] = (
    0.0,
    -0.0,
    1,
    -1,
    0.5,
    -0.5,
    1.5,
    -1.5,
    2.5,
    -2.5,
    1e-30,
    -1e-30,
    1e30,
    -1e30,
    100,
    -100,
    20,
    -20,
)
_STATE_NUMBERS = tuple(number for number in _NUMBERS if abs(number) < LARGE)


def special_numbers(constants: Array) -> Array:
    """Numbers at which functions have edges: those of all networks, and at and beside a network's own constants."""
    with np.errstate(over="ignore"):  # of the largest number, a constant of `nan_to_num`
        around = (constants, np.nextafter(constants, np.float32(np.inf)), np.nextafter(constants, np.float32(-np.inf)))
    numbers = np.concatenate([np.array(_NUMBERS, np.float32), *around])
    return np.asarray(numbers[np.isfinite(numbers)])


def draw_special(
    signature: Signature, constants: Array, rng: np.random.Generator, steps: int = STEPS
) -> tuple[Array, list[Array]]:
    """Draws inputs `[ROWS, steps, ...]` and initial states as `Runtime.run` takes them.

    Of three rows one is of ordinary numbers until its second half; in one some entries are special; in one all entries
    of a time step are equal (ties). Half of the rows have special numbers in their states.
    """
    x, states = random_inputs(signature, ROWS, steps, rng)
    numbers = special_numbers(constants)
    inputs = [_special_input(part, spec, numbers, rng) for part, spec in zip(unpack(x), signature.inputs, strict=True)]
    states = [_special_state(state, spec, rng) for state, spec in zip(states, signature.states, strict=True)]
    return TensorLayout(signature.inputs).pack(inputs), states


def _special_input(x: Array, spec: TensorSpec, numbers: Array, rng: np.random.Generator) -> Array:
    x = np.array(x)
    if spec.dtype != "float32":
        low, high = spec.bounds or (0, 1)
        edges = np.unique(np.clip([low, low + 1, high - 1, high], low, high)).astype(x.dtype)
        chosen = rng.random(x.shape) < 0.5
        x[chosen] = rng.choice(edges, int(chosen.sum()))
        return x
    rows = np.arange(ROWS) % 3
    chosen = rng.random(x.shape) < 0.4
    chosen[rows == 2] = False
    chosen[rows == 0, : x.shape[1] // 2] = False  # special numbers come after ordinary ones
    x[chosen] = rng.choice(numbers, int(chosen.sum()))
    ties = np.flatnonzero(rows == 2)
    equal = rng.choice(numbers, (len(ties), x.shape[1], *(1 for _ in spec.shape)))
    x[ties] = np.broadcast_to(equal, x[ties].shape)
    return x


def _special_state(state: Array, spec: StateSpec, rng: np.random.Generator) -> Array:
    if spec.dtype != "float32":
        return state
    state = np.array(state)
    chosen = rng.random(state.shape) < 0.3
    chosen[::2] = False
    state[chosen] = rng.choice(np.array(_STATE_NUMBERS, np.float32), int(chosen.sum()))
    return state
