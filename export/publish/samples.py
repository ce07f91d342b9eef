"""Samples of the test data for the model file, with which people try the model on the server's page."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from cellserve.export.verify.evaluation import TestData
from cellserve.models.signature import SAMPLES_BYTES, Sample
from cellserve.service.runtime.batch_invariance import Array

_MOST = 24  # samples
_LONGEST = 600  # time steps; of a longer sequence the last ones are taken


def samples_of(data: TestData, labels: tuple[str, ...] | None) -> tuple[Sample, ...]:
    """Returns some sequences of the test data, as many of each class as of another, within `SAMPLES_BYTES`."""
    classes = _classes(data) if labels else None
    places = range(len(data.lengths)) if classes is None else _in_turn(classes)
    finite = [place for place in places if all(np.isfinite(x[place, : data.lengths[place]]).all() for x in data.inputs)]
    longest = _LONGEST
    while longest:
        taken: list[Sample] = []
        size = 2
        for place in finite:
            sample = _sample(data, place, longest, labels[classes[place]] if labels and classes is not None else None)
            size += len(sample.model_dump_json()) + 1
            if size > SAMPLES_BYTES or len(taken) == _MOST:
                break
            taken.append(sample)
        if taken:
            return tuple(taken)
        longest //= 2  # not even one of them fits
    return ()


def _classes(data: TestData) -> Array | None:
    """The class of each sequence; None if sequences have none."""
    wanted = data.arrays.get(data.network.signature.outputs[0].name)
    return wanted if wanted is not None and wanted.ndim == 1 and np.issubdtype(wanted.dtype, np.integer) else None


def _in_turn(classes: Array) -> list[int]:
    """The places of sequences: the first of each class, the second of each, and so on."""
    rank = np.zeros(len(classes), np.int64)
    for one in np.unique(classes):
        rank[classes == one] = np.arange(np.count_nonzero(classes == one))
    return [int(place) for place in np.lexsort((classes, rank))]


def _sample(data: TestData, place: int, longest: int, label: str | None) -> Sample:
    length = int(data.lengths[place])
    rows = [_plain(x[place, max(0, length - longest) : length]) for x in data.inputs]
    names = [spec.name for spec in data.network.signature.inputs]
    return Sample(x=rows[0] if len(rows) == 1 else dict(zip(names, rows, strict=True)), label=label)


def _plain(array: Array) -> list[Any]:
    """An array as lists, in the fewest digits that read back as the same float32."""
    plain: list[Any] = orjson.loads(orjson.dumps(np.ascontiguousarray(array), option=orjson.OPT_SERIALIZE_NUMPY))
    return plain
