"""`cellserve train`, and that what it makes comes out the same again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cellserve.models import training_cli


@pytest.mark.long
def test_training_again_gives_the_same_weights_and_keeps_the_promised_error(tmp_path: Path) -> None:
    assert training_cli.main(["sunspots", "--folder", str(tmp_path)]) == 0
    assert training_cli.main(["sunspots", "--folder", str(tmp_path / "again")]) == 0
    import keras

    once, again = (
        keras.saving.load_model(folder / "sunspots.keras", compile=False).get_weights()
        for folder in (tmp_path, tmp_path / "again")
    )
    for one, other in zip(once, again, strict=True):
        np.testing.assert_array_equal(one, other)
    metrics = json.loads((tmp_path / "sunspots.card.json").read_text())["metrics"]
    assert metrics["rmse"] < metrics["rmse_persistence"]
    assert metrics["rmse"] < metrics["rmse_moving_average_12"]


def test_the_examples_are_those_that_can_be_trained() -> None:
    from cellserve.models.training import EXAMPLES

    assert tuple(EXAMPLES) == training_cli.EXAMPLES


def test_an_unknown_example_is_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert training_cli.main(["vowel"]) == 2
    assert capsys.readouterr().err == (
        "cellserve train: no example 'vowel': one of sunspots, vowels, sunspots-jordan, characters\n"
    )
