"""The example networks: Keras models built from our cells, with their normalisation inside."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers
from numpy.typing import NDArray

from cellserve.models.cells import LSTMCell, RNNCell

Array = NDArray[Any]


def speaker_network(frames: Array, speakers: int, units: int = 128) -> Any:
    """Network that predicts after every frame who speaks, as probabilities.

    It is causal and needs no mask: sequences are padded on the right, where padding changes nothing before it.

    Args:
        frames: `[n, features]`, valid frames of the training data, to normalise by.
        speakers: Number of speakers.
        units: Width of the LSTM.
    """
    normalise = layers.Normalization(name="normalise")
    normalise.adapt(frames)
    return keras.Sequential(
        [
            keras.Input((None, frames.shape[-1]), name="x"),
            normalise,
            layers.GaussianNoise(0.8, name="noise"),  # it and dropout act in training only
            layers.SpatialDropout1D(0.2, name="missing"),
            layers.RNN(LSTMCell(units), return_sequences=True, name="lstm"),
            layers.Dropout(0.5, name="dropout"),
            layers.Dense(speakers, activation="softmax", name="speaker"),
        ],
        name="vowels",
    )


def sunspot_network(months: Array, feedback: str, units: int = 32) -> Any:
    """Network that predicts after every month the next month's number.

    The change from the latest number is learned; number and prediction are both in the unit of the data.

    Args:
        months: `[n]`, the training data, to normalise by.
        feedback: The `RNNCell`'s feedback.
        units: Width of the cell.
    """
    mean, deviation = float(months.mean()), float(months.std())
    number = keras.Input((None, 1), name="x")
    x = layers.Rescaling(1 / deviation, -mean / deviation, name="normalise")(number)
    y = layers.RNN(RNNCell(units, feedback=feedback), return_sequences=True, name="rnn")(x)
    change = layers.Dense(1, kernel_initializer="zeros", name="change")(y)
    change = layers.Rescaling(deviation, name="denormalise")(change)
    return keras.Model(number, layers.Add(name="next")([number, change]), name="sunspots")


def character_network(symbols: int, units: int = 128) -> Any:
    """Network that predicts after every character the probability of each next one.

    Args:
        symbols: Number of characters; the input is the index of one.
        units: Width of each of the two LSTMs.
    """
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="x"),
            layers.Embedding(symbols, units // 2, name="embedding"),
            layers.RNN(layers.StackedRNNCells([LSTMCell(units), LSTMCell(units)]), return_sequences=True, name="lstm"),
            layers.Dropout(0.2, name="dropout"),
            layers.Dense(symbols, activation="softmax", name="next"),
        ],
        name="characters",
    )
