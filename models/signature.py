"""The signature of a model, and the document in its file: all that models, export and service share.

The export writes the document into the ONNX metadata under `METADATA_KEY`, the service reads it; neither TensorFlow nor
ONNX is needed to do either.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

METADATA_KEY = "cellserve"
FORMAT: Literal[1] = 1
# File names in NAME/VERSION/ of a model repository; the graph for single steps is there if it is faster.
MODEL_NAME, STEP_NAME, MANIFEST_NAME = "model.onnx", "step.onnx", "manifest.json"
Precision = Literal["float32", "float16", "int8"]
Rollout = Literal["probabilities", "logits", "value"]
Task = Literal["forecast", "classify", "text", "audio"]
SAMPLES_BYTES = 64 * 1024  # of a model's samples as JSON, at most
Axis = Annotated[int, Field(ge=0, lt=2**31)]
Shape = Annotated[tuple[Axis, ...], Field(max_length=16)]  # more axes crash ONNX Runtime
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def default_repository() -> Path:
    """The model repository of a command without `--models`: what `CELLSERVE_MODELS` names, or else `artifacts`."""
    return Path(os.environ.get("CELLSERVE_MODELS") or "artifacts")


def checked_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Returns labels unchanged; raises ValueError if one is empty or repeated. Each names one entry of the output."""
    given, before = tuple(labels), set[str]()
    for place, label in enumerate(given, 1):
        if not label:
            raise ValueError(f"label {place} of {len(given)} is empty: each entry of the output needs a name")
        if label in before:
            raise ValueError(f"the label {label!r} is repeated: each entry of the output needs its own name")
        before.add(label)
    return given


def checked_name(name: str) -> str:
    """Returns a model's name unchanged; raises ValueError if it cannot be a folder and a part of URLs."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(
            f"{name!r} is not a model name: 1 to 64 letters, digits, dots, dashes and underscores, "
            f"the first a letter or digit"
        )
    return name


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Frozen):
    """An input or output of the graph: `[batch, time, *shape]`."""

    name: str
    dtype: Literal["float32", "int32", "int64"] = "float32"
    shape: Shape  # one time step: (16,) for [batch, time, 16]
    bounds: tuple[int, int] | None = None  # the smallest and the largest value of an integer input
    masked: float | None = None  # value that the network's mask treats as a missing time step


class StateSpec(_Frozen):
    """A state that the graph takes as `name` and returns as `next_name`: `[batch, *shape]`, batch at `batch_axis`."""

    name: str
    next_name: str
    dtype: Literal["float32", "int32", "int64"] = "float32"
    shape: Shape  # without the batch axis
    batch_axis: Axis = 0

    @property
    def bytes(self) -> int:
        """Bytes of one session's state."""
        return math.prod(self.shape) * int(self.dtype.removeprefix("float").removeprefix("int")) // 8


class Signature(_Frozen):
    """A model's inputs, outputs and states."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    lengths: str | None = "lengths"  # the int32 input [batch] of valid time steps a row, each from 1 to time
    default_output: Literal["last", "all"] = "last"
    # The following are for models that were made elsewhere, or that cannot be stepped.
    time_axis: bool = True  # without it a run is one step: inputs and outputs are [batch, *shape]
    batch: Annotated[int, Field(ge=1, lt=2**31)] | None = None  # rows per run, if the graph fixes them
    predict_only: str | None = None  # why the model cannot be stepped; whole sequences from zeros only
    # The shortest whole sequence: a convolution may need several time steps.
    min_steps: Annotated[int, Field(ge=1, lt=2**31)] = 1

    @model_validator(mode="after")
    def _check_names(self) -> Signature:
        taken = [spec.name for specs in (self.inputs, self.states) for spec in specs]
        returned = [*(spec.name for spec in self.outputs), *(spec.next_name for spec in self.states)]
        if len({*taken}) < len(taken) or len({*returned}) < len(returned):
            raise ValueError("two of its tensors have the same name")
        return self


def labels_misfit(signature: Signature, labels: tuple[str, ...]) -> str | None:
    """The reason why labels cannot be those of the first output's entries; None if they can."""
    shape = signature.outputs[0].shape if signature.outputs else ()
    return None if shape[-1:] == (len(labels),) else f"the output has the shape {list(shape)}"


