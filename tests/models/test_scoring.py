"""Scores, against ones worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cellserve.models.scoring import evaluate, ngram_bits_per_symbol


def test_a_class_is_judged_by_the_last_valid_output() -> None:
    y_pred = np.zeros((2, 3, 2))
    y_pred[0, 1, 1] = 1  # the last of two
    y_pred[0, 2, 0] = 9  # padding
    y_pred[1, 2, 0] = 1
    data = {"lengths": np.array([2, 3]), "y": np.array([1, 1])}
    assert evaluate(y_pred, data) == {"accuracy": 0.5}


def test_padding_and_zero_weights_do_not_count_in_metrics() -> None:
    y_pred = np.array([[[1.0], [5.0], [9.0]]])
    data = {"lengths": np.array([2]), "y": np.array([[[4.0], [1.0], [0.0]]])}
    assert evaluate(y_pred, data) == {"rmse": pytest.approx(np.sqrt(12.5))}
    assert evaluate(y_pred, {**data, "weight": np.array([[0, 1, 1]])}) == {"rmse": pytest.approx(4)}


def test_classes_of_every_time_step_are_judged_by_their_probabilities_in_bits() -> None:
    y_pred = np.array([[[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]])
    data = {"lengths": np.array([2]), "y": np.array([[1, 0, 1]])}
    assert evaluate(y_pred, data) == {"bits": pytest.approx(1.5)}


def test_n_grams_mix_in_shorter_ones_where_they_have_seen_little() -> None:
    # Of 5 symbols of 2 kinds two were 1, and after 0 came 1 alone, twice.
    seen, told = np.array([0, 1, 0, 1, 0]), np.array([0, 1])
    assert ngram_bits_per_symbol(seen, told, 2, order=1) == pytest.approx(-np.log2((2 + 2 / 2) / 7))
    assert ngram_bits_per_symbol(seen, told, 2, order=2) == pytest.approx(-np.log2((2 + 1 * 3 / 7) / 3))


def test_a_shape_that_cannot_be_scored_is_named() -> None:
    with pytest.raises(ValueError, match=r"y has shape \[1, 2\]"):
        evaluate(np.zeros((1, 3, 1)), {"lengths": np.array([3]), "y": np.zeros((1, 2))})
