"""One model file, opened with ONNX Runtime on a provider; advances rows of states by time steps."""

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
from cellserve.service.runtime.float16 import CannotConvert, in_float16
from cellserve.service.runtime.graph_adapter import GraphAdapter
from cellserve.service.runtime.shape_policy import ANY_SHAPE, Padding
from cellserve.service.runtime.tensor_layout import TensorLayout

Array = NDArray[Any]
Provider = Literal["auto", "cpu", "cuda"]
Optimization = Literal["all", "extended", "basic", "off"]
WhenInexact = Literal["one-row", "batch"]
Precision = Literal["float32", "float16"]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

_MEASURED_RUNS = 4
_FLUSH_DENORMALS = "session.set_denormal_as_zero", "1"
_WARNING, _FATAL = 2, 4  # ONNX Runtime's log severities; the default is warning
_LEVELS: dict[Optimization, Any] = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

log = logging.getLogger("cellserve")


class RuntimeUnavailable(Exception):
    """The requested provider cannot be used here, or the file cannot be opened as a model."""


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How ONNX Runtime runs a model; batch invariance is checked for one such choice."""

    provider: Provider = "auto"
    threads: int = 1
    spinning: bool = False  # spinning threads would occupy the event loop's core while they wait
    memory_arena: bool = True
    optimization: Optimization = "all"
    when_inexact: WhenInexact = "one-row"  # how to run a model that no shape policy makes batch invariant
    precision: Precision = "float32"  # of CUDA's arithmetic; the CPU's is float32
    cuda_tf32: bool = False  # whether CUDA may multiply float32 matrices as TF32

    def arithmetic(self, provider: str) -> str:
        """Returns the precision of products on a provider: float32, tf32 or float16."""
        if provider != CUDA:
            return "float32"
        return "tf32" if self.precision == "float32" and self.cuda_tf32 else self.precision


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
            os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # cuDNN's recurrences use TF32 otherwise, see `_open`
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
        f"install '.[gpu]' in a clone on a machine with an NVIDIA GPU, or use --provider cpu"
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
    settings.add_session_config_entry(*_FLUSH_DENORMALS)
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


class Runtime:
    """One opened model. Thread-safe: ONNX Runtime lets several threads run one session.

    Args:
        model: The model file's path or its bytes.
        options: How to run it.
        step: The path or bytes of the graph for single steps, if the model has one.

    Raises:
        RuntimeUnavailable: The provider is not available, or the file was not made by `cellserve export`.
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
        adapter = GraphAdapter(signature, self.call)
        self._adapter = None if adapter.is_passthrough else adapter
        self._bindings = threading.local()  # one per thread, for concurrent runs
        self.shapes = ANY_SHAPE  # how runs are padded

    def close(self) -> None:
        """Frees ONNX Runtime's memory; the model cannot be run any more."""
        self._session = self._step = self._adapter = None
        self._bindings = threading.local()

    @property
    def signature(self) -> Signature:
        """The model's inputs, outputs and states."""
        return self.document.signature

    def run(self, x: Array, lengths: NDArray[np.int32], states: Sequence[Array]) -> tuple[Array, list[Array]]:
        """Advances every row by its time steps.

        Args:
            x: `[batch, time, *features]` in the signature's dtype, contiguous; for several inputs, a structured array
                `[batch, time]` with a field for each (`TensorLayout`).
            lengths: `[batch]` int32, valid time steps of each row, from 1 to time.
            states: One array per state of the signature, `[batch, *shape]` (the batch at its `batch_axis`).

        Returns:
            `y [batch, time, *outputs]`, unspecified past a row's length and structured for several outputs, and the
            states after each row's last valid step, in the signature's order.
        """
        if self._adapter is not None:
            return self._adapter(x, lengths, states)
        y, *following = self.call((x,), lengths, states)
        return y, following

    def call(self, inputs: Sequence[Array], lengths: NDArray[np.int32], states: Sequence[Array]) -> list[Array]:
        """Runs the graph once, with one array per input; returns its outputs and next states."""
        if self.shapes is not ANY_SHAPE:
            padded = Padding(self.shapes, self.signature, inputs[0].shape)
            return padded.remove(self._call_as_is(*padded.add(inputs, lengths, states)))
        return self._call_as_is(inputs, lengths, states)

    def _call_as_is(self, inputs: Sequence[Array], lengths: NDArray[np.int32], states: Sequence[Array]) -> list[Array]:
        single = self._step is not None and inputs[0].shape[1] == 1
        session, binding = self._bound(single)
        binding.clear_binding_outputs()  # a binding keeps the shapes of its last run
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
        """Returns the graph to run and this thread's binding of it, with inputs and outputs in host memory."""
        name = "step" if single else "sequence"
        bound: tuple[ort.InferenceSession, ort.IOBinding] | None = getattr(self._bindings, name, None)
        if bound is None:
            session = self._step if single else self._session
            bound = session, session.io_binding()
            setattr(self._bindings, name, bound)
        return bound

    def seconds(self, batch: int, time_steps: int) -> float:
        """Measures a run on zeros, in seconds: the shortest of a few."""
        time_steps = max(time_steps, self.signature.min_steps)
        x = TensorLayout(self.signature.inputs).zeros(batch, time_steps)
        inputs = x, np.full(batch, time_steps, np.int32), self.zeros(batch)
        taken = []
        for _ in range(_MEASURED_RUNS):
            start = time.perf_counter()
            self.run(*inputs)
            taken.append(time.perf_counter() - start)
        return min(taken)

    def zeros(self, batch: int) -> list[Array]:
        """Returns the states before the first step: zeros, one array per state."""
        return [
            np.zeros((*spec.shape[: spec.batch_axis], batch, *spec.shape[spec.batch_axis :]), spec.dtype)
            for spec in self.signature.states
        ]


