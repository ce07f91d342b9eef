"""Candidates in lower precision than float32: builds them, scores them on test data, chooses one or refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from cellserve.export.candidates import candidates
from cellserve.export.candidates.candidates import Candidate
from cellserve.export.candidates.quantization_schemes import SCHEMES, Ranges, digest, products
from cellserve.export.errors import ExportError, first_line
from cellserve.export.verify.benchmark import NO_ALTERNATIVES, Alternatives
from cellserve.export.verify.evaluation import TestData
from cellserve.models.signature import ModelDocument

# Default losses allowed: for accuracy a share of all sequences, for errors a share of their float32 value.
TOLERANCES = {"accuracy": 0.01, "rmse": 0.01, "bits": 0.01}
_ERRORS = ("rmse", "bits")  # metrics of which less is better
_ROWS, _STEPS = 64, 200  # amount of test data used for calibration


@dataclass(frozen=True, slots=True)
class QuantizationResult:
    """The chosen candidate in lower precision, beside the best float32 candidate, all measured together."""

    candidate: Candidate
    float32: Candidate
    tried: list[Candidate]  # all within tolerance
    others: dict[str, dict[str, float | None]]  # times of the alternatives, by "batch x time" and maker
    rejected: list[str]  # why the others were not used, with the loss of each
    before: dict[str, float]  # test metrics in float32
    after: dict[str, float]  # test metrics of the chosen candidate
    tolerance: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Limits:
    """Test metrics in float32, and how much of each may be lost."""

    before: dict[str, float]
    allowed: dict[str, float]

    def violation(self, after: dict[str, float]) -> tuple[float, str] | None:
        """The largest loss beyond its limit, as a number and in words; None if all metrics are within."""
        losses = {metric: _loss(metric, self.before[metric], after[metric]) for metric in self.before}
        worst = max(losses, key=lambda metric: _finite_or_inf(losses[metric]) - self.allowed[metric])
        if losses[worst] <= self.allowed[worst]:
            return None
        change = f"{worst} goes from {self.before[worst]:.4f} to {after[worst]:.4f}"
        return (
            _finite_or_inf(losses[worst]),
            f"{change}, a loss of {losses[worst]:.2g} where {self.allowed[worst]:.2g} is allowed",
        )


def quantize(
    tried: list[Candidate],
    precision: Literal["int8", "float16"],
    document: ModelDocument,
    data: TestData,
    tolerance: float | None = None,
    beside: Alternatives = NO_ALTERNATIVES,
    progress: Callable[[str], None] = lambda stage: None,
) -> QuantizationResult:
    """Rewrites a network in lower precision with every scheme, and takes the fastest exact result within tolerance.

    Of those within a tenth of the fastest it takes the smallest. Two candidates are rewritten: the best float32 one,
    and the one without recurrent operators, as only products outside operators can become int8.

    Args:
        tried: The float32 candidates, measured.
        precision: The lower precision.
        document: Has the model's signature.
        data: The test data.
        tolerance: Allowed loss of each test metric; None for the default.
        beside: What is timed beside the results.
        progress: Called with a description of each stage.

    Raises:
        ExportError: Each result loses more than the tolerance on the test data.
    """
    best = candidates.best(tried)
    before = data.score(candidates.open_model(best.model, best.step, document))
    limits = _Limits(before, {name: TOLERANCES[_kind(name)] if tolerance is None else tolerance for name in before})
    reference = candidates.reference_of(data.network)
    accepted: list[Candidate] = []
    metrics: dict[str, dict[str, float]] = {}
    rejected: list[tuple[float, str]] = []
    for base in dict.fromkeys([best, tried[-1]]):
        ranges = calibrated_ranges(base.built_step, document, data) if base.built_step else {}
        for scheme in SCHEMES[precision]:
            name = f"{base.name}, {scheme.name}"
            progress(f"converting: {name}")
            try:
                model = scheme.rewrite(base.model, ranges)
                if model is None:
                    continue
                step = base.built_step and scheme.rewrite(base.built_step, ranges)
                runtime = candidates.open_model(model, step, document)
            except Exception as error:  # from ONNX or ONNX Runtime, which may lack an operator
                rejected.append((np.inf, f"{name}: cannot be built: {first_line(error)}"))
                continue
            progress(f"evaluating on the test data: {name}")
            metrics[name] = data.score(runtime)
            violation = limits.violation(metrics[name])
            if violation:
                rejected.append((violation[0], f"{name}: {violation[1]}"))
                continue
            parity = reference.compare(runtime, allow_float32_error=False)
            accepted.append(candidates.prove_candidate(name, (model, step), parity, document, progress))
    if not accepted:
        raise ExportError(
            f"{precision}: on {data.path}, {min(rejected)[1]}; nothing was written: give a larger --tolerance, "
            f"or stay with float32"
            if rejected
            else f"{precision}: the network has no weights that could be quantized; nothing was written"
        )
    progress("measuring all forms in turn")
    (best, *accepted), others = candidates.measure([best, *accepted], document, beside)
    chosen = _choose(accepted)
    reasons = [text for _, text in rejected]
    return QuantizationResult(chosen, best, accepted, others, reasons, before, metrics[chosen.name], limits.allowed)


def _choose(accepted: list[Candidate]) -> Candidate:
    """The smallest of the exact candidates that are within a tenth of the fastest."""
    exact = [candidate for candidate in accepted if candidate.exactness.proved] or accepted
    fastest = candidates.best(exact)
    fast = [candidate for candidate in exact if candidate.time <= 1.1 * fastest.time]
    return min(fast, key=lambda candidate: (candidate.size, candidate.time))


def _loss(metric: str, before: float, after: float) -> float:
    if _kind(metric) in _ERRORS:
        return (after - before) / (before or 1.0)
    return before - after


def _kind(metric: str) -> str:
    """The kind of a metric, without the name of the output that may stand before it: "each rmse"."""
    return metric.rpartition(" ")[2]


def _finite_or_inf(loss: float) -> float:
    return loss if np.isfinite(loss) else np.inf


def calibrated_ranges(step: onnx.ModelProto, document: ModelDocument, data: TestData) -> Ranges:
    """Steps through some of the test data; returns the largest absolute value that each weight was multiplied by.

    Args:
        step: The graph for single steps, in which no product is hidden in a loop.
        document: Has the model's signature.
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
    # In exported models the batch is the first axis of every state.
    states = {state.name: np.zeros((len(rows), *state.shape), state.dtype) for state in signature.states}
    outputs = [*weights, *(state.next_name for state in signature.states)]
    largest: dict[str, float] = {}
    for t in range(min(_STEPS, int(lengths.max()))):
        now = {name: np.ascontiguousarray(x[:, t : t + 1]) for name, x in inputs.items()}
        results = session.run(outputs, {**now, **states})
        states = dict(zip(states, results[len(weights) :], strict=True))
        for key, numbers in zip(weights.values(), results, strict=False):
            valid = numbers[lengths > t] if len(numbers) == len(rows) else numbers
            largest[key] = max(largest.get(key, 0.0), float(np.abs(valid).max(initial=0)))
    return largest
