"""The data is what its distributors say that it is."""

from __future__ import annotations

import numpy as np

from cellserve.models.datasets import alice, sunspots, vowels


def test_the_vowels_come_in_their_official_split() -> None:
    data = vowels()
    assert (len(data.train.y), len(data.test.y), len(data.labels)) == (270, 370, 9)
    assert data.train.x.shape[2] == data.test.x.shape[2] == 12
    lengths = np.concatenate([data.train.lengths, data.test.lengths])
    assert (lengths.min(), lengths.max()) == (7, 29)
    assert np.bincount(data.train.y).tolist() == [30] * 9
    assert np.bincount(data.test.y).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]  # as the authors give them


def test_padding_is_zero_and_frames_are_not() -> None:
    for part in (vowels().train, vowels().test):
        assert not part.x[~part.valid].any()
        assert part.x[part.valid].any(axis=1).all()


def test_the_sunspots_are_whole_and_in_order() -> None:
    data = sunspots()
    assert (data.year[0], data.month[0], data.number[0]) == (1749, 1, np.float32(58.0))
    months = data.year * 12 + data.month
    assert (np.diff(months) == 1).all()
    assert (data.number >= 0).all()
    assert data.number.max() == np.float32(253.8)  # October 1957, the highest month on record
    assert (data.year[data.number.argmax()], data.month[data.number.argmax()]) == (1957, 10)


def test_the_text_is_whole_and_its_symbols_are_its_characters() -> None:
    data = alice()
    assert data.text.startswith("CHAPTER I\nDown the Rabbit-Hole\nAlice was beginning to get very tired")
    assert data.text.endswith("THE END")
    assert data.text.count("CHAPTER ") == 12
    assert "".join(data.symbols[place] for place in data.encode(data.text)) == data.text
