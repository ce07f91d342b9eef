"""Tables of states in the memory of the device that runs a model, and runs of the model on rows of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from cellserve.models.signature import Signature, StateSpec
from cellserve.service.runtime.graph_adapter import GraphAdapter
from cellserve.service.runtime.shape_policy import ANY_SHAPE, Padding, ShapePolicy
from cellserve.service.runtime.state_graphs import (
    FINITE,
    SOURCES,
    TARGETS,
    reading_graph,
    table_in,
    table_out,
    writing_graph,
)

log = logging.getLogger("cellserve")

Array = NDArray[Any]
Rows = NDArray[np.int64]  # numbers of a table's rows
# Returns the graph to run on such inputs, this thread's binding of it, and whether it takes lengths.
Bind = Callable[[Sequence[Array]], tuple[ort.InferenceSession, ort.IOBinding, bool]]

ZEROS, SCRAP, RESERVED = 0, 1, 2  # the row that is always zeros, that of states that nobody wants, and the first other
_SHRINK = "memory.enable_memory_arena_shrinkage"


class TableRuns:
    """Runs a model whose graph is around tables (`around_tables`).

    Args:
        signature: The model's signature.
        bind: Returns the graph to run.
        open_graph: Opens a file on the model's provider.
        device: ONNX Runtime's name for the device: `cpu` or `cuda`.
    """

    def __init__(self, signature: Signature, bind: Bind, open_graph: Callable[[bytes], Any], device: str) -> None:
        self._signature, self._bind = signature, bind
        self._reading = open_graph(reading_graph(signature.states))
        self._writing = open_graph(writing_graph(signature.states))
        self._device = device
        self._passthrough = GraphAdapter(signature, self._no_call).is_passthrough
        self._has_finite = any(spec.dtype == "float32" for spec in signature.states)
        self.shapes: ShapePolicy = ANY_SHAPE

    def tables(self, capacity: int = RESERVED) -> StateTables:
        """Returns new tables of zeros."""
        graphs = self._reading, self._writing
        return StateTables(self, self._signature.states, graphs, self._device, capacity)

    def __call__(self, x: Array, lengths: NDArray[np.int32], states: Sequence[Array]) -> tuple[Array, list[Array]]:
        """Runs with states in host memory, as `Runtime.run` does: it brings them to the device and back."""
        rows = np.arange(RESERVED, RESERVED + len(x))
        targets = rows + len(x)
        tables = self.tables(RESERVED + 2 * len(x))
        specs = self._signature.states
        own = [np.moveaxis(state, spec.batch_axis, 0) for state, spec in zip(states, specs, strict=True)]
        tables.write(rows, own)
        y, _ = self.run(tables, x, lengths, rows, targets)
        return y, [
            np.ascontiguousarray(np.moveaxis(state, 0, spec.batch_axis))
            for state, spec in zip(tables.read(targets), specs, strict=True)
        ]

    def trial_run(self, x: Array, lengths: NDArray[np.int32]) -> Callable[[], object]:
        """Returns a run from zeros, whose next states are dropped, to be measured."""
        zeros, scrap = np.full(len(x), ZEROS), np.full(len(x), SCRAP)
        return partial(self.run, self.tables(), x, lengths, zeros, scrap)

    def run(
        self, tables: StateTables, x: Array, lengths: NDArray[np.int32], sources: Rows, targets: Rows
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Advances rows of tables.

        Args:
            tables: The tables.
            x: As `Runtime.run` takes it.
            lengths: As `Runtime.run` takes them.
            sources: `[batch]`, the rows of the states before.
            targets: `[batch]`, the rows of the states after. Each is a source of no other row.

        Returns:
            `y` as `Runtime.run` does, and `[batch]`, whether each row's next states are finite.
        """
        rows = np.stack([sources, targets, np.arange(len(x))], axis=1)
        finite = np.ones(len(x), bool)
        call = partial(self._call, tables, finite)
        with tables.in_use():
            if self._passthrough:
                return call((x,), lengths, [rows])[0], finite
            y, _ = GraphAdapter(self._signature, call, batch_axes=(0,))(x, lengths, [rows])
        return y, finite

    def _call(
        self,
        tables: StateTables,
        finite: NDArray[np.bool_],
        inputs: Sequence[Array],
        lengths: NDArray[np.int32],
        states: Sequence[Array],
    ) -> list[Array]:
        """Calls the graph once; as states it takes and returns rows `[batch, 3]`: source, target, place in the batch.

        Rows that an adapter has added are zeros: their source is the row of zeros, and they have no target.
        """
        (rows,) = states
        padded, padding = rows, None
        if self.shapes is not ANY_SHAPE:
            padding = Padding(self.shapes, self._signature, inputs[0].shape, batch_axes=(0,))
            inputs, lengths, (padded,) = padding.add(inputs, lengths, [rows])
        targets = padded[:, 1].copy()
        targets[len(rows) :] = SCRAP
        targets[targets == ZEROS] = SCRAP
        results = self._run_graph(tables, inputs, lengths, np.ascontiguousarray(padded[:, 0]), targets[:, None])
        outputs, is_finite = results[: len(self._signature.outputs)], results[len(self._signature.outputs) :]
        if padding is not None:
            outputs = padding.remove([*outputs, padded])[:-1]
        if is_finite:
            real = rows[:, 1] != ZEROS
            finite[rows[real, 2]] &= is_finite[0][: len(rows)][real] == 0
        advanced = rows.copy()
        advanced[:, 0] = rows[:, 1]
        return [*outputs, advanced]

    def _run_graph(
        self, tables: StateTables, inputs: Sequence[Array], lengths: NDArray[np.int32], sources: Rows, targets: Rows
    ) -> list[Array]:
        signature = self._signature
        session, binding, takes_lengths = self._bind(inputs)
        fetched = [spec.name for spec in signature.outputs]
        if self._has_finite:
            fetched.append(FINITE)
        try:
            for spec, array in zip(signature.inputs, inputs, strict=True):
                binding.bind_cpu_input(spec.name, array)
            if takes_lengths:
                binding.bind_cpu_input(signature.lengths, lengths)
            binding.bind_cpu_input(SOURCES, sources)
            binding.bind_cpu_input(TARGETS, targets)
            for name in fetched:
                binding.bind_output(name, "cpu")
            tables.bind(binding, written=True)
            session.run_with_iobinding(binding)
            return [value.numpy() for value in binding.get_outputs()[: len(fetched)]]
        finally:
            _clear(binding)

    @staticmethod
    def _no_call(*_: Any) -> list[Array]:
        raise NotImplementedError


