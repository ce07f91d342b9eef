"""The private parts of other libraries that the export uses are there; a test that fails names library and part."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import pytest

import tests.networks  # noqa: F401  imports TensorFlow quietly

import keras  # isort: skip


def check_parts(library: str, module: str, uses: Mapping[str, Callable[[Any], object]]) -> None:
    """Uses each private part through the module that wraps it; fails with every part that does not work."""
    missing = []
    try:
        private = importlib.import_module(module)
    except (ImportError, AttributeError) as error:
        missing.append(str(error))
    else:
        for part, use in uses.items():
            try:
                works = use(private)
            except Exception as error:
                missing.append(f"{part} ({type(error).__name__}: {error})")
            else:
                if not works:
                    missing.append(f"{part} (changed its meaning)")
    if missing:
        version = importlib.metadata.version(library)
        pytest.fail(f"{library} {version} lacks private parts that {module} uses: {'; '.join(missing)}", pytrace=False)


def test_keras_has_the_private_parts_that_the_export_uses() -> None:
    x = keras.Input((None, 2), name="x")
    layer = keras.layers.LSTM(3)
    model = keras.Model({"x": x}, {"y": layer(x)})
    tensor = keras.ops.zeros((1, 2, 2))

    def casts(private: Any) -> str:
        with private.casts_to_double():
            return str(keras.ops.cast(tensor, "float32").dtype.name)

    check_parts(
        "keras",
        "cellserve.export.keras_model.keras_private",
        {
            "set_keras_mask, get_keras_mask": lambda private: (
                private.set_mask(tensor, "a mask") is None and private.mask_of(tensor) == "a mask"
            ),
            "backend.core.cast": lambda private: casts(private) == "float64",
            "to_snake_case": lambda private: private.default_name(layer) == "lstm",
            "Sequential._functional": lambda private: (
                private.graph_of(keras.Sequential([x, layer])).inputs and private.graph_of(model) is model
            ),
            "Functional._nodes_by_depth": lambda private: (
                private.has_graph(model) and [call.operation for call in private.calls(model)] == [layer]
            ),
            "Node.arguments.fill_in": lambda private: (
                next(private.calls(model)).arguments.fill_in({id(x): 1})[0] == (1,)
            ),
            "Layer._flatten_layers": lambda private: layer in private.all_layers(model, include_self=False),
            "Functional._inputs_struct": lambda private: list(private.input_structure(model)) == ["x"],
            "Functional._outputs_struct": lambda private: list(private.output_structure(model)) == ["y"],
            "KerasTensor._keras_history": lambda private: private.producer(model.outputs[0]) is layer,
            "Layer._call_has_mask_arg": lambda private: (
                private.takes_mask(layer) and not private.takes_mask(keras.layers.Dense(1))
            ),
        },
    )


def test_tf2onnx_and_tensorflow_have_the_private_parts_that_the_export_uses() -> None:
    import tensorflow as tf

    from cellserve.export.onnx_graph.tf2onnx_handlers import HANDLERS, REWRITERS

    spec = tf.TensorSpec([None], "float32", name="x")
    guarded = tf.function(lambda x: tf.where(x > 0, 1 / x, 0 * x)).get_concrete_function(spec)
    graphs = []

    def freeze(private: Any) -> bool:
        graphs.append(private.freeze(guarded))
        return bool(graphs[0].outputs)

    def convert(private: Any) -> bool:
        frozen = graphs[0]
        outputs = [tensor.name for tensor in frozen.outputs]
        graph = frozen.graph.as_graph_def(add_shapes=True)
        model = private.convert_graph(graph, ["x:0"], outputs, 18, HANDLERS, REWRITERS)
        return "Where" in {node.op_type for node in model.graph.node}

    def callback(private: Any) -> bool:
        created: list[str] = []

        def seen(operation: str, inputs: Any, attributes: Any, outputs: Any, op_name: Any, graph: Any = None) -> Any:
            created.append(operation)
            return [tf.zeros_like(each) for each in outputs]

        def cosine(x: Any) -> Any:
            private.add_op_callback(seen)
            try:
                return tf.cos(x)
            finally:
                private.remove_op_callback(seen)

        return float(tf.function(cosine, autograph=False)(tf.constant(0.0))) == 0 and created == ["Cos"]

    check_parts(
        "tensorflow",
        "cellserve.export.onnx_graph.tensorflow_private",
        {"convert_variables_to_constants_v2": freeze, "op_callbacks": callback},
    )
    check_parts("tf2onnx", "cellserve.export.onnx_graph.tf2onnx_private", {"Select.version_9, set_attr": convert})


def test_onnx_has_the_private_part_that_adopting_uses() -> None:
    from tests import foreign

    check_parts(
        "onnx",
        "cellserve.export.adopt.onnx_private",
        {
            "external_data_helper._get_all_tensors": lambda private: (
                {tensor.name for tensor in private.all_tensors(foreign.frames())} == {"W", "V", "U"}
            )
        },
    )
