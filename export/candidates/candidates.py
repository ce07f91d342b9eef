"""The forms in which a network can be run over time: builds them, proves them, measures them, chooses one.

The rule: the fastest form that keeps the promise of bit identity, by measurement. A form that is not exact is passed
over where another one is; a form that differs from Keras ends the export, since then its code is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from cellserve.export.errors import ExportError, ProofFailed, first_line
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.operators import Lowering, lowering_of
from cellserve.export.onnx_graph.scan_model import Assembly
from cellserve.export.onnx_graph.sequence_network import WholeNetwork
from cellserve.export.onnx_graph.step_model import OneStep
from cellserve.export.onnx_graph.tf_trace import trace_step
from cellserve.export.verify import benchmark
from cellserve.export.verify.parity import Parity, Reference, WholeReference
from cellserve.models.signature import METADATA_KEY, Exactness, ModelDocument, Signature
from cellserve.service.runtime.batch_invariance import FULL_PLAN, check_batch_invariance
from cellserve.service.runtime.onnx_model import Runtime, RuntimeOptions, RuntimeUnavailable

THREADS = (1, 2)  # exactness is proved across these


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """One form of a network, converted, and what was proved and measured of it."""

    name: str
    model: onnx.ModelProto
    step: onnx.ModelProto | None  # the graph for single steps, where it is faster and gives the same bits
    built_step: onnx.ModelProto | None  # that graph, taken or not
    parity: Parity
    exactness: Exactness
    microseconds: dict[str, float]  # a run, by "batch x time"

    @property
    def time(self) -> float:
        """Gives the geometric mean of its times, microseconds."""
        return float(np.exp(np.mean(np.log(list(self.microseconds.values())))))

    @property
    def size(self) -> int:
        """Gives the bytes of its files, but for what they say about themselves."""
        return sum(len(graph.SerializeToString()) for graph in (self.model, self.step) if graph)

    @property
    def operators(self) -> dict[str, int]:
        """Counts the operators of the graph and of the graphs within it."""
        counts: dict[str, int] = {}
        for node in _nodes(self.model.graph):
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def all_forms(
    network: StatefulNetwork | WholeNetwork, document: ModelDocument, report: Callable[[str], None] = lambda stage: None
) -> list[Form]:
    """Builds, proves and measures every form of a network.

    Args:
        network: The network.
        document: What the model file is to say, but for what is found out here.
        report: Is told what is being done.

    Raises:
        ProofFailed: A form differs from Keras by more than the tolerance.
    """
    forms: list[Form] = []
    reference: Reference | WholeReference | None = None
    for name, operators in candidates(network):
        report(f"converting: {name}")
        try:
            model, step = build(network, document.signature, operators)
        except ExportError:
            raise
        except Exception as error:  # TensorFlow's, tf2onnx's, ONNX's or ONNX Runtime's
            raise ExportError(
                f"the form {name!r} cannot be made ({type(error).__name__}: {first_line(error)}): a layer or cell does "
                f"what cannot be laid out as an ONNX graph; write it with simpler operations of keras.ops"
            ) from None
        report(f"comparing with Keras: {name}")
        reference = reference or reference_of(network)
        for step_or_none in (None, step) if step else (None,):
            parity = reference.compare(open_model(model, step_or_none, document))
            if parity.failed:
                raise ProofFailed(_explain(name, parity))
        forms.append(measured(name, model, step, parity, document, report))
    return measured_in_turn(forms, document) if len(forms) > 1 else forms


def reference_of(network: StatefulNetwork | WholeNetwork) -> Reference | WholeReference:
    """Runs Keras, for forms to be compared with."""
    return WholeReference(network) if isinstance(network, WholeNetwork) else Reference(network)


def measured(
    name: str,
    model: onnx.ModelProto,
    step: onnx.ModelProto | None,
    parity: Parity,
    document: ModelDocument,
    report: Callable[[str], None],
) -> Form:
    """Measures a form and proves its bit identity; keeps its graph for single steps where that is worth it."""
    report(f"measuring: {name}")
    kept = step if step and _step_is_faster(model, step, document) else None
    report(f"proving bit identity: {name}")
    exactness = _prove(model, kept, document)
    if kept and not exactness.proved:
        kept, exactness = None, _prove(model, None, document)
    runs = benchmark.runs(open_model(model, kept, document), benchmark.shapes(document.signature))
    microseconds = {shape: benchmark.microseconds(run) for shape, run in runs.items()}
    return Form(name, model, kept, step, parity, exactness, microseconds)


def best(forms: list[Form]) -> Form:
    """Gives the fastest form that is exact, or the fastest where none is."""
    exact = [form for form in forms if form.exactness.proved] or forms
    return min(exact, key=lambda form: form.time)


def measured_in_turn(forms: Sequence[Form], document: ModelDocument) -> list[Form]:
    """Measures forms anew, in turn: their times are then those of the same moments of the machine."""
    shapes = benchmark.shapes(document.signature)
    opened = [open_model(form.model, form.step, document) for form in forms]
    runs = {str(place): benchmark.runs(runtime, shapes) for place, runtime in enumerate(opened)}
    times: list[dict[str, float]] = [{} for _ in forms]
    for shape in (f"{batch}x{steps}" for batch, steps in shapes):
        for place, taken in benchmark.in_turn({place: those[shape] for place, those in runs.items()}).items():
            times[int(place)][shape] = taken or 0.0
    return [replace(form, microseconds=each) for form, each in zip(forms, times, strict=True)]


def _prove(model: onnx.ModelProto, step: onnx.ModelProto | None, document: ModelDocument) -> Exactness:
    return check_batch_invariance([open_model(model, step, document, threads) for threads in THREADS], FULL_PLAN)


def _step_is_faster(model: onnx.ModelProto, step: onnx.ModelProto, document: ModelDocument) -> bool:
    """Says whether the graph for single steps is worth its memory: a tenth faster over the batch sizes."""
    shapes = [(batch, steps) for batch, steps in benchmark.SHAPES if steps == 1]
    with_step = benchmark.runs(open_model(model, step, document), shapes)
    without = benchmark.runs(open_model(model, None, document), shapes)
    ratios = []
    for shape in with_step:
        times = benchmark.in_turn({"with": with_step[shape], "without": without[shape]})
        ratios.append((times["without"] or 0) / (times["with"] or 1))
    return float(np.exp(np.mean(np.log(ratios)))) > 1.1


def with_document(model: onnx.ModelProto, document: ModelDocument) -> bytes:
    """Writes the document into the model's metadata; gives the file's bytes."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.helper.set_model_props(copy, {METADATA_KEY: document.model_dump_json()})
    return bytes(copy.SerializeToString())


