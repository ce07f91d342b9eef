"""The private parts of TensorFlow that the export uses; tried with TensorFlow 2.21."""

from __future__ import annotations

from typing import Any

from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
from tensorflow.python.framework.op_callbacks import add_op_callback, remove_op_callback

__all__ = ["add_op_callback", "freeze", "remove_op_callback"]


def freeze(function: Any) -> Any:
    """Returns a concrete function with its variables turned into constants; loops stay functional."""
    return convert_variables_to_constants_v2(function, lower_control_flow=False, aggressive_inlining=True)
