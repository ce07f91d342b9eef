"""Environment variables that look like settings, and settings that conflict."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cellserve.service.settings import Settings, explain_invalid, flag, unknown_variables


def test_a_variable_that_is_no_setting_is_named_with_the_nearest_one() -> None:
    given = ["CELLSERVE_PORT", "cellserve_host", "CELLSERVE_API_KEY_FILE", "CELLSERVE_COLOUR", "PATH"]
    assert unknown_variables(given) == [
        "CELLSERVE_API_KEY_FILE is not a setting: did you mean CELLSERVE_API_KEYS_FILE?",
        "CELLSERVE_COLOUR is not a setting: docs/reference/settings.md lists them",
    ]


@pytest.mark.parametrize("asked", [{"precision": "float16"}, {"cuda_tf32": True}])
def test_less_precision_is_refused_where_models_run_on_the_cpu(asked: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings(provider="cpu", **asked)
    assert explain_invalid(refused.value).startswith(f"{flag(*asked)}: it is for CUDA")
    assert Settings(**asked).provider == "auto"


def test_a_store_without_its_folder_is_refused() -> None:
    with pytest.raises(ValidationError, match="the folder is missing"):
        Settings(store="lmdb:")
