"""The problem that a request is answered with when ONNX Runtime could not run the model on it."""

from __future__ import annotations

from cellserve.service.errors import DeviceLost, InvalidInput, ModelFailed, Problem
from cellserve.service.model_repository.model import Model

# What its kernels say of integers that a request has sent, or that the model computes from them.
_ABOUT_INTEGERS = ("out of data bounds", "Integer division by zero", "Integer modulo by zero")


def run_failed(model: Model, error: Exception | None = None) -> Problem:
    """Returns the problem; the client's if its integers made the run fail, which the signature's bounds cannot tell.

    Args:
        model: The model.
        error: The run's.
    """
    if model.runtime.lost_device:
        return DeviceLost()
    if any(words in str(error) for words in _ABOUT_INTEGERS):
        return InvalidInput(
            f"an integer of this request leads model {model.name!r} to an index outside a table, or to a division by "
            f"zero; nothing was applied: send integers as the network was trained on",
            place="x",
        )
    return ModelFailed(f"ONNX Runtime could not run model {model.name!r} on this request: nothing was applied")
