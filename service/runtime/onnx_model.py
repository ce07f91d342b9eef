"""One model file, opened with ONNX Runtime on a provider; advances rows of states by time steps."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import from_json

from cellserve.models.signature import METADATA_KEY, ModelDocument, Signature
from cellserve.service.runtime.float16 import CannotConvert, in_float16
from cellserve.service.runtime.graph_adapter import GraphAdapter
from cellserve.service.runtime.onnx_file import BadModelFile, scan
from cellserve.service.runtime.providers import (
    CUDA,
    DEVICES,
    FLUSH_DENORMALS,
    Provider,
    RuntimeUnavailable,
    cuda_answers,
    is_of_cuda,
    providers,
    say_once,
)
from cellserve.service.runtime.shape_policy import ANY_SHAPE, Padding, ShapePolicy
from cellserve.service.runtime.state_graphs import SOURCES, around_tables, can_keep, own_tensor
from cellserve.service.runtime.state_tables import TableRuns
from cellserve.service.runtime.tensor_layout import TensorLayout

Array = NDArray[Any]
Optimization = Literal["all", "extended", "basic", "off"]
WhenInexact = Literal["one-row", "batch"]
Precision = Literal["float32", "float16"]
StateMemory = Literal["auto", "host", "device"]
Run = Callable[[Array, NDArray[np.int32], Sequence[Array]], tuple[Array, list[Array]]]

_MEASURED_RUNS = 4
_LEVELS: dict[Optimization, Any] = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


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
    state_memory: StateMemory = "auto"  # where states are kept between runs

    def on_device(self, provider: str) -> bool:
        """Whether states are kept in the memory of the device, which on the CPU is only good for tests."""
        return self.state_memory == "device" or (self.state_memory == "auto" and provider == CUDA)

    def arithmetic(self, provider: str) -> str:
        """Returns the precision of products on a provider: float32, tf32 or float16."""
        if provider != CUDA:
            return "float32"
        return "tf32" if self.precision == "float32" and self.cuda_tf32 else self.precision


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
        self._bindings = threading.local()  # one per thread, for concurrent runs
        self._shapes = ANY_SHAPE
        adapter = GraphAdapter(signature, self.call)
        self._adapter: Run | None = None if adapter.is_passthrough else adapter
        # What runs are measured by: the thread's own processor time, unless other threads or a device take part. It
        # does not count what other processes take, which would make ticks look costly.
        self.clock = time.thread_time if options.threads == 1 and self.provider != CUDA else time.perf_counter
        self.lost_device = False
        # Runs on states that stay on the device; None if the model has none, or they are kept in host memory.
        self.on_device: TableRuns | None = None
        if any(tensor.name == SOURCES for tensor in self._session.get_inputs()):
            copying = replace(options, memory_arena=False)  # on the CPU, tables that are replaced are freed at once
            self._adapter = self.on_device = TableRuns(
                signature, self._bound_to, lambda graph: _session(graph, copying), DEVICES[self.provider]
            )

    @property
    def shapes(self) -> ShapePolicy:
        """How runs are padded."""
        return self._shapes

    @shapes.setter
    def shapes(self, policy: ShapePolicy) -> None:
        self._shapes = policy
        if self.on_device is not None:
            self.on_device.shapes = policy

    def has_lost_device(self, error: Exception) -> bool:
        """Whether the GPU is gone for this process, as an error of a run may show; says so once."""
        if not self.lost_device and self.provider == CUDA and is_of_cuda(error) and not cuda_answers():
            self.lost_device = True
            reason = str(error).partition(" ; ")[0].splitlines()[0]
            say_once(f"the GPU does not answer any more ({reason}): not ready until this process is restarted")
        return self.lost_device

    def close(self) -> None:
        """Frees ONNX Runtime's memory; the model cannot be run any more."""
        self._session = self._step = self._adapter = self.on_device = None
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
        if self._shapes is not ANY_SHAPE:
            padded = Padding(self._shapes, self.signature, inputs[0].shape)
            return padded.remove(self._call_as_is(*padded.add(inputs, lengths, states)))
        return self._call_as_is(inputs, lengths, states)

    def _call_as_is(self, inputs: Sequence[Array], lengths: NDArray[np.int32], states: Sequence[Array]) -> list[Array]:
        single = self._step is not None and inputs[0].shape[1] == 1
        feed = dict(zip(self._inputs, inputs, strict=True))
        feed.update(zip(self._states, states, strict=True))
        if self.signature.lengths and not single:
            feed[self.signature.lengths] = lengths
        # The results are the graph's own memory. An I/O binding, whose outputs are copied, takes 10 % longer.
        outputs: list[Array] = (self._step if single else self._session).run(self._fetches, feed)
        return outputs

    def _bound_to(self, inputs: Sequence[Array]) -> tuple[ort.InferenceSession, ort.IOBinding, bool]:
        """Returns the graph to run on these inputs, this thread's binding of it, and whether it takes lengths."""
        single = self._step is not None and inputs[0].shape[1] == 1
        name, session = ("step", self._step) if single else ("sequence", self._session)
        binding: ort.IOBinding | None = getattr(self._bindings, name, None)
        if binding is None:
            binding = session.io_binding()
            setattr(self._bindings, name, binding)
        return session, binding, self.signature.lengths is not None and not single

    def seconds(self, batch: int, time_steps: int) -> float:
        """Measures a run on zeros, in seconds: the shortest of a few."""
        time_steps = max(time_steps, self.signature.min_steps)
        x = TensorLayout(self.signature.inputs).zeros(batch, time_steps)
        lengths = np.full(batch, time_steps, np.int32)
        run: Callable[[], object] = functools.partial(self.run, x, lengths, self.zeros(batch))
        if self.on_device is not None:
            run = self.on_device.trial_run(x, lengths)
        taken = []
        for _ in range(_MEASURED_RUNS):
            start = self.clock()
            run()
            taken.append(self.clock() - start)
        return min(taken)

    def zeros(self, batch: int) -> list[Array]:
        """Returns the states before the first step: zeros, one array per state."""
        return [
            np.zeros((*spec.shape[: spec.batch_axis], batch, *spec.shape[spec.batch_axis :]), spec.dtype)
            for spec in self.signature.states
        ]


