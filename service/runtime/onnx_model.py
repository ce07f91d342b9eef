"""Runs one model file with ONNX Runtime: opens it on a provider, advances rows of states by time steps."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pydantic import ValidationError

from cellserve.models.signature import METADATA_KEY, ModelDocument, Signature
from cellserve.service.runtime.graph_adapter import Runs
from cellserve.service.runtime.tensor_layout import Layout

Array = NDArray[Any]
Provider = Literal["auto", "cpu", "cuda"]
Optimization = Literal["all", "extended", "basic", "off"]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

_MEASURED_RUNS = 4
_WARNING, _FATAL = 2, 4  # ONNX Runtime's severities of what it logs; a warning is where it starts
_LEVELS: dict[Optimization, Any] = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

log = logging.getLogger("cellserve")


class RuntimeUnavailable(Exception):
    """The provider that was asked for cannot be used here, or the file is no model that can be opened."""


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How ONNX Runtime is to run a model; part of what exactness is proved for."""

    provider: Provider = "auto"
    threads: int = 1
    spinning: bool = False  # threads that spin would take the event loop's core while they wait
    memory_arena: bool = True
    optimization: Optimization = "all"
    denormals_as_zero: bool = True  # a decaying state full of denormals slows a run many times over


def providers(asked: Provider) -> list[str]:
    """Gives the names of ONNX Runtime's execution providers to use, in order.

    Raises:
        RuntimeUnavailable: `cuda` was asked for, and cannot be used here.
    """
    if asked == "cpu":
        return [CPU]
    offered = ort.get_available_providers()
    if CUDA in offered:
        missing = _missing_for_cuda()
        if missing is None:
            return [CUDA, CPU]
        if asked == "auto":
            _say_once(f"CUDA cannot be used here ({missing}): models run on the CPU")
            return [CPU]
    elif asked == "auto":
        return [CPU]
    else:
        missing = f"this ONNX Runtime offers only {', '.join(offered)}"
    raise RuntimeUnavailable(
        f"the CUDA execution provider was asked for, but {missing}: "
        f"install cellserve[gpu] on a machine with an NVIDIA GPU, or use --provider cpu"
    )


# `y = Identity(x)` over one float: the smallest model that says whether a provider can be opened.
_SMALLEST = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


@functools.cache
def _missing_for_cuda() -> str | None:
    """Says what keeps the CUDA provider from being opened, or gives None where it opens.

    ONNX Runtime falls back to the CPU without an error, but with several lines of its own for every model.
    """
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # cuDNN's recurrences use TF32 otherwise, see `_open`
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it has not found
        ort.preload_dlls()  # the wheels of NVIDIA's libraries, where the gpu extra has installed them
    ort.set_default_logger_severity(_FATAL)
    try:
        opened = ort.InferenceSession(_SMALLEST, providers=[CUDA, CPU]).get_providers()[0] == CUDA
    except Exception as error:  # whatever ONNX Runtime makes of a driver that is there and does not work
        opened, missing = False, str(error).splitlines()[0]
    else:
        missing = _library_missing_for_cuda() or "no GPU was found that it can use"
    finally:
        ort.set_default_logger_severity(_WARNING)
    return None if opened else missing


@functools.cache
def _say_once(what: str) -> None:
    log.warning(what)


def _library_missing_for_cuda() -> str | None:
    """Names the shared library that the CUDA provider needs and does not find, in the linker's words."""
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        # With all libraries found it still lacks the symbols that ONNX Runtime itself would give it.
        return str(error) if "shared object file" in str(error) else None
    return None


