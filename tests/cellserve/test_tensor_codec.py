"""float32 in JSON, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import orjson
from hypothesis import example, given
from hypothesis import strategies as st

from cellserve.protocol.tensor_codec import read_y


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@example([float(np.array(363742205, np.uint32).view(np.float32))])  # written as 7.038531e-26
@example([-float(np.array(363742205, np.uint32).view(np.float32)), 1.5])
@example([1e-45])
def check_numbers(numbers: list[float]) -> None:
    y = np.array(numbers, np.float32)
    written = orjson.dumps({"y": y}, option=orjson.OPT_SERIALIZE_NUMPY)
    assert read_y(written).tobytes() == y.tobytes()


def test_float32_json_is_read_bit_for_bit() -> None:
    # A process of its own: ONNX Runtime, run by other tests in this one, lets it flush denormals to zero.
    subprocess.run([sys.executable, "-c", f"import {__name__} as tests; tests.check_numbers()"], check=True)


def test_reading_through_float64_would_change_a_number() -> None:
    y = np.array([363742205], np.uint32).view(np.float32)
    written = orjson.loads(orjson.dumps(y, option=orjson.OPT_SERIALIZE_NUMPY))
    assert np.asarray(written, np.float32) != y