def _open(model: Path | bytes, options: RuntimeOptions) -> ort.InferenceSession:
    names = providers(options.provider, options.cuda_tf32)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    settings.add_session_config_entry(*_FLUSH_DENORMALS)  # for its own threads, if there are several
    settings.enable_cpu_mem_arena = options.memory_arena
    settings.graph_optimization_level = _LEVELS[options.optimization]
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    source = model if isinstance(model, bytes) else str(model)
    if names[0] == CUDA:
        settings.use_deterministic_compute = True
        if options.precision == "float16":
            try:
                source = in_float16(source)
            except CannotConvert as error:
                raise RuntimeUnavailable(str(error)) from None
    of_providers = [_cuda_options(options) if provider == CUDA else {} for provider in names]
    try:
        session = ort.InferenceSession(source, settings, providers=names, provider_options=of_providers)
    except Exception as error:
        raise RuntimeUnavailable(f"ONNX Runtime cannot open the model: {str(error).splitlines()[0]}") from None
    if options.provider == "cuda" and session.get_providers()[0] != CUDA:
        raise RuntimeUnavailable(
            "ONNX Runtime cannot open the model on the CUDA execution provider: use --provider cpu"
        )
    return session


def _cuda_options(options: RuntimeOptions) -> dict[str, str]:
    return {
        # TF32, used from Ampere on, has 10 bits of mantissa: results would not agree with Keras.
        "use_tf32": "1" if options.cuda_tf32 else "0",
        # The default measures all algorithms and takes the fastest: another one, with other bits, at each start.
        "cudnn_conv_algo_search": "HEURISTIC",
        # The default takes twice as much memory whenever it needs more, and two processes may share a GPU.
        "arena_extend_strategy": "kSameAsRequested",
    }


def read_document(session: ort.InferenceSession) -> ModelDocument:
    """Reads an open model's description of itself; raises RuntimeUnavailable if it is missing or wrong."""
    document = parse_document(session.get_modelmeta().custom_metadata_map)
    names = {tensor.name for tensor in session.get_inputs()} | {tensor.name for tensor in session.get_outputs()}
    signature = document.signature
    declared = {spec.name for specs in (signature.inputs, signature.outputs, signature.states) for spec in specs}
    declared |= {spec.next_name for spec in signature.states} | ({signature.lengths} if signature.lengths else set())
    if names != declared:
        raise RuntimeUnavailable(f"the file's graph has the tensors {sorted(names)}, its signature {sorted(declared)}")
    return document


def parse_document(metadata: Mapping[str, str]) -> ModelDocument:
    """Parses a model's description in its file's metadata; raises RuntimeUnavailable if it is missing or wrong."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise RuntimeUnavailable(
            f"the file has no {METADATA_KEY!r} metadata, so `cellserve export` did not make it: export the Keras model"
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
