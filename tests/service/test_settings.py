"""Environment variables that look like settings."""

from __future__ import annotations

from cellserve.service.settings import unknown_variables


def test_a_variable_that_is_no_setting_is_named_with_the_nearest_one() -> None:
    given = ["CELLSERVE_PORT", "cellserve_host", "CELLSERVE_API_KEY_FILE", "CELLSERVE_COLOUR", "PATH"]
    assert unknown_variables(given) == [
        "CELLSERVE_API_KEY_FILE is no setting: did you mean CELLSERVE_API_KEYS_FILE?",
        "CELLSERVE_COLOUR is no setting: docs/settings.md lists them",
    ]
