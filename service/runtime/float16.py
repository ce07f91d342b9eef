"""A model's graph in float16, for `--precision float16` on CUDA; its inputs, outputs and states stay float32."""

from __future__ import annotations

from pathlib import Path


class CannotConvert(Exception):
    """A graph cannot be converted; the message says why."""


def in_float16(model: bytes | str) -> bytes:
    """Returns a model file with its arithmetic in float16.

    Args:
        model: The file's content or path.

    Raises:
        CannotConvert: The package `onnx` is not installed, or ONNX Runtime's converter fails.
    """
    try:
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16
    except ImportError:
        raise CannotConvert("--precision float16 needs the package onnx: pip install onnx") from None
    graph = onnx.load_model_from_string(model if isinstance(model, bytes) else Path(model).read_bytes())
    try:
        converted = convert_float_to_float16(graph, keep_io_types=True)
    except Exception as error:  # the converter raises whatever it meets
        raise CannotConvert(
            f"--precision float16: the graph cannot be converted ({str(error).splitlines()[0]})"
        ) from None
    return bytes(converted.SerializeToString())
