"""ONNX Runtime's messages keep their reason, and lose its status codes and source files."""

from __future__ import annotations

import pytest

from cellserve.export.adopt.runtime_messages import reason

FAIL = "[ONNXRuntimeError] : 1 : FAIL : "
RUNNING = FAIL + "Non-zero status code returned while running {} node. Name:'{}' Status Message: "
FILE = "/onnxruntime_src/onnxruntime/core/providers/cpu/"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            RUNNING.format("Add", "/layer/Add") + FILE + "math/element_wise_ops.h:583 void "
            "onnxruntime::BroadcastIterator::Append(ptrdiff_t, ptrdiff_t) axis == 1 || axis == largest was false. "
            "Attempting to broadcast an axis by a dimension other than 1. 2 by 4\n",
            "Add node '/layer/Add': Attempting to broadcast an axis by a dimension other than 1. 2 by 4",
        ),
        (
            RUNNING.format("Reshape", "") + FILE + "tensor/reshape_helper.h:91 "
            "onnxruntime::ReshapeHelper::ReshapeHelper(const onnxruntime::TensorShape&, onnxruntime::TensorShapeVector&"
            ", bool) input_shape_size == requested_shape_size was false. The input tensor cannot be reshaped to the "
            "requested shape. Input shape:{2,3}, requested shape:{4,5}\n",
            "Reshape node: The input tensor cannot be reshaped to the requested shape. Input shape:{2,3}, requested "
            "shape:{4,5}",
        ),
        (
            RUNNING.format("MatMul", "") + "matmul_helper.h:59 Compute MatMul dimension mismatch",
            "MatMul node: MatMul dimension mismatch",
        ),
        (
            RUNNING.format("LSTM", "") + "Input initial_h must have shape {1,5,4}. Actual:{1,2,4}",
            "LSTM node: Input initial_h must have shape {1,5,4}. Actual:{1,2,4}",
        ),
        (
            '[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model. In Node, ("", Slice, "", -1) : '
            '("x": tensor(float),"s": tensor(int64),) -> ("y": tensor(float),) , Error Node with schema(::Slice:1) has '
            "input size 3 not in range [min=1, max=1].",
            "Slice node: Node with schema(::Slice:1) has input size 3 not in range [min=1, max=1]",
        ),
        (
            '[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model. In Node, ("", Foo, "", -1) : ("x": '
            'tensor(float),) -> ("y": tensor(float),) , Error No Op registered for Foo with domain_version of 17',
            "Foo node: No Op registered for Foo with domain_version of 17",
        ),
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: x for the following "
            "indices\n index: 0 Got: 2 Expected: 1\n Please fix either the inputs/outputs or the model.",
            "Got invalid dimensions for input: x index: 0 Got: 2 Expected: 1",
        ),
        ("", "no reason given"),
    ],
)
def test_a_message_is_its_reason(text: str, wanted: str) -> None:
    assert reason(text) == wanted


def test_a_long_message_is_cut() -> None:
    assert len(reason("shape " * 200)) == 400