class Runtime:
    """One model, open. Thread-safe: ONNX Runtime lets several threads run one session.

    Args:
        model: The model file's path or its bytes.
        options: How to run it.
        step: The path or bytes of the graph for single steps, where the model has one.

    Raises:
        RuntimeUnavailable: The provider is not to be had, or the file is not a model made by `cellserve export`.
    """

    def __init__(
        self, model: Path | bytes, options: RuntimeOptions = RuntimeOptions(), step: Path | bytes | None = None
    ) -> None:
        self.options = options
        self._session: Any = _open(model, options)
        self._step: Any = None if step is None else _open(step, options)
        self.provider: str = self._session.get_providers()[0]
        self.document = read_document(self._session)
        signature = self.signature
        self._inputs = [spec.name for spec in signature.inputs]
        self._states = [spec.name for spec in signature.states]
        self._fetches = [spec.name for spec in signature.outputs] + [spec.next_name for spec in signature.states]
        runs = Runs(signature, self.call)
        self._runs = None if runs.plain else runs
        self._bindings = threading.local()  # runs on several threads at once have one each

    def close(self) -> None:
        """Frees what ONNX Runtime holds; nothing can be run any more."""
        self._session = self._step = self._runs = None
        self._bindings = threading.local()

    @property
    def signature(self) -> Signature:
        """What the model takes, gives and carries."""
        return self.document.signature

    def run(self, x: Array, lengths: NDArray[np.int32], states: Sequence[Array]) -> tuple[Array, list[Array]]:
        """Advances every row by its time steps.

        Args:
            x: `[batch, time, *features]` in the signature's dtype, contiguous; of several inputs a structured array
                `[batch, time]` with a field for each (`Layout`).
            lengths: `[batch]` int32, valid time steps of each row, from 1 to time.
            states: One array a state of the signature, `[batch, *shape]` (batch at its `batch_axis`).

        Returns:
            `y [batch, time, *outputs]`, unspecified past a row's length, of several outputs structured like x, and the
            states after each row's last valid step, in the signature's order.
        """
        if self._runs is not None:
            return self._runs(x, lengths, states)
        y, *following = self.call((x,), lengths, states)
        return y, following

    def call(self, inputs: Sequence[Array], lengths: NDArray[np.int32], states: Sequence[Array]) -> list[Array]:
        """Runs the graph once on what it takes, each input an array of its own; gives all that it gives."""
        single = self._step is not None and inputs[0].shape[1] == 1
        session, binding = self._bound(single)
        binding.clear_binding_outputs()  # it would keep the shapes of the last run
        for name in self._fetches:
            binding.bind_output(name, "cpu")
        for name, array in zip(self._inputs, inputs, strict=True):
            binding.bind_cpu_input(name, array)
        for name, state in zip(self._states, states, strict=True):
            binding.bind_cpu_input(name, state)
        if self.signature.lengths and not single:
            binding.bind_cpu_input(self.signature.lengths, lengths)
        session.run_with_iobinding(binding)
        outputs: list[Array] = binding.copy_outputs_to_cpu()
        return outputs

    def _bound(self, single: bool) -> tuple[ort.InferenceSession, ort.IOBinding]:
        """Gives the graph to run and this thread's binding of it: inputs come from host memory, outputs go there."""
        name = "step" if single else "sequence"
        bound: tuple[ort.InferenceSession, ort.IOBinding] | None = getattr(self._bindings, name, None)
        if bound is None:
            session = self._step if single else self._session
            bound = session, session.io_binding()
            setattr(self._bindings, name, bound)
        return bound

    def seconds(self, batch: int, time_steps: int) -> float:
        """Measures a run of zeros, the shortest of a few, in seconds."""
        time_steps = max(time_steps, self.signature.min_steps)
        x = Layout(self.signature.inputs).zeros(batch, time_steps)
        inputs = x, np.full(batch, time_steps, np.int32), self.zeros(batch)
        taken = []
        for _ in range(_MEASURED_RUNS):
            start = time.perf_counter()
            self.run(*inputs)
            taken.append(time.perf_counter() - start)
        return min(taken)

    def zeros(self, batch: int) -> list[Array]:
        """Gives the states before a first step: zeros, one array a state."""
        return [
            np.zeros((*spec.shape[: spec.batch_axis], batch, *spec.shape[spec.batch_axis :]), spec.dtype)
            for spec in self.signature.states
        ]


def _open(model: Path | bytes, options: RuntimeOptions) -> ort.InferenceSession:
    asked = providers(options.provider)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    if options.denormals_as_zero:
        settings.add_session_config_entry("session.set_denormal_as_zero", "1")
    settings.enable_cpu_mem_arena = options.memory_arena
    settings.graph_optimization_level = _LEVELS[options.optimization]
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    source = model if isinstance(model, bytes) else str(model)
    # TF32 has 10 bits of mantissa: parity with Keras would be lost where it is used, from Ampere on.
    of_providers = [{"use_tf32": "0"} if provider == CUDA else {} for provider in asked]
    try:
        session = ort.InferenceSession(source, settings, providers=asked, provider_options=of_providers)
    except Exception as error:
        raise RuntimeUnavailable(f"ONNX Runtime cannot open the model: {str(error).splitlines()[0]}") from None
    if options.provider == "cuda" and session.get_providers()[0] != CUDA:
        raise RuntimeUnavailable(
            "ONNX Runtime cannot open the model on the CUDA execution provider, use --provider cpu"
        )
    return session


def read_document(session: ort.InferenceSession) -> ModelDocument:
    """Reads what an open model says about itself, or raises RuntimeUnavailable where it says nothing that holds."""
    document = parse_document(session.get_modelmeta().custom_metadata_map)
    names = {tensor.name for tensor in session.get_inputs()} | {tensor.name for tensor in session.get_outputs()}
    signature = document.signature
    told = {spec.name for spec in (*signature.inputs, *signature.outputs)} | {spec.name for spec in signature.states}
    told |= {spec.next_name for spec in signature.states} | ({signature.lengths} if signature.lengths else set())
    if names != told:
        raise RuntimeUnavailable(f"the file's graph has the tensors {sorted(names)}, its signature {sorted(told)}")
    return document


def parse_document(metadata: Mapping[str, str]) -> ModelDocument:
    """Reads what the metadata of a model file say; raises RuntimeUnavailable where they say nothing that holds."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise RuntimeUnavailable(
            f"the file has no {METADATA_KEY!r} metadata: it was not made by `cellserve export`, export the Keras model"
        )
    try:
        return ModelDocument.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RuntimeUnavailable(
            f"the file's {METADATA_KEY!r} metadata does not fit this service: {place}: {first['msg']}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RuntimeUnavailable(f"the file's {METADATA_KEY!r} metadata is damaged: {error}") from None
