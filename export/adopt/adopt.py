"""Adopts a stateful ONNX model that was made elsewhere: finds its states, proves it, writes it, reports the results."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rich.console import Console

from cellserve.export.adopt import reference_loop
from cellserve.export.adopt.graph_analysis import recurrent_inputs
from cellserve.export.adopt.graph_editor import ForeignGraph
from cellserve.export.adopt.report import Adoption, render, show
from cellserve.export.adopt.role_finder import find_roles
from cellserve.export.adopt.runtime_messages import reason
from cellserve.export.adopt.serving_graph import ServableGraph
from cellserve.export.adopt.state_matching import find_pairs
from cellserve.export.adopt.tensor_roles import Context, Flags, InputFlag, OutputFlag, Roles, StateFlag
from cellserve.export.adopt.trial import Trial
from cellserve.export.errors import ExportError, first_line
from cellserve.export.publish import compatibility, repository_writer
from cellserve.export.report.page import REPORT_NAME
from cellserve.export.report.progress import Stages
from cellserve.models.signature import (
    MODEL_NAME,
    Exactness,
    ModelDocument,
    Rollout,
    Signature,
    Task,
    natural_task,
    rollout_misfit,
    task_misfit,
)
from cellserve.service.runtime.batch_invariance import (
    FULL_PLAN,
    QUICK_PLAN,
    CheckPlan,
    NotBatchInvariant,
    compare_runs,
    find_shapes,
)
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.shape_policy import POLICIES

LIBRARIES = ("onnx", "onnxruntime")
TOLERANCE = 1e-5  # parity limit: |ours - theirs| <= TOLERANCE * max(1, |theirs|)
_ROUNDING = 1e-3  # chunks that differ by more than rounding: the model looks at other time steps
_PATIENCE = 120.0  # longest acceptable full proof, in seconds; beyond it a short one is made


@dataclass(frozen=True, slots=True)
class AdoptRequest:
    """Which model to adopt, and what the user says about it."""

    model: Path
    name: str
    models: Path = Path("artifacts")
    version: int | None = None
    states: tuple[StateFlag, ...] = ()
    inputs: tuple[InputFlag, ...] = ()
    outputs: tuple[OutputFlag, ...] = ()
    constants: Mapping[str, str] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    contexts: Mapping[str, Context] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    description: str = ""
    default_output: Literal["last", "all"] = "all"
    rollout: Rollout | None = None
    task: Task | None = None  # None: follows from the outputs
    sample_rate: int | None = None


def adopt(request: AdoptRequest, console: Console) -> Path:
    """Adopts one model; returns the folder that it was written to.

    Raises:
        ExportError: It cannot be served, or needs a flag first; nothing has been written.
    """
    try:
        with Trial() as trial:
            return _adopt(request, console, trial)
    except (ExportError, OSError):
        raise
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            raise ExportError(f"it does not run row by row and step by step: {reason(str(error))}") from None
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ExportError(f"the model cannot be adopted: {told}; please report it with the model") from error


def _adopt(request: AdoptRequest, console: Console, trial: Trial) -> Path:
    repository_writer.check_writable(request.models, request.name, request.version)
    with Stages(console) as progress:
        progress("reading the graph")
        graph = ForeignGraph(request.model)
        graph.fix_dimensions(request.dims)
        constants = {name: graph.freeze_input(name, text) for name, text in request.constants.items()}
        told = {flag.name for flag in request.states} | {flag.name for flag in request.inputs}
        for name in find_pairs(graph.defaults, graph.outputs).keys() | told & {port.name for port in graph.defaults}:
            graph.promote_default_to_input(name)
        flags = Flags(request.inputs, request.states, request.outputs, request.contexts)
        roles = find_roles(graph.inputs, graph.outputs, flags, recurrent_inputs(graph.graph))
        progress("finding its outputs")
        model = ServableGraph(graph, roles, trial)
        _check_flags(request, model.signature)
        progress("comparing with the original graph")
        difference = reference_loop.difference(graph.original, roles, model, constants, trial)
        if not difference <= TOLERANCE:
            raise ExportError(
                f"its results differ by {difference:.1e} from the original graph in a plain loop: check the batch axes "
                f"({_batch_axes(roles)}), or report it with the model as our bug"
            )
        progress("proving that neither batch nor chunks change a bit")
        signature, exactness = _proved(model)
        _check_flags(request, signature)
        runtime = model.open(signature)
        progress("measuring")
        shapes = [(1, 1), (64, 1), (1, 50)] if signature.time_axis else [(1, 1), (64, 1)]
        if signature.predict_only is not None:
            shapes = [(1, 50), (8, 50)]
        timings = {f"{rows}x{steps}": {"ours": runtime.seconds(rows, steps) * 1e6} for rows, steps in shapes}
        document = ModelDocument(
            name=request.name,
            signature=signature.model_copy(update={"default_output": request.default_output}),
            description=request.description,
            labels=request.labels,
            rollout=request.rollout,
            task=request.task or natural_task(signature, request.labels, request.rollout),
            sample_rate=request.sample_rate,
            form="ONNX made elsewhere",
            operators=graph.operators,
            parity={"original": difference, "time_steps": reference_loop.STEPS},
            exactness=exactness,
            timings={"unit": "microseconds a run, 1 thread, by batch x time", **timings},
            provenance=_provenance(request, graph),
        )
        content = model.content(document)
        warning = compatibility.warning(request.models, request.name, document.signature)
        results = Adoption(document, roles, constants, len(content), warning)
        files = {MODEL_NAME: content, REPORT_NAME: render(results).encode()}
        folder = repository_writer.write(request.models, request.name, request.version, files)
    show(console, folder, results)
    return folder


def _batch_axes(roles: Roles) -> str:
    axes = {role.port.name: role.axes.batch for role in roles.inputs}
    axes |= {state.port.name: state.batch_axis for state in roles.states}
    return ", ".join(f"{name}:batch_axis={'none' if axis is None else axis}" for name, axis in axes.items())


def _check_flags(request: AdoptRequest, signature: Signature) -> None:
    """Checks the flags that must fit the outputs; raises ExportError."""
    if request.labels and signature.outputs[0].shape[-1:] != (len(request.labels),):
        raise ExportError(f"{len(request.labels)} labels for an output of shape {list(signature.outputs[0].shape)}")
    misfit = request.rollout and rollout_misfit(signature, request.rollout)
    if misfit:
        raise ExportError(f"--rollout {request.rollout}: {misfit}")
    task = request.task or natural_task(signature, request.labels, request.rollout)
    misfit = task_misfit(task, request.sample_rate, signature, request.labels, request.rollout)
    if misfit:
        raise ExportError(f"--task {task or 'none'}: {misfit}")


def _proved(model: ServableGraph) -> tuple[Signature, Exactness]:
    """Finds how to serve the model so that its bits are always the same; returns the signature and what was proved."""
    told = model.signature
    effort = _effort(model.open(told))
    alone = told.model_copy(update={"batch": told.batch or 1})
    differed: NotBatchInvariant | None = None
    for signature in (told, alone):
        try:
            why = compare_runs([model.open(signature)], effort)
            if signature is not told:
                why += f"; each row in a run of its own, since together {differed}"
            return signature, Exactness(proved=True, why=why)
        except NotBatchInvariant as differs:
            differed = differs
        if signature is told and differed.difference <= _ROUNDING:
            padded = find_shapes([model.open(told)], effort, POLICIES[1:])
            if padded.proved:
                return told, padded.model_copy(update={"why": f"{padded.why}; in {padded.shapes}, since {differed}"})
    assert differed is not None
    if differed.difference <= _ROUNDING:
        return told, Exactness(proved=False, why=f"{differed}: it is run one row and one time step at a time")
    if not told.time_axis:
        raise ExportError(f"rows influence each other, or its numbers are random: {differed}: it cannot be served")
    return _whole_only(model, alone, effort, differed)


def _whole_only(
    model: ServableGraph, alone: Signature, effort: CheckPlan, differed: NotBatchInvariant
) -> tuple[Signature, Exactness]:
    why = f"its results in chunks differ from those in one run (by {differed.difference:.1e}): it looks beyond a step"
    for batch in (model.signature.batch, alone.batch):
        signature = alone.model_copy(update={"batch": batch, "predict_only": why})
        try:
            return signature, Exactness(proved=True, why=compare_runs([model.open(signature)], effort))
        except NotBatchInvariant as differs:
            differed = differs
    return signature, Exactness(proved=False, why=reason(str(differed)))


def _effort(runtime: Runtime) -> CheckPlan:
    rows = 64 if runtime.signature.batch is None else 1
    each = runtime.seconds(rows, 1) / rows
    steps = FULL_PLAN.time * (sum(FULL_PLAN.batches) + max(FULL_PLAN.batches)) + 4 * FULL_PLAN.long * 5
    return FULL_PLAN if each * steps < _PATIENCE else QUICK_PLAN


def _provenance(request: AdoptRequest, graph: ForeignGraph) -> dict[str, str]:
    told = graph.model
    flags = {
        "constants": ", ".join(f"{name}={text}" for name, text in request.constants.items()),
        "states": ", ".join(f"{flag.name}={flag.following}" for flag in request.states),
        "dims": ", ".join(f"{name}={size}" for name, size in request.dims.items()),
        "context": ", ".join(f"{name}={told}" for name, told in request.contexts.items()),
        "producer": f"{told.producer_name} {told.producer_version}".strip(),
    }
    return {
        "source": request.model.name,
        "source_sha256": hashlib.sha256(request.model.read_bytes()).hexdigest(),
        "adopted": datetime.now(UTC).isoformat(timespec="seconds"),
        "opset": str(graph.opset),
        **{name: text for name, text in flags.items() if text},
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }
