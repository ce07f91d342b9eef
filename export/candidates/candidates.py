"""Candidate forms in which a network can run over time: builds them, proves them, measures them, chooses one.

The rule: the fastest measured candidate that keeps the promise of bit identity. A candidate that is not exact is passed
over if another one is; a candidate that differs from Keras ends the export, since then its code is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from cellserve.export.errors import ExportError, ProofFailed, first_line
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.builder import count_operators
from cellserve.export.onnx_graph.operators import Lowering, lowering_of
from cellserve.export.onnx_graph.scan_model import ScanModelBuilder
from cellserve.export.onnx_graph.sequence_network import SequenceNetwork
from cellserve.export.onnx_graph.step_model import StepModelBuilder
from cellserve.export.onnx_graph.tf_trace import trace_step
from cellserve.export.verify import benchmark
from cellserve.export.verify.benchmark import NO_ALTERNATIVES, Alternatives
from cellserve.export.verify.parity import Parity
from cellserve.export.verify.reference import STEPS, Reference
from cellserve.export.verify.sequence_reference import SequenceReference
from cellserve.models.signature import METADATA_KEY, Exactness, ModelDocument, Signature
from cellserve.service.runtime.batch_invariance import FULL_PLAN, find_shapes
from cellserve.service.runtime.onnx_model import Runtime, RuntimeOptions
from cellserve.service.runtime.providers import RuntimeUnavailable
from cellserve.service.runtime.shape_policy import ANY_SHAPE, CHEAP_POLICIES, POLICIES

THREADS = (1, 2)  # exactness is proved across these thread counts
Graphs = tuple[onnx.ModelProto, onnx.ModelProto | None]  # over whole sequences; for single steps, if there is one


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One form of a network, converted, with the results of its proofs and measurements."""

    name: str
    model: onnx.ModelProto
    step: onnx.ModelProto | None  # the graph for single steps, if it is faster and gives the same bits
    built_step: onnx.ModelProto | None  # that graph, whether used or not
    parity: Parity
    exactness: Exactness
    microseconds: dict[str, float] = field(default_factory=dict)  # time of one run, by "batch x time", once measured

    @property
    def time(self) -> float:
        """Geometric mean of its times, in microseconds."""
        return float(np.exp(np.mean(np.log(list(self.microseconds.values())))))

    @property
    def size(self) -> int:
        """Size of its graphs in bytes, without the model document."""
        return sum(len(graph.SerializeToString()) for graph in (self.model, self.step) if graph)

    @property
    def operators(self) -> dict[str, int]:
        """How often each operator is in the graph and in the graphs within it."""
        return count_operators(self.model.graph)


def build_candidates(
    network: StatefulNetwork | SequenceNetwork,
    document: ModelDocument,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Candidate]:
    """Builds and proves every candidate of a network; their times are not measured yet.

    Args:
        network: The network.
        document: The model document, without the results of this function.
        progress: Called with a description of each stage.

    Raises:
        ProofFailed: A candidate differs from Keras by more than the tolerance.
    """
    candidates: list[Candidate] = []
    unfit: list[str] = []  # why forms are wrong on special numbers alone
    reference: Reference | SequenceReference | None = None
    for name, operators in operator_choices(network):
        progress(f"converting: {name}")
        try:
            model, step = build(network, document.signature, operators)
        except ExportError:
            raise
        except Exception as error:  # from TensorFlow, tf2onnx, ONNX or ONNX Runtime
            raise ExportError(
                f"the form {name!r} cannot be built ({type(error).__name__}: {first_line(error)}): a layer or cell "
                f"does something that an ONNX graph cannot express; write it with simpler operations of keras.ops"
            ) from None
        progress(f"comparing with Keras: {name}")
        reference = reference or reference_of(network)
        compared = [
            reference.compare(open_model(model, each, document)) for each in ((None, step) if step else (None,))
        ]
        failed = [parity for parity in compared if parity.failed]
        if failed and all(difference.run == "special" for parity in failed for difference in parity.failed):
            # ONNX Runtime's kernel is at fault, not what is written here: another form may do.
            unfit.append(_explain(name, failed[0]))
            continue
        if failed:
            raise ProofFailed(_explain(name, failed[0]))
        candidates.append(prove_candidate(name, (model, step), compared[-1], document, progress))
    if not candidates:
        raise ProofFailed(unfit[0])
    return candidates


def reference_of(network: StatefulNetwork | SequenceNetwork) -> Reference | SequenceReference:
    """Runs Keras, to compare candidates with.

    Raises:
        ExportError: Keras cannot run the network on random sequences.
    """
    try:
        return SequenceReference(network) if isinstance(network, SequenceNetwork) else Reference(network)
    except Exception as error:  # from Keras, TensorFlow or a layer's own code
        raise ExportError(
            f"Keras cannot run the network on random sequences of up to {STEPS} time steps ({first_line(error)}): "
            f"see that model.predict takes sequences of any length"
        ) from None


def prove_candidate(
    name: str, graphs: Graphs, parity: Parity, document: ModelDocument, progress: Callable[[str], None]
) -> Candidate:
    """Proves a candidate's bit identity; keeps its graph for single steps if that is worth it."""
    model, step = graphs
    progress(f"proving bit identity: {name}")
    kept = step if step and _step_is_faster(model, step, document) else None
    exactness = _prove(model, kept, document)
    if kept and exactness.shapes != ANY_SHAPE.name:
        alone = _prove(model, None, document)
        if alone.shapes == ANY_SHAPE.name or not exactness.proved:
            kept, exactness = None, alone
    return Candidate(name, model, kept, step, parity, exactness)


