"""Networks whose structure no session can have: refused for the true reason, and what to do instead works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.export.proving import Proof

import keras  # isort: skip  after TensorFlow has been imported quietly
from keras import layers  # isort: skip

from cellserve.export.errors import ExportError
from cellserve.export.exporter import network_of


def sequential(shape: tuple[int | None, ...], *inner: Any) -> Any:
    return keras.Sequential([keras.Input(shape, name="x"), *inner])


def decoder(states: Callable[[Any], Any] = lambda given: given) -> Any:
    """Keras's usual decoder for one sequence after another: states go in and out."""
    x, h, c = keras.Input((None, 5)), keras.Input((8,), name="h0"), keras.Input((8,), name="c0")
    initial = [states(h), states(c)]
    y, *after = layers.LSTM(8, name="rec", return_sequences=True, return_state=True)(x, initial_state=initial)
    return keras.Model([x, h, c], [y, *after])


def translator(between: Callable[[Any], Any] = lambda given: given) -> Any:
    """An encoder, whose last states the decoder starts from."""
    source, target = keras.Input((None, 5), name="source"), keras.Input((None, 4), name="target")
    _, h, c = layers.LSTM(8, return_state=True, name="encoder")(source)
    y = layers.LSTM(8, return_sequences=True, name="decoder")(target, initial_state=[between(h), between(c)])
    return keras.Model([source, target], layers.Dense(3, name="out")(y))


def nested() -> Any:
    source, target = keras.Input((None, 5)), keras.Input((None, 4))
    return keras.Model([source, target], translator()([source, target]))


APART = "layer 'decoder' (LSTM) starts from the states of layer 'encoder' (LSTM): export the two as networks of their"
VECTOR = "the input 'x' has no time axis, layer 'first' "

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing recurrent": (lambda: sequential((12,), layers.Dense(3)), "the network has no recurrent layer"),
    "features": (
        lambda: sequential((12,), layers.Dense(8, name="first"), layers.Reshape((1, 8)), layers.LSTM(2)),
        f"{VECTOR}(Dense) takes its 12 numbers as features: declare it as keras.Input((None, 12))",
    ),
    "a vector": (
        lambda: sequential((12,), layers.Reshape((4, 3), name="first"), layers.LSTM(2)),
        f"{VECTOR}(Reshape) makes time steps of its 12 numbers",
    ),
    "a vector repeated": (
        lambda: sequential((12,), layers.RepeatVector(4, name="first"), layers.LSTM(2)),
        f"{VECTOR}(RepeatVector) makes time steps of its 12 numbers",
    ),
    "states as inputs": (decoder, "layer 'rec' (LSTM) starts from the input 'h0' (initial_state): leave that input"),
    "states computed": (lambda: decoder(layers.Dense(8)), "layer 'rec' (LSTM) starts from the input 'h0'"),
    "an encoder": (translator, APART),
    "an encoder with a bridge": (lambda: translator(layers.Dense(8)), APART),
    "an encoder in a model within": (nested, APART),
    "time as features": (
        lambda: sequential((10, 4), layers.Permute((2, 1), name="swap"), layers.LSTM(4)),
        "works for 10 time steps and no other number: leave out what makes features of time steps",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_for_the_true_reason(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(ExportError) as refused:
        network_of(make())
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_integers_and_single_numbers_over_time_are_no_vectors() -> None:
    """An input of a fixed number of steps without features stays what it is."""
    ids = sequential((12,), layers.Embedding(20, 8), layers.LSTM(2))
    assert network_of(ids).signature.inputs[0].shape == ()
    x = keras.Input((12,))
    series = keras.Model(x, layers.LSTM(2)(keras.ops.expand_dims(x, -1)))
    assert network_of(series).signature.inputs[0].shape == ()


def test_an_encoder_and_a_decoder_taken_apart_as_the_docs_say_give_keras_numbers() -> None:
    keras.utils.set_random_seed(1)
    model = translator()
    names: dict[str, Any] = {"model": model}
    text = (Path(__file__).parent.parent.parent / "docs/explanation/export.md").read_text()
    (example,) = re.findall(r"```python\n# apart.py\n(.*?)```", text, re.S)
    exec(example, names)
    first, second = (next(iter(Proof(names[name], most=1).forms.values())) for name in ("encoder", "decoder"))
    rng = np.random.default_rng(0)
    source = rng.normal(size=(3, 7, 5)).astype(np.float32)
    target = rng.normal(size=(3, 6, 4)).astype(np.float32)
    _, states = first.run(source, np.full(3, 7, np.int32), first.zeros(3))
    y, _ = second.run(target, np.full(3, 6, np.int32), states)
    np.testing.assert_allclose(y, model.predict([source, target], verbose=0), rtol=1e-5, atol=1e-5)
