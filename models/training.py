"""Trains the example networks on real data, from a fixed seed, and writes them with their cards and test data.

`NAME.keras` is the network, `NAME.card.json` its description, labels and test metrics, `NAME.npz` the test data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from cellserve.models import datasets
from cellserve.models.networks import character_network, speaker_network, sunspot_network
from cellserve.models.scoring import evaluate, ngram_bits_per_symbol, rmse

Array = NDArray[Any]
Progress = Callable[[int, int, str], None]  # (epochs done, epochs in all, latest loss)

SEED = 2021
FIRST_TEST_YEAR = 1980
VALIDATION_YEARS = 25  # the last years before the test


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained network, its card, and its test data."""

    network: Any
    card: dict[str, Any]  # description, labels, default_output, rollout, metrics, seed
    # x [n, time, features], lengths [n], y; weight [n, time] if some time steps do not count
    test: dict[str, Array] = field(repr=False)


def train(name: str, progress: Progress) -> Trained:
    """Trains one of `EXAMPLES`; results are reproducible on one kind of machine.

    Raises:
        KeyError: There is no example of that name.
    """
    trainer = EXAMPLES[name]
    keras.utils.clear_session()
    keras.utils.set_random_seed(SEED)
    tf.config.experimental.enable_op_determinism()
    return trainer(progress)


def save(trained: Trained, folder: Path, name: str) -> Path:
    """Writes the network and the files beside it; the network last and atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.card.json").write_text(json.dumps(trained.card, indent=2) + "\n")
    np.savez_compressed(folder / f"{name}.npz", allow_pickle=False, **trained.test)
    draft, network = folder / f".{name}.draft.keras", folder / f"{name}.keras"
    trained.network.save(draft)
    draft.replace(network)
    return network


def train_vowels(progress: Progress) -> Trained:
    """Trains `vowels`: which of nine speakers uttered these frames.

    Width, noise, dropout and the number of epochs were chosen by three-fold cross-validation within the training split
    (97.4 %); with them the network is fitted to all of it. The test split is scored once, at the end.
    """
    data = datasets.vowels()
    train, test = data.train, data.test
    network = speaker_network(train.x[train.valid], len(data.labels))
    time = train.x.shape[1]
    wanted = np.repeat(train.y[:, None], time, axis=1)
    # An utterance counts as one however long it is; its later frames, which have heard more, count more.
    weight = train.valid * np.arange(1, time + 1) ** 2
    weight = (weight / weight.sum(axis=1, keepdims=True) * time).astype(np.float32)
    loss = keras.losses.SparseCategoricalCrossentropy()
    _fit(network, loss, (train.x, wanted, weight), None, Schedule(epochs=100, batch=16), progress)
    scored = {"x": test.x, "lengths": test.lengths, "y": test.y}
    card = {
        "description": "which of nine speakers uttered these frames (LSTM; 12 LPC cepstrum coefficients a frame)",
        "labels": list(data.labels),
        "default_output": "last",
        "metrics": evaluate(network.predict(test.x, verbose=0), scored),
        "seed": SEED,
    }
    return Trained(network, card, scored)


def train_sunspots(progress: Progress, feedback: str = "hidden") -> Trained:
    """Trains `sunspots`: next month's mean sunspot number, predicted after every month.

    The test runs through the months from 1749 on, and counts the predictions from 1980 on.
    """
    data = datasets.sunspots()
    x, wanted = data.number[:-1], data.number[1:]
    of_test = data.year[1:] >= FIRST_TEST_YEAR
    of_validation = ~of_test & (data.year[1:] >= FIRST_TEST_YEAR - VALIDATION_YEARS)
    known = x[~of_test]
    network = sunspot_network(known, feedback)
    # Windows with a warm-up that does not count, as the network is in service: states are never cold for long.
    window, warm = 120, 24
    starts = np.arange(0, int((~of_test & ~of_validation).sum()) - window + 1, 12)
    rows = starts[:, None] + np.arange(window)
    weight = np.tile((np.arange(window) >= warm).astype(np.float32), (len(starts), 1))
    spread = float(known.std())
    validation = (
        x[None, ~of_test, None],
        wanted[None, ~of_test, None],
        of_validation[None, ~of_test].astype(np.float32),
    )

    def loss(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean(keras.ops.square((y_true - y_pred) / spread), axis=-1)

    fitted = (x[rows][..., None], wanted[rows][..., None], weight)
    _fit(network, loss, fitted, validation, Schedule(epochs=60, batch=32), progress)
    test = {
        "x": x[None, :, None],
        "lengths": np.array([len(x)], np.int32),
        "y": wanted[None, :, None],
        "weight": of_test[None].astype(np.float32),
    }
    # The mean of the 12 months before each month, from the 13th month on.
    year_before = np.convolve(data.number, np.full(12, 1 / 12), "valid")[:-1]
    card = {
        "description": f"next month's mean sunspot number, said after every month (RNN, {feedback} fed back)",
        "default_output": "all",
        "rollout": "value",
        "metrics": {
            **evaluate(network.predict(test["x"], verbose=0), test),
            "rmse_persistence": rmse(x[of_test], wanted[of_test]),
            "rmse_moving_average_12": rmse(year_before[of_test[11:]], wanted[of_test]),
        },
        "seed": SEED,
    }
    return Trained(network, card, test)


def train_sunspots_jordan(progress: Progress) -> Trained:
    """Trains `sunspots-jordan`: the same with the output fed back."""
    return train_sunspots(progress, feedback="output")


def train_characters(progress: Progress) -> Trained:
    """Trains `characters`: the next character of a text, predicted after every character.

    The last tenth of the text is the test. Rate and window were chosen for the best result of a minute's training.
    """
    data = datasets.alice()
    symbols = data.encode(data.text)
    test_start = int(len(symbols) * 0.9)
    train, test = symbols[:test_start], symbols[test_start:]
    network = character_network(len(data.symbols))
    window = 40
    rows = np.arange(0, len(train) - window, window)[:, None] + np.arange(window)
    fitted = train[rows], train[rows + 1], np.ones(rows.shape, np.float32)
    loss = keras.losses.SparseCategoricalCrossentropy()
    _fit(network, loss, fitted, None, Schedule(epochs=12, batch=32, rate=1.5e-2), progress)
    scored = {"x": test[None, :-1], "lengths": np.array([len(test) - 1], np.int32), "y": test[None, 1:]}
    card = {
        "description": "the next character of a text, as probabilities (two LSTMs, Alice's Adventures in Wonderland)",
        "labels": list(data.symbols),
        "default_output": "last",
        "rollout": "probabilities",
        "metrics": {
            **evaluate(network.predict(scored["x"], verbose=0), scored),
            "bits_5_grams": ngram_bits_per_symbol(train, test, len(data.symbols)),
        },
        "seed": SEED,
    }
    return Trained(network, card, scored)


EXAMPLES: dict[str, Callable[[Progress], Trained]] = {
    "sunspots": train_sunspots,
    "vowels": train_vowels,
    "sunspots-jordan": train_sunspots_jordan,
    "characters": train_characters,
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train."""

    epochs: int
    batch: int
    rate: float = 3e-3  # learning rate at the start


