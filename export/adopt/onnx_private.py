"""The private part of onnx that `cellserve adopt` uses; tried with onnx 1.23."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onnx import external_data_helper


def all_tensors(model: Any) -> Iterable[Any]:
    """All tensors of a model: initializers and attributes, in graphs within it too."""
    return external_data_helper._get_all_tensors(model)  # type: ignore[no-any-return]
