"""The samples of the test data that a model file gets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cellserve.export.publish.samples import samples_of
from cellserve.export.verify.evaluation import TestData
from cellserve.models.signature import SAMPLES_BYTES, Signature, TensorSpec


def data(folder: Path, inputs: tuple[TensorSpec, ...], **arrays: np.ndarray) -> TestData:
    file = folder / "test.npz"
    np.savez(file, allow_pickle=False, **arrays)
    signature = Signature(inputs=inputs, outputs=(TensorSpec(name="y", shape=(2,)),), states=())
    network: Any = SimpleNamespace(signature=signature)
    return TestData(network, file)


def test_classes_take_turns_and_padding_is_left_out(tmp_path: Path) -> None:
    x = np.arange(5 * 3, dtype=np.float32).reshape(5, 3, 1) + np.float32(0.1)
    lengths, y = np.array([1, 2, 3, 3, 3]), np.array([1, 1, 1, 0, 0])
    samples = samples_of(data(tmp_path, (TensorSpec(name="x", shape=(1,)),), x=x, lengths=lengths, y=y), ("no", "yes"))
    assert [sample.label for sample in samples] == ["no", "yes", "no", "yes", "yes"]
    assert samples[1].x == [[0.1]]  # the digits of float32, and no padding
    assert samples[0].x == [[9.1], [10.1], [11.1]]


def test_the_end_of_a_long_sequence_is_taken_and_what_is_not_finite_left_out(tmp_path: Path) -> None:
    x = np.arange(2 * 5000, dtype=np.float32).reshape(2, 5000, 1)
    x[0, 7] = np.nan
    (sample,) = samples_of(
        data(tmp_path, (TensorSpec(name="x", shape=(1,)),), x=x, lengths=np.full(2, 5000), y=x), labels=None
    )
    assert isinstance(sample.x, list)
    assert (len(sample.x), sample.x[-1], sample.label) == (600, [9999.0], None)


@pytest.mark.parametrize(("width", "fewest"), [(50, 2), (2000, 1), (20_000, 0)])
def test_samples_are_cut_until_they_fit(tmp_path: Path, width: int, fewest: int) -> None:
    x = np.full((3, 40, width), 1 / 3, np.float32)
    specs = (TensorSpec(name="a", shape=(width,)), TensorSpec(name="b", dtype="int32", shape=()))
    symbols = np.zeros((3, 40), np.int32)
    samples = samples_of(data(tmp_path, specs, a=x, b=symbols, lengths=np.full(3, 40), y=np.zeros(3, int)), None)
    assert len(samples) >= fewest
    assert sum(len(sample.model_dump_json()) for sample in samples) <= SAMPLES_BYTES
    assert all(isinstance(sample.x, dict) and len(sample.x["a"]) == len(sample.x["b"]) for sample in samples)
