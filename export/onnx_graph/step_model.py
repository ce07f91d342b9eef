"""Assembles the graph of single steps, which may accompany the graph over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph import masking
from cellserve.export.onnx_graph.operators import Lowering
from cellserve.export.onnx_graph.scan_model import ExcludedRecurrence, ScanModelBuilder
from cellserve.export.onnx_graph.tf_trace import StepGraph
from cellserve.models.signature import Signature


class StepModelBuilder(ScanModelBuilder):
    """Builds the model of single steps: no loop, no lengths, every tensor `[batch, ...]`.

    Args:
        network: The network.
        step: Its step, traced around the recurrences that have a lowering.
        lowerings: The lowering of each recurrence, or None if the step includes it.
        signature: The model's signature.
    """

    def __init__(
        self,
        network: StatefulNetwork,
        step: StepGraph,
        lowerings: Sequence[Lowering | None],
        signature: Signature,
    ) -> None:
        super().__init__(network, step, lowerings, signature)
        self.loops = {}
        self.lengths = ""
        self.flat.update(self.state_names)

    def model(self) -> onnx.ModelProto:
        """Returns the model."""
        column = self.main.constant(np.array([1]))
        for spec, tensor in zip(self.signature.inputs, self.step.inputs, strict=True):
            self.flat[tensor] = self.main.node("Squeeze", spec.name, column)
        return self._finished()

    def _emit_outputs(self) -> None:
        column = self.main.constant(np.array([1]))
        for spec, tensor in zip(self.signature.outputs, self.step.outputs, strict=True):
            self.main.nodes.append(helper.make_node("Unsqueeze", [self._flat(tensor), column], [spec.name]))

    def _emit_masked(self, excluded: ExcludedRecurrence, run: masking.Run, x: str, mask: str) -> tuple[str, list[str]]:
        return masking.one_step(self.main, excluded.recurrence, run, masking.Masked(x, mask, excluded.states))

    def _at_lengths(self, tensor: str) -> str:
        return self._flat(tensor)

    def _timed(self, tensor: str) -> str:
        if tensor in self.excluded:
            return super()._timed(tensor)
        return str(self.main.node("Unsqueeze", self._flat(tensor), self.main.constant(np.array([0]))))

    def _flat(self, tensor: str) -> str:
        if tensor in self.excluded and tensor not in self.flat:
            self.flat[tensor] = self.main.node("Squeeze", self._timed(tensor), self.main.constant(np.array([0])))
        return super()._flat(tensor)
