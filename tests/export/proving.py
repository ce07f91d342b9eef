"""Proves every form of a network, as the export does, without the measuring that takes it its seconds."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from cellserve.export.candidates.candidates import build, open_model, operator_choices, reference_of
from cellserve.export.exporter import network_of
from cellserve.export.keras_model.load import load
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.sequence_network import SequenceNetwork
from cellserve.export.verify.parity import Parity
from cellserve.models.signature import Exactness, ModelDocument
from cellserve.service.runtime.batch_invariance import QUICK_PLAN, check_batch_invariance
from cellserve.service.runtime.onnx_model import Runtime


class Proof:
    """A network saved, loaded and built in its forms, each to be compared with Keras and with itself.

    Args:
        model: A Keras model.
        most: Forms to build: with more, the first (every operator there is) and the last (none).
    """

    def __init__(self, model: Any, most: int = 4) -> None:
        path = Path(tempfile.mkdtemp(prefix="cellserve-test-")) / "mine.keras"
        model.save(path)
        self.keras = model
        self.network: StatefulNetwork | SequenceNetwork = network_of(load(path))
        self.signature = self.network.signature
        document = ModelDocument(name="mine", signature=self.signature, exactness=Exactness(proved=False, why=""))
        self.forms: dict[str, Runtime] = {}
        self.operators: dict[str, set[str]] = {}
        chosen = list(operator_choices(self.network))
        for name, operators in chosen if len(chosen) <= most else (chosen[0], chosen[-1]):
            model, step = build(self.network, self.signature, operators)
            self.operators[name] = {node.op_type for node in model.graph.node}
            for label, each in ((name, None), (f"{name}, single steps", step)):
                if each is not None or label == name:
                    self.forms[label] = open_model(model, each, document)

    @functools.cached_property
    def parity(self) -> dict[str, Parity]:
        """How far each form is from Keras, whose many runs take most of a proof's time."""
        reference = reference_of(self.network)
        return {name: reference.compare(runtime) for name, runtime in self.forms.items()}

    def check(self) -> None:
        """Fails where a form differs from Keras, or a row's bits depend on what it is computed with."""
        for name, runtime in self.forms.items():
            assert not self.parity[name].failed, name
            exactness = check_batch_invariance([runtime], QUICK_PLAN)
            assert exactness.proved, (name, exactness.why)
