"""Which ids clients may choose."""

from __future__ import annotations

import pytest

from cellserve.service.api.session_requests import validate_session_id
from cellserve.service.errors import InvalidInput


def test_a_path_segment_that_stands_for_another_is_no_id() -> None:
    for chosen in ("...", ".a", "a..", "a" * 128, "~"):
        validate_session_id(chosen)
    for chosen in (".", "..", "", "a/b", "a%2Fb", "a" * 129):
        with pytest.raises(InvalidInput):
            validate_session_id(chosen)