class _ProgressLogger(keras.callbacks.Callback):
    def __init__(self, epochs: int, progress: Progress) -> None:
        super().__init__()
        self._epochs, self._progress = epochs, progress

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        figure = f"validation loss {logs['val_loss']:.4f}" if "val_loss" in logs else f"loss {logs['loss']:.4f}"
        self._progress(epoch + 1, self._epochs, figure)


def _fit(
    network: Any,
    loss: Any,
    fitted: tuple[Array, Array, Array],
    validation: tuple[Array, Array, Array] | None,
    schedule: Schedule,
    progress: Progress,
) -> None:
    """Fits with a learning rate that falls to zero; with validation data, keeps the weights of the best epoch."""
    epochs, batch = schedule.epochs, schedule.batch
    steps = epochs * -(-len(fitted[0]) // batch)
    rate = keras.optimizers.schedules.CosineDecay(schedule.rate, steps)
    network.compile(keras.optimizers.Adam(rate, clipnorm=1.0), loss=loss)
    callbacks = [_ProgressLogger(epochs, progress)]
    if validation:
        callbacks.append(keras.callbacks.EarlyStopping(patience=epochs, restore_best_weights=True))
    x, y, weight = fitted
    network.fit(x, y, batch, epochs, sample_weight=weight, validation_data=validation, verbose=0, callbacks=callbacks)
