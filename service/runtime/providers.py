"""The ONNX Runtime execution providers that models run on, and why one cannot be used here."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import os
import re
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort

Provider = Literal["auto", "cpu", "cuda"]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
DEVICES = {CPU: "cpu", CUDA: "cuda"}  # ONNX Runtime's names for where they keep tensors
FLUSH_DENORMALS = "session.set_denormal_as_zero", "1"

_WARNING, _FATAL = 2, 4  # ONNX Runtime's log severities; the default is warning

log = logging.getLogger("cellserve")


class RuntimeUnavailable(Exception):
    """The requested provider cannot be used here, or the file cannot be opened as a model."""


def providers(requested: Provider, tf32: bool = False) -> list[str]:
    """Returns the names of the ONNX Runtime execution providers to use, in order.

    Args:
        requested: Which.
        tf32: Whether CUDA may use TF32. What the first call in a process says holds for all.

    Raises:
        RuntimeUnavailable: `cuda` is requested, and cannot be used here.
    """
    if requested == "cpu":
        return [CPU]
    offered = ort.get_available_providers()
    if CUDA in offered:
        if not tf32:
            os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # cuDNN's recurrences use TF32 otherwise
        missing = _missing_for_cuda()
        if missing is None:
            return [CUDA, CPU]
        if requested == "auto":
            _warn_once(f"CUDA cannot be used here ({missing}): models run on the CPU")
            return [CPU]
    elif requested == "auto":
        return [CPU]
    else:
        missing = f"this ONNX Runtime only offers {', '.join(offered)}"
    raise RuntimeUnavailable(
        f"the CUDA execution provider was requested, but {missing}: "
        f"install '.[gpu]' in a clone on a machine with an NVIDIA GPU (docker run --gpus all), or use --provider cpu"
    )


# `y = Identity(x)` of one float: the smallest model that shows whether a provider can be opened.
_SMALLEST = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


@functools.cache
def flush_denormals() -> None:
    """Makes the calling thread, and those that it will start, take denormal numbers for zeros.

    Denormals in a decaying state slow a run many times over. ONNX Runtime sets the processor's flag for the thread that
    opens the first session of a process, if that session asks for it, and never again. So this comes before any other
    session, in the main thread.
    """
    settings = ort.SessionOptions()
    settings.add_session_config_entry(*FLUSH_DENORMALS)
    ort.InferenceSession(_SMALLEST, settings, providers=[CPU])


@functools.cache
def _missing_for_cuda() -> str | None:
    """Returns what keeps the CUDA provider from being opened, or None if it opens.

    ONNX Runtime falls back to the CPU without an error, but logs several lines for every model.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the libraries that it does not find
        ort.preload_dlls()  # from NVIDIA's wheels, if the gpu extra is installed
    ort.set_default_logger_severity(_FATAL)
    try:
        opened = ort.InferenceSession(_SMALLEST, providers=[CUDA, CPU]).get_providers()[0] == CUDA
    except Exception as error:  # ONNX Runtime raises various errors if a driver is present but does not work
        opened, missing = False, str(error).splitlines()[0]
    else:
        missing = _library_missing_for_cuda() or "no GPU was found that it can use"
    finally:
        ort.set_default_logger_severity(_WARNING)
    return None if opened else missing


def is_of_cuda(error: Exception) -> bool:
    """Whether an error of a run is one of NVIDIA's libraries: `CUDA failure 719: unspecified launch failure ; ...`."""
    return re.search(r"\b(CUDA|CUDNN|CUBLAS)\w* failure \d+", str(error)) is not None


def cuda_answers() -> bool:
    """Whether CUDA can still be used by this process. After an error that it does not recover from, all calls fail."""
    ort.set_default_logger_severity(_FATAL)
    try:
        session = ort.InferenceSession(_SMALLEST, providers=[CUDA, CPU])
        session.run(None, {"x": np.zeros(1, np.float32)})
        return bool(session.get_providers()[0] == CUDA)
    except Exception:
        return False
    finally:
        ort.set_default_logger_severity(_WARNING)


@functools.cache
def say_once(message: str) -> None:
    """Logs an error that concerns the whole process, once."""
    log.error(message)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _library_missing_for_cuda() -> str | None:
    """Returns the linker's message about a shared library that the CUDA provider needs and does not find, if any."""
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        # Even with all libraries found, it lacks symbols that ONNX Runtime itself would provide.
        return str(error) if "shared object file" in str(error) else None
    return None
