"""A model: one version of it, opened and ready to run."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from cellserve.models.signature import Exactness, ModelDocument, natural_task
from cellserve.service.errors import CannotBeStepped
from cellserve.service.runtime.batch_invariance import QUICK_PLAN, find_shapes
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.shape_policy import ANY_SHAPE, policies_from
from cellserve.service.runtime.tensor_layout import TensorLayout
from cellserve.service.validation.json_input import TensorDecoder

VERSION_NUMBER = r"[1-9][0-9]{0,8}"  # the name of a version's folder


class VersionKey(NamedTuple):
    """The name of a model version, written `NAME:VERSION`."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"

    @classmethod
    def parse(cls, text: str) -> VersionKey | None:
        """Parses `NAME:VERSION`; returns None if the text has another form."""
        name, _, number = text.rpartition(":")
        return cls(name, int(number)) if name and re.fullmatch(VERSION_NUMBER, number) else None


class Model:
    """One version of a model, opened and ready to run.

    Args:
        name: The name of its folder.
        version: The number of its folder.
        digest: SHA-256 of its model file; sessions are bound to it.
        runtime: Runs it.
        max_batch: Rows of its largest run.
        off_cpu: The largest difference of its results from those on the CPU; None if that is where it runs.
    """

    def __init__(
        self, name: str, version: int, digest: str, runtime: Runtime, max_batch: int, off_cpu: float | None = None
    ) -> None:
        self.off_cpu = off_cpu
        self.name, self.version, self.digest, self.runtime = name, version, digest, runtime
        self.reader = TensorDecoder(runtime.signature)
        self.inputs, self.outputs = TensorLayout(runtime.signature.inputs), TensorLayout(runtime.signature.outputs)
        # Kernels differ between processors: batch invariance, checked at the export, is checked again where it runs.
        self.exactness: Exactness = self.document.exactness
        if self.exactness.proved:
            policies = policies_from(self.exactness.shapes)
            self.exactness = find_shapes([runtime], QUICK_PLAN.up_to(max_batch), policies)
        self.bits_may_differ = not self.exactness.proved and runtime.options.when_inexact == "batch"
        self.runs_batches = self.exactness.proved or self.bits_may_differ

    @property
    def key(self) -> VersionKey:
        """Its name and version."""
        return VersionKey(self.name, self.version)

    def check_steppable(self) -> None:
        """Raises CannotBeStepped if the model takes whole sequences only."""
        why = self.runtime.signature.predict_only
        if why is not None:
            raise CannotBeStepped(
                f"model {self.name!r} cannot be stepped, so it has no sessions: {why}: "
                f"send whole sequences to POST /predict"
            )

    @property
    def document(self) -> ModelDocument:
        """The model's description of itself, from its file."""
        return self.runtime.document

    def described(self) -> dict[str, Any]:
        """Returns everything that is known of it, for JSON."""
        document = self.document
        return {
            "name": self.name,
            "version": self.version,
            **document.model_dump(mode="json", exclude={"format", "name", "exactness"}),
            # Files of earlier exports do not say it.
            "task": document.task or natural_task(document.signature, document.labels, document.rollout),
            "digest": self.digest,
            "exact": self.exactness.proved,
            "exactness": self.exactness.why,
            "shapes": ANY_SHAPE.name if self.bits_may_differ else self.exactness.shapes,
            "bits_may_differ": self.bits_may_differ,
            "provider": self.runtime.provider,
            "arithmetic": self.runtime.options.arithmetic(self.runtime.provider),
            "off_cpu": self.off_cpu,
            "state_memory": "host" if self.runtime.on_device is None else "device",
        }
