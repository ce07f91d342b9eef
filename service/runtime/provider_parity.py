"""Compares a model on CUDA with the same model on the CPU, when it is loaded: results in float32 must agree."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.service.runtime.batch_invariance import random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import unpack

Array = NDArray[Any]

TOLERANCE = 1e-5
KERAS_FLOAT32_ERROR_FACTOR = 4.0  # as the export allows it: a multiple of what float32 Keras itself is off float64
_ROWS, _STEPS = 4, 16


class NotWithinTolerance(Exception):
    """A model's results on a provider are too far from those on the CPU."""


def check_parity(runtime: Runtime, on_cpu: Runtime) -> float:
    """Returns the largest difference of results from those on the CPU: relative beyond 1, absolute below.

    Whole runs and single steps are compared, for random inputs and states.

    Args:
        runtime: The model as it will be run.
        on_cpu: The same model on the CPU, in float32.

    Raises:
        NotWithinTolerance: The difference is larger than allowed, and no lower precision was asked for.
    """
    difference = max(_difference(runtime, on_cpu, steps) for steps in (1, _STEPS))
    arithmetic = runtime.options.arithmetic(runtime.provider)
    allowed = max(TOLERANCE, KERAS_FLOAT32_ERROR_FACTOR * runtime.document.parity.get("keras_float32_error", 0.0))
    if arithmetic == "float32" and difference > allowed:
        raise NotWithinTolerance(
            f"its results on {runtime.provider} are {difference:.1e} off those on the CPU, and {allowed:.1e} is "
            f"allowed: use --provider cpu, or accept it with --cuda-tf32 or --precision float16"
        )
    return difference


def _difference(runtime: Runtime, on_cpu: Runtime, steps: int) -> float:
    signature = runtime.signature
    steps = max(steps, signature.min_steps)
    x, states = random_inputs(signature, _ROWS, steps, np.random.default_rng(0))
    if signature.predict_only:
        states = runtime.zeros(_ROWS)
    lengths = np.full(_ROWS, steps, np.int32)
    (ours, our_states), (theirs, their_states) = (each.run(x, lengths, states) for each in (runtime, on_cpu))
    pairs = zip((*unpack(ours), *our_states), (*unpack(theirs), *their_states), strict=True)
    return max(_off(one.astype(np.float64), other.astype(np.float64)) for one, other in pairs)


def _off(ours: Array, theirs: Array) -> float:
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0, np.abs(ours - theirs) / np.maximum(1, np.abs(theirs)))
    return float(np.where(np.isfinite(off), off, np.inf).max(initial=0))
