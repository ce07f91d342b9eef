"""The problem that a request is answered with when ONNX Runtime could not run the model on it."""

from __future__ import annotations

from cellserve.service.errors import InvalidInput, ModelFailed, Problem

# What its kernels say of integers that a request has sent, or that the model computes from them.
_ABOUT_INTEGERS = ("out of data bounds", "Integer division by zero", "Integer modulo by zero")


def run_failed(model: str, error: Exception | None = None) -> Problem:
    """Returns the problem; the client's if its integers made the run fail, which the signature's bounds cannot tell.

    Args:
        model: The model's name.
        error: The run's.
    """
    if any(words in str(error) for words in _ABOUT_INTEGERS):
        return InvalidInput(
            f"an integer of this request leads model {model!r} to an index outside a table, or to a division by zero; "
            f"nothing was applied: send integers as the network was trained on",
            place="x",
        )
    return ModelFailed(f"ONNX Runtime could not run model {model!r} on this request: nothing was applied")
