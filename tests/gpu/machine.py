"""Which machine and which libraries a run was made with: bits and speed are theirs."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort

_QUERY = {"": "name", "driver ": "driver_version", "compute capability ": "compute_cap", "memory ": "memory.total"}


def describe() -> dict[str, str]:
    """Gives what there is to say, by what it is of; unknown where it cannot be found out."""
    return {
        "GPU": _gpu(),
        "CUDA runtime": _cuda_runtime(),
        "cuDNN": _cudnn(),
        "ONNX Runtime": f"{ort.__version__}, {', '.join(ort.get_available_providers())}",
        "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE", "not set"),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "Python": f"{platform.python_version()}, NumPy {np.__version__}",
        "system": f"{platform.system()} {platform.release()}",
    }


def _gpu() -> str:
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY.values())}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown: nvidia-smi does not answer"
    gpus = [zip(_QUERY, line.split(", "), strict=False) for line in told.strip().splitlines()]
    return "; ".join(", ".join(what + value for what, value in gpu) for gpu in gpus)


def _cuda_runtime() -> str:
    """Asks the CUDA runtime that ONNX Runtime has loaded into this process."""
    library, version = _loaded("libcudart.so"), ctypes.c_int()
    if library is None or library.cudaRuntimeGetVersion(ctypes.byref(version)):
        return "not loaded"
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _cudnn() -> str:
    library = _loaded("libcudnn.so")
    if library is None:
        return "not loaded"
    library.cudnnGetVersion.restype = ctypes.c_size_t
    version = int(library.cudnnGetVersion())
    return f"{version // 10000}.{version % 10000 // 100}.{version % 100}"  # 9 and later: 91301 is 9.13.1


def _loaded(name: str) -> ctypes.CDLL | None:
    """Opens a shared library that this process has mapped already."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")
        if path[1] and Path("/" + path[2]).name.startswith(name):
            return ctypes.CDLL("/" + path[2])
    return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()
