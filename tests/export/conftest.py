"""What the tests of the export share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.export.unmeasured import unmeasured


@pytest.fixture
def measuring() -> None:
    """For tests of what is measured."""


@pytest.fixture(autouse=True)
def _unmeasured(request: pytest.FixtureRequest) -> Iterator[None]:
    if "measuring" in request.fixturenames:
        yield
        return
    with unmeasured():
        yield
