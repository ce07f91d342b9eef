"""The real data of the example networks, read from the package's `data/` folder.

Nothing here needs TensorFlow. `data/README.md` has the source and licence of each file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

DATA = Path(__file__).parent / "data"

# A year and the months seen of it. The header, rules, blank lines and the notes below the table begin otherwise.
_YEAR_LINE = re.compile(r"(\d{4})((?:\s+\d+\.\d+){1,12})\s*")


@dataclass(frozen=True, slots=True)
class Utterances:
    """Labelled sequences of unequal lengths, padded with zeros on the right."""

    x: npt.NDArray[np.float32]  # [n, time, 12] LPC cepstrum coefficients, no unit
    lengths: npt.NDArray[np.int32]  # [n] valid frames, each from 1 to time
    y: npt.NDArray[np.int32]  # [n] index into the labels

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """True for frames, false for padding: `[n, time]`."""
        return np.arange(self.x.shape[1]) < self.lengths[:, None]


@dataclass(frozen=True, slots=True)
class Vowels:
    """The Japanese Vowels in their official split, with the names of the nine classes."""

    train: Utterances
    test: Utterances
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sunspots:
    """Monthly mean sunspot numbers without a gap, in order."""

    number: npt.NDArray[np.float32]  # [months] the international sunspot number, 0 and more
    year: npt.NDArray[np.int32]  # [months]
    month: npt.NDArray[np.int32]  # [months] 1 to 12


@dataclass(frozen=True, slots=True)
class Text:
    """A text, and the characters that stand in it, in the order of their code points."""

    text: str
    symbols: tuple[str, ...]

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Index in `symbols` of each character of a text."""
        places = {symbol: place for place, symbol in enumerate(self.symbols)}
        return np.array([places[symbol] for symbol in text], np.int32)


def vowels() -> Vowels:
    """Reads the Japanese Vowels: 270 utterances to train on and 370 to test on, 7 to 29 frames of 12 numbers each.

    Raises:
        ValueError: A file is not in the `.ts` format that the `aeon` project describes.

    Source: M. Kudo, J. Toyama, M. Shimbo, Multidimensional Curve Classification Using Passing-Through Regions,
    Pattern Recognition Letters 20 (1999).
    """
    train, names = _read_ts(DATA / "JapaneseVowels_TRAIN.ts")
    test, test_names = _read_ts(DATA / "JapaneseVowels_TEST.ts")
    if names != test_names:
        raise ValueError(f"the two halves of the Japanese Vowels name their classes differently: {names}, {test_names}")
    return Vowels(train, test, tuple(f"speaker {name}" for name in names))


def sunspots() -> Sunspots:
    """Reads the monthly mean sunspot numbers from January 1749 on; the last year ends with its last observed month.

    Raises:
        ValueError: A month is missing.

    Source: NOAA National Geophysical Data Center.
    """
    matches = [_YEAR_LINE.fullmatch(line) for line in (DATA / "sunspots_monthly.dat").read_text("ascii").splitlines()]
    years = [(int(match[1]), match[2].split()) for match in matches if match]
    first = years[0][0]
    number = np.array([value for _, values in years for value in values], np.float32)
    year, month = np.divmod(np.arange(len(number), dtype=np.int32), 12)
    if [of for of, _ in years] != list(range(first, first + len(years))) or any(len(v) < 12 for _, v in years[:-1]):
        raise ValueError("sunspots_monthly.dat: a month is missing before the last one")
    return Sunspots(number, (year + first).astype(np.int32), (month + 1).astype(np.int32))


def alice() -> Text:
    """Reads *Alice's Adventures in Wonderland* (Lewis Carroll, 1865): a paragraph a line, one space between words."""
    raw = (DATA / "alice.txt").read_text("ascii").rstrip("\x1a\n")
    story = raw[raw.index("CHAPTER I") :]
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", story))
    text = "\n".join(paragraphs)
    return Text(text, tuple(sorted(set(text))))


def _read_ts(path: Path) -> tuple[Utterances, list[str]]:
    """Reads a `.ts` file: a line an utterance, dimensions separated by colons, values by commas, the label last."""
    header, _, body = path.read_text("ascii").partition("@data\n")
    declared = re.search(r"^@classLabel true (.+)$", header, re.MULTILINE)
    if declared is None or not body:
        raise ValueError(f"{path.name}: no '@classLabel true ...' followed by '@data'")
    names = declared[1].split()
    rows = [line.rsplit(":", 1) for line in body.splitlines()]
    series = [np.array([values.split(",") for values in row.split(":")], np.float32).T for row, _ in rows]
    lengths = np.array([len(one) for one in series], np.int32)
    x = np.zeros((len(series), int(lengths.max()), series[0].shape[1]), np.float32)
    for padded, one in zip(x, series, strict=True):
        padded[: len(one)] = one
    return Utterances(x, lengths, np.array([names.index(label) for _, label in rows], np.int32)), names