class StateTables:
    """One table `[capacity, *shape]` per state, in device memory. Row 0 is zeros.

    All but runs are made by one thread, the event loop's. A run on another thread may go on beside reads and writes of
    other rows; `resize` waits for it.

    Args:
        runs: Runs the model on them.
        states: The signature's states.
        graphs: Those that read rows (`reading_graph`) and write them (`writing_graph`).
        device: ONNX Runtime's name for the device.
        capacity: Rows, at least `RESERVED`.
    """

    def __init__(
        self,
        runs: TableRuns,
        states: Sequence[StateSpec],
        graphs: tuple[ort.InferenceSession, ort.InferenceSession],
        device: str,
        capacity: int,
    ) -> None:
        self._runs, self._specs = runs, states
        self._reading, self._writing = graphs
        self._device = device
        self._running = 0
        self._run_ended = threading.Condition()
        self._values = [
            ort.OrtValue.ortvalue_from_numpy(np.zeros((RESERVED, *spec.shape), spec.dtype), device, 0)
            for spec in states
        ]
        self.capacity = RESERVED
        self.resize(np.zeros(capacity, np.int64))

    def run(
        self, x: Array, lengths: NDArray[np.int32], sources: Rows, targets: Rows
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Advances rows: see `TableRuns.run`."""
        return self._runs.run(self, x, lengths, sources, targets)

    def read(self, rows: Rows) -> list[Array]:
        """Returns copies of rows in host memory: `[len(rows), *shape]` per state."""
        # A view, since ONNX Runtime gives int64 under NumPy's other name for it, which orjson does not know.
        return [
            value.numpy().view(spec.dtype) for value, spec in zip(self._read(rows, "cpu"), self._specs, strict=True)
        ]

    def write(self, rows: Rows, states: Sequence[Array]) -> None:
        """Writes rows, in the layout that `read` returns."""
        binding = self._writing.io_binding()
        binding.bind_cpu_input(TARGETS, np.ascontiguousarray(rows)[:, None])
        for spec, state in zip(self._specs, states, strict=True):
            binding.bind_cpu_input(spec.name, np.ascontiguousarray(state, spec.dtype))
        self.bind(binding, written=True)
        try:
            self._writing.run_with_iobinding(binding)
        finally:
            _clear(binding)

    def resize(self, sources: Rows) -> None:
        """Replaces the tables by others `[len(sources)]`, each row of which is the row `sources` says.

        For a moment there are both. Freed memory is given back to the system.
        """
        with self._run_ended:
            self._run_ended.wait_for(lambda: not self._running)
            self._values = self._read(sources, self._device)
            self.capacity = len(sources)
        if self._device == "cuda":
            self._give_back()

    def _give_back(self) -> None:
        """Lets ONNX Runtime give freed memory back to the GPU, which it does at the end of a run that asks for it."""
        options = ort.RunOptions()
        options.add_run_config_entry(_SHRINK, "gpu:0")
        try:
            self._read(np.zeros(1, np.int64), "cpu", options)
        except Exception as error:  # nothing depends on it
            log.warning("ONNX Runtime keeps the GPU's memory: %s", str(error).splitlines()[0])

    def close(self) -> None:
        """Frees their memory."""
        self._values = []
        self.capacity = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps the tables as they are for a run."""
        with self._run_ended:
            self._running += 1
        try:
            yield
        finally:
            with self._run_ended:
                self._running -= 1
                self._run_ended.notify_all()

    def bind(self, binding: ort.IOBinding, written: bool) -> None:
        """Binds the tables to the inputs of a graph, and if they are written to its outputs: in the same memory."""
        for spec, value in zip(self._specs, self._values, strict=True):
            binding.bind_ortvalue_input(table_in(spec), value)
            if written:
                binding.bind_ortvalue_output(table_out(spec), value)

    def _read(self, rows: Rows, device: str, options: ort.RunOptions | None = None) -> list[ort.OrtValue]:
        binding = self._reading.io_binding()
        binding.bind_cpu_input(SOURCES, np.ascontiguousarray(rows))
        self.bind(binding, written=False)
        for spec in self._specs:
            binding.bind_output(spec.name, device)
        try:
            self._reading.run_with_iobinding(binding, options)
            outputs: list[ort.OrtValue] = binding.get_outputs()
            return outputs
        finally:
            _clear(binding)


def _clear(binding: ort.IOBinding) -> None:
    """Lets a binding go of what is bound to it, tables that have been replaced too: others may keep the binding."""
    binding.clear_binding_inputs()
    binding.clear_binding_outputs()
