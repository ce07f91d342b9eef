"""Forms of less precision than float32: makes them, scores them on test data, chooses one or refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from cellserve.export.candidates import candidates
from cellserve.export.candidates.candidates import Form
from cellserve.export.candidates.quantization_schemes import SCHEMES, Ranges, digest, products
from cellserve.export.errors import ExportError, first_line
from cellserve.export.verify.evaluation import TestData
from cellserve.models.signature import ModelDocument

# What may be lost where `--tolerance` does not say: of accuracy as a share of all, of RMSE as a share of what it was.
TOLERANCES = {"accuracy": 0.01, "rmse": 0.01}
_ROWS, _STEPS = 64, 200  # of the test data, to calibrate on


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A form in less precision, beside the float32 form that was the best."""

    form: Form
    float32: Form
    tried: list[Form]  # within tolerance
    lost: list[str]  # what those that were not would have cost
    before: dict[str, float]  # test metrics in float32
    after: dict[str, float]
    tolerance: dict[str, float]


def narrowed(
    tried: list[Form],
    precision: Literal["int8", "float16"],
    document: ModelDocument,
    data: TestData,
    tolerance: float | None = None,
    report: Callable[[str], None] = lambda stage: None,
) -> Narrowed:
    """Writes a network in less precision in every way that there is, and takes the fastest exact one within tolerance.

    Of those that are as fast to a tenth it is the smallest. The best float32 form is rewritten, and the one without
    operators of whole recurrences: only products that stand by themselves can be made in int8.

    Raises:
        ExportError: Each of them loses more than the tolerance on the test data.
    """
    best = candidates.best(tried)
    before = data.score(candidates.open_model(best.model, best.step, document))
    allowed = {name: TOLERANCES[_kind(name)] if tolerance is None else tolerance for name in before}
    reference = candidates.reference_of(data.network)
    made: list[Form] = []
    metrics: dict[str, dict[str, float]] = {}
    lost: list[tuple[float, str]] = []
    for base in dict.fromkeys([best, tried[-1]]):
        ranges = calibrated_ranges(base.built_step, document, data) if base.built_step else {}
        for scheme in SCHEMES[precision]:
            name = f"{base.name}, {scheme.name}"
            report(f"converting: {name}")
            try:
                model = scheme.rewrite(base.model, ranges)
                if model is None:
                    continue
                step = base.built_step and scheme.rewrite(base.built_step, ranges)
                runtime = candidates.open_model(model, step, document)
            except Exception as error:  # ONNX Runtime's or its converter's: it may be without an operator
                lost.append((np.inf, f"{name}: cannot be made: {first_line(error)}"))
                continue
            report(f"evaluating on the test data: {name}")
            after = data.score(runtime)
            losses = {metric: _loss(metric, before[metric], after[metric]) for metric in before}
            worst = max(losses, key=lambda metric: _key(losses[metric]) - allowed[metric])
            if not losses[worst] <= allowed[worst]:
                told = f"{worst} goes from {before[worst]:.4f} to {after[worst]:.4f}, {losses[worst]:.2g} is lost and"
                lost.append((_key(losses[worst]), f"{name}: {told} {allowed[worst]:.2g} allowed"))
                continue
            parity = reference.compare(runtime, judged=False)
            made.append(candidates.measured(name, model, step, parity, document, report))
            metrics[name] = after
    if not made:
        raise ExportError(
            f"{precision}: on {data.path}, {min(lost)[1]}; nothing was written: give a larger --tolerance, "
            f"or stay with float32"
            if lost
            else f"{precision}: the network has no weights that could be narrowed; nothing was written"
        )
    report("measuring all in turn")
    best, *made = candidates.measured_in_turn([best, *made], document)
    form = _chosen(made)
    return Narrowed(form, best, made, [text for _, text in lost], before, metrics[form.name], allowed)


def _chosen(made: list[Form]) -> Form:
    """Gives the smallest of the exact forms that are as fast as the fastest, to a tenth."""
    exact = [form for form in made if form.exactness.proved] or made
    fastest = candidates.best(exact)
    return min((form for form in exact if form.time <= 1.1 * fastest.time), key=lambda form: (form.size, form.time))


def _loss(metric: str, before: float, after: float) -> float:
    if _kind(metric) == "rmse":
        return (after - before) / (before or 1.0)
    return before - after


def _kind(metric: str) -> str:
    """Gives the kind of a metric, which may be of one output of several: "each rmse"."""
    return metric.rpartition(" ")[2]


def _key(loss: float) -> float:
    return loss if np.isfinite(loss) else np.inf


def calibrated_ranges(step: onnx.ModelProto, document: ModelDocument, data: TestData) -> Ranges:
    """Steps through some of the test data; gives the largest number that each weight was multiplied by.

    Args:
        step: The graph for single steps: nothing in it is hidden in a loop.
        document: Has its signature.
        data: The test data.
    """
    model = onnx.ModelProto.FromString(step.SerializeToString())
    weights = {}
    for node, weight in list(products(model.graph)):
        name = f"calibration/{node.output[0]}"
        weights[name] = digest(weight)
        model.graph.node.append(helper.make_node("Identity", [node.input[0]], [name]))
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    signature = document.signature
    rows = np.linspace(0, len(data.lengths) - 1, min(_ROWS, len(data.lengths))).astype(int)
    inputs = {spec.name: x[rows] for spec, x in zip(signature.inputs, data.inputs, strict=True)}
    lengths = data.lengths[rows]
    states = {
        state.name: np.zeros((len(rows), *state.shape), state.dtype) for state in signature.states
    }  # the export's own states have the batch first
    wanted = [*weights, *(state.next_name for state in signature.states)]
    largest: dict[str, float] = {}
    for t in range(min(_STEPS, int(lengths.max()))):
        now = {name: np.ascontiguousarray(x[:, t : t + 1]) for name, x in inputs.items()}
        results = session.run(wanted, {**now, **states})
        states = dict(zip(states, results[len(weights) :], strict=True))
        for key, numbers in zip(weights.values(), results, strict=False):
            valid = numbers[lengths > t] if len(numbers) == len(rows) else numbers
            largest[key] = max(largest.get(key, 0.0), float(np.abs(valid).max(initial=0)))
    return largest
