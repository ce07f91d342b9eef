"""The container's health check asks the server where it was told to listen."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cellserve.service.cli.healthcheck import ready_url


@pytest.mark.parametrize(
    ("command", "environment", "asked"),
    [
        ("cellserve serve", {}, "127.0.0.1:8000"),
        ("python3 /venv/bin/cellserve serve --port 9000", {"CELLSERVE_PORT": "7000"}, "127.0.0.1:9000"),
        ("/dev/init -- cellserve serve --threads 2 --port=9000", {"CELLSERVE_HOST": "0.0.0.0"}, "127.0.0.1:9000"),
        ("cellserve serve --host ::1", {"CELLSERVE_PORT": "7000"}, "[::1]:7000"),
        ("cellserve serve", {"CELLSERVE_HOST": "10.0.0.7"}, "10.0.0.7:8000"),
    ],
)
def test_the_address_is_the_one_that_was_given(command: str, environment: Mapping[str, str], asked: str) -> None:
    assert ready_url(command.split(), environment) == f"http://{asked}/readyz"
