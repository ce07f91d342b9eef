"""Large JSON documents in parts: what is written is what orjson writes of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest

from cellserve.service.api.json_parts import json_parts

DRAW = np.random.default_rng(1)


@pytest.mark.parametrize(
    "document",
    [
        {"model": "m", "outputs": [DRAW.normal(size=(steps, 9)).astype(np.float32) for steps in (1, 9000, 3, 40_000)]},
        {"outputs": [DRAW.normal(size=(1, 3)).astype(np.float32) for _ in range(20_000)], "version": 1},
        {"y": {"a": DRAW.normal(size=100_000).astype(np.float32), "b\n": DRAW.integers(9, size=(30_000, 2, 3))}},
        {"labels": [["yes", 'n"o'] * 30_000, [], ["maybe"]], "states": [{"h": np.zeros((2, 5))}] * 9000, "none": None},
        {"data": np.zeros(0), "wide": np.ones((2, 100_000), np.int32), "empty": {}},
        [],
    ],
)
def test_the_parts_together_are_the_document(document: Any) -> None:
    parts = list(json_parts(document))
    assert b"".join(parts) == orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    assert max(map(len, parts)) < 600_000