def _open(model: Path | bytes, options: RuntimeOptions) -> ort.InferenceSession:
    """Opens a file as the options want it: in float16, and with its states in tables."""
    provider = providers(options.provider, options.cuda_tf32)[0]
    content = model if isinstance(model, bytes) else model.read_bytes()
    if provider == CUDA and options.precision == "float16":
        try:
            content = in_float16(content)
        except CannotConvert as error:
            raise RuntimeUnavailable(str(error)) from None
    if options.on_device(provider):
        try:
            signature = parse_document(scan(content).metadata).signature
        except BadModelFile as error:
            raise RuntimeUnavailable(str(error)) from None
        if can_keep(content, signature):
            content = around_tables(content, signature)
    return _session(content, options)


def _session(content: bytes, options: RuntimeOptions) -> ort.InferenceSession:
    names = providers(options.provider, options.cuda_tf32)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    settings.add_session_config_entry(*FLUSH_DENORMALS)  # for its own threads, if there are several
    settings.enable_cpu_mem_arena = options.memory_arena
    settings.graph_optimization_level = _LEVELS[options.optimization]
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    settings.use_deterministic_compute = names[0] == CUDA
    of_providers = [_cuda_options(options) if provider == CUDA else {} for provider in names]
    try:
        session = ort.InferenceSession(content, settings, providers=names, provider_options=of_providers)
        session.disable_fallback()  # to another provider, if a run fails: its bits are others
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
    tensors = (own_tensor(tensor.name) for tensor in (*session.get_inputs(), *session.get_outputs()))
    names = {name for name in tensors if name is not None}
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
        # Of json's parsers one that refuses lone surrogates, with which nothing could be answered.
        return ModelDocument.model_validate(from_json(text))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RuntimeUnavailable(
            f"the file's {METADATA_KEY!r} metadata does not fit this service: {place}: {first['msg']}"
        ) from None
    except ValueError as error:
        raise RuntimeUnavailable(f"the file's {METADATA_KEY!r} metadata is damaged: {error}") from None