def rollout_misfit(signature: Signature, rollout: Rollout) -> str | None:
    """The reason why a model's outputs cannot be its next inputs in that way; None if they can."""
    if signature.predict_only is not None:
        return "the model cannot be stepped"
    if len(signature.inputs) != 1 or len(signature.outputs) != 1:
        return "the model must have one input and one output"
    (x,), (y,) = signature.inputs, signature.outputs
    if rollout == "value":
        fits = x.dtype == y.dtype == "float32" and x.shape == y.shape
        return None if fits else f"the output {list(y.shape)} must be of the input's type and shape {list(x.shape)}"
    if x.dtype == "float32" or x.shape or x.bounds is None:
        return "the input must be one integer, with bounds"
    symbols = x.bounds[1] - x.bounds[0] + 1
    if y.dtype != "float32" or y.shape != (symbols,):
        return f"the output {list(y.shape)} must be numbers [{symbols}], one per symbol of the input"
    return None


class Sample(_Frozen):
    """A sequence of the test data."""

    x: list[Any] | dict[str, list[Any]]  # as in `sequences` of `POST /predict`
    label: str | None = None  # its true class


class Layer(_Frozen):
    """A layer of the network, an input or an output, to be drawn."""

    name: str
    label: str  # its type and shape
    kind: Literal["input", "layer", "recurrent", "output"]
    sources: tuple[int, ...] = ()  # the layers before it, by their places in the drawing
    states: tuple[str, ...] = ()  # what it carries from step to step, with shapes


class Exactness(_Frozen):
    """Whether a row's bits were proved independent of batch, chunking, padding and threads."""

    proved: bool
    why: str
    shapes: str = "any shape"  # the shapes of runs for which it was proved: see service/runtime/shape_policy.py


class ModelDocument(_Frozen):
    """What a model file says about itself, as one JSON document."""

    format: Literal[1] = FORMAT
    name: Annotated[str, AfterValidator(checked_name)]
    signature: Signature
    description: str = ""
    labels: tuple[str, ...] | None = None  # names of the entries of the last axis of the output
    # How an output becomes the next input in a rollout: a symbol sampled from a distribution, or the output itself.
    rollout: Rollout | None = None
    task: Task | None = None  # what the model is for
    sample_rate: int | None = None  # samples a second, of an audio model
    samples: tuple[Sample, ...] = ()  # of the test data, at most SAMPLES_BYTES
    drawing: tuple[Layer, ...] = ()  # the network, from its inputs to its outputs
    metrics: dict[str, float] = Field(default_factory=dict)  # on the test data: {"accuracy": 0.98}
    precision: Precision = "float32"  # precision of the weights; inputs, outputs and states stay float32
    form: str = ""  # how time is run over: "LSTM", "Scan", ...
    operators: dict[str, int] = Field(default_factory=dict)  # operator -> how often it is in the graph
    parity: dict[str, Any] = Field(default_factory=dict)  # largest differences from Keras, and the sizes of the test
    exactness: Exactness
    timings: dict[str, Any] = Field(default_factory=dict)  # microseconds per run, by batch x time
    provenance: dict[str, str] = Field(default_factory=dict)  # source digest, library versions, time of the export


def natural_task(signature: Signature, labels: tuple[str, ...] | None, rollout: Rollout | None) -> Task | None:
    """The task that a model is for by its outputs; None if they do not tell."""
    if len(signature.outputs) != 1 or len(signature.outputs[0].shape) > 1:
        return None
    if rollout == "value":
        return "forecast"
    if rollout is None:
        return "classify" if labels else None
    return "text" if labels and _are_characters(labels) else None


def task_misfit(
    task: Task | None,
    sample_rate: int | None,
    signature: Signature,
    labels: tuple[str, ...] | None,
    rollout: Rollout | None,
) -> str | None:
    """The reason why a model cannot be for that task; None if it can."""
    if (sample_rate is None) == (task == "audio"):
        return "an audio model has a sample rate (16000, say), and no other model has one"
    if task is None:
        return None
    if len(signature.outputs) != 1 or len(signature.outputs[0].shape) > 1:
        return "the model must have one output of one axis"
    if task == "forecast" and rollout != "value":
        return "the model's output must be its next input (rollout: value)"
    if task == "text" and (rollout in (None, "value") or not labels or not _are_characters(labels)):
        return "a symbol must be drawn from its output (rollout: probabilities or logits), each label a character"
    if task == "classify" and not labels:
        return "the classes need labels"
    if task == "audio":
        (x, *others) = signature.inputs
        if others or len(x.shape) != 1 or x.dtype != "float32" or signature.predict_only:
            return "the model must be stepped with one input of one axis, the samples of a step"
    return None


def _are_characters(labels: tuple[str, ...]) -> bool:
    return all(len(label) == 1 for label in labels)