def best(candidates: list[Candidate]) -> Candidate:
    """The fastest exact candidate, or the fastest of all if none is exact."""
    exact = [candidate for candidate in candidates if candidate.exactness.proved] or candidates
    return min(exact, key=lambda candidate: candidate.time)


def measure(
    candidates: Sequence[Candidate], document: ModelDocument, beside: Alternatives = NO_ALTERNATIVES
) -> tuple[list[Candidate], dict[str, dict[str, float | None]]]:
    """Measures candidates in turn, so that their times are from the same moments of the machine.

    Args:
        candidates: The candidates.
        document: Has their signature.
        beside: What is timed in the same rounds.

    Returns:
        The candidates with their times; the times of the alternatives, by "batch x time" and maker.
    """
    forms = [open_model(candidate.model, candidate.step, document) for candidate in candidates]
    for form, candidate in zip(forms, candidates, strict=True):
        form.shapes = next((policy for policy in POLICIES if policy.name == candidate.exactness.shapes), ANY_SHAPE)
    ours, others = benchmark.measure(forms, beside)
    timed = [replace(candidate, microseconds=each) for candidate, each in zip(candidates, ours, strict=True)]
    return timed, others


def _prove(model: onnx.ModelProto, step: onnx.ModelProto | None, document: ModelDocument) -> Exactness:
    several = [open_model(model, step, document, threads) for threads in THREADS]
    exactness = find_shapes(several, FULL_PLAN, CHEAP_POLICIES)
    # Threads cut a tensor in pieces, each with an end of its own: what holds for one thread may not hold for several.
    return exactness if exactness.proved else find_shapes([open_model(model, step, document)], FULL_PLAN)


def _step_is_faster(model: onnx.ModelProto, step: onnx.ModelProto, document: ModelDocument) -> bool:
    """Whether the graph for single steps is worth its memory: more than a tenth faster over the batch sizes."""
    shapes = [(batch, steps) for batch, steps in benchmark.SHAPES if steps == 1]
    with_step = benchmark.runs(open_model(model, step, document), shapes)
    without = benchmark.runs(open_model(model, None, document), shapes)
    ratios = []
    for shape in with_step:
        times = benchmark.time_interleaved({"with": with_step[shape], "without": without[shape]})
        ratios.append(times["without"] / times["with"])
    return float(np.exp(np.mean(np.log(ratios)))) > 1.1


def with_document(model: onnx.ModelProto, document: ModelDocument) -> bytes:
    """Returns the bytes of a model file with the document in its metadata."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.helper.set_model_props(copy, {METADATA_KEY: document.model_dump_json()})
    return bytes(copy.SerializeToString())


def open_model(
    model: onnx.ModelProto, step: onnx.ModelProto | None, document: ModelDocument, threads: int = 1
) -> Runtime:
    """Opens a candidate on the CPU, for a proof or a measurement."""
    options = RuntimeOptions(provider="cpu", threads=threads)
    try:
        return Runtime(with_document(model, document), options, step and with_document(step, document))
    except RuntimeUnavailable as error:
        raise ExportError(f"ONNX Runtime cannot run the exported graph: {first_line(error)}") from None


def operator_choices(network: StatefulNetwork | SequenceNetwork) -> Iterator[tuple[str, Collection[type]]]:
    """Yields the forms by name, with the types of cells that each writes as operators: all, some, none.

    With more than three such types only all and none are tried: the number of choices doubles with each type.
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
    network: StatefulNetwork | SequenceNetwork, signature: Signature, operators: Collection[type]
) -> tuple[onnx.ModelProto, onnx.ModelProto | None]:
    """Builds the model over whole sequences, and the model of single steps if the network can be stepped."""
    if isinstance(network, SequenceNetwork):
        return network.assemble(lambda part, its_signature: build(part, its_signature, operators)[0]), None

    def lowering(cell: Any) -> Lowering | None:
        return lowering_of(cell) if type(cell) in operators else None

    step = trace_step(network, lambda cell: lowering(cell) is not None)
    ingredients = network, step, [lowering(recurrence.cell) for recurrence in network.recurrences], signature
    return ScanModelBuilder(*ingredients).model(), StepModelBuilder(*ingredients).model()


def _explain(form: str, parity: Parity) -> str:
    first = parity.failed[0]
    if all(difference.run == "model" for difference in parity.failed):
        return (
            f"the saved model differs at layer {first.layer!r} ({first.tensor}, off by {first.value:.2e} at "
            f"{first.where}) from its own layers and cells called one after the other: a layer does more than call its "
            f"cell (a subclass of a recurrent layer, say); move that into the cell or into a separate layer; nothing "
            f"was written"
        )
    others = "".join(
        f"\n  {d.tensor} of layer {d.layer!r}, run in {d.run}: off by {d.value:.2e} at {d.where}" for d in parity.failed
    )
    return (
        f"the form {form!r} differs from Keras first in layer {first.layer!r} ({first.tensor}, run in {first.run}): "
        f"off by {first.value:.2e} relative to max(1, |Keras|) at {first.where}, {first.share:.1f} times the limit; "
        f"nothing was written{others}"
    )