def open_model(
    model: onnx.ModelProto, step: onnx.ModelProto | None, document: ModelDocument, threads: int = 1
) -> Runtime:
    """Opens a form for a proof or a measurement: on the CPU."""
    options = RuntimeOptions(provider="cpu", threads=threads)
    try:
        return Runtime(with_document(model, document), options, step and with_document(step, document))
    except RuntimeUnavailable as error:
        raise ExportError(f"the network became a graph that cannot be run: {first_line(error)}") from None


def candidates(network: StatefulNetwork | WholeNetwork) -> Iterator[tuple[str, Collection[type]]]:
    """Gives forms by name, and the types of cells that each writes as operators: all, some, none.

    Of more than three such types all or none are tried: every choice of them would be a form to prove.
    """
    cells = [recurrence.cell for recurrence in network.recurrences]
    types = list(dict.fromkeys(type(cell) for cell in cells if lowering_of(cell)))
    for count in range(len(types), -1, -1) if len(types) <= 3 else (len(types), 0):
        for chosen in itertools.combinations(types, count):
            names = [f"operator of {cell.__name__}" for cell in chosen]
            if any(type(cell) not in chosen or lowering_of(cell) is None for cell in cells):
                names.append("Scan")
            yield ", ".join(names), chosen


def build(
    network: StatefulNetwork | WholeNetwork, signature: Signature, operators: Collection[type]
) -> tuple[onnx.ModelProto, onnx.ModelProto | None]:
    """Makes the model of whole sequences, and that of single steps for a network that can be stepped."""
    if isinstance(network, WholeNetwork):
        return network.assemble(lambda part, its_signature: build(part, its_signature, operators)[0]), None

    def lowering(cell: Any) -> Lowering | None:
        return lowering_of(cell) if type(cell) in operators else None

    step = trace_step(network, lambda cell: lowering(cell) is not None)
    ingredients = network, step, [lowering(recurrence.cell) for recurrence in network.recurrences], signature
    return Assembly(*ingredients).model(), OneStep(*ingredients).model()


def _explain(form: str, parity: Parity) -> str:
    first = parity.failed[0]
    if all(difference.run == "model" for difference in parity.failed):
        return (
            f"the saved model itself gives something else at layer {first.layer!r} ({first.tensor}, off by "
            f"{first.value:.2e} at {first.where}) than its layers and cells called one after the other: a layer in it "
            f"does more than call its cell (a subclass of a recurrent layer, say); put that into the cell or into a "
            f"layer of its own; nothing was written"
        )
    others = "".join(
        f"\n  {d.tensor} of layer {d.layer!r}, run in {d.run}: off by {d.value:.2e} at {d.where}" for d in parity.failed
    )
    return (
        f"the form {form!r} differs from Keras first in layer {first.layer!r} ({first.tensor}, run in {first.run}): "
        f"off by {first.value:.2e} relative to max(1, |Keras|) at {first.where}, {first.share:.1f} times what is "
        f"allowed; nothing was written{others}"
    )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
