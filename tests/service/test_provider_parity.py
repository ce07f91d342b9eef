"""On CUDA results are those of the CPU, or as imprecise as was asked for; on a provider that stands in for CUDA."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellserve.export.publish import repository_writer
from cellserve.models.signature import MODEL_NAME
from cellserve.service.model_repository.errors import BrokenModel
from cellserve.service.model_repository.model import Model
from cellserve.service.model_repository.repository import load
from cellserve.service.runtime import onnx_model
from cellserve.service.runtime.float16 import in_float16
from cellserve.service.runtime.onnx_model import RuntimeOptions
from cellserve.service.runtime.providers import CUDA, RuntimeUnavailable
from tests import foreign
from tests.kinds import KINDS
from tests.service.fake_cuda import FakeCuda, fake_cuda

__all__ = ["fake_cuda"]


@pytest.fixture
def version(tmp_path: Path) -> Path:
    repository_writer.write(tmp_path, "symbols", 1, {MODEL_NAME: foreign.described(*KINDS["symbols"])})
    return tmp_path / "symbols" / "1"


def loaded(version: Path, **options: Any) -> Model:
    return load("symbols", version, RuntimeOptions(**options), 8)


def test_float32_is_the_default_and_its_parity_with_the_cpu_is_reported(version: Path, fake_cuda: FakeCuda) -> None:
    told = loaded(version).described()
    assert (told["provider"], told["arithmetic"], told["off_cpu"]) == (CUDA, "float32", 0)
    assert {of["use_tf32"] for of in fake_cuda.options} == {"0"}
    on_cpu = loaded(version, provider="cpu").described()
    assert (on_cpu["arithmetic"], on_cpu["off_cpu"]) == ("float32", None)


def test_a_model_that_strays_from_the_cpu_is_refused_in_one_line(
    version: Path, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_as_asked = onnx_model._open

    def rounding(model: Any, options: RuntimeOptions) -> Any:
        return open_as_asked(in_float16(model) if options.provider != "cpu" else model, options)

    monkeypatch.setattr(onnx_model, "_open", rounding)
    with pytest.raises(BrokenModel) as refused:
        loaded(version)
    assert "\n" not in str(refused.value)
    assert "off those on the CPU, and 1.0e-05 is allowed: use --provider cpu" in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "arithmetic"), [({"cuda_tf32": True}, "tf32"), ({"precision": "float16"}, "float16")]
)
def test_less_precision_is_to_be_had_for_the_asking(
    version: Path, fake_cuda: FakeCuda, asked: dict[str, Any], arithmetic: str
) -> None:
    model = loaded(version, **asked)
    assert model.described()["arithmetic"] == arithmetic
    assert fake_cuda.options[0]["use_tf32"] == str(int(arithmetic == "tf32"))
    if arithmetic == "float16":
        assert model.off_cpu is not None and 1e-5 < model.off_cpu < 0.1
        x = np.zeros((1, 1), model.inputs.dtype)
        y, states = model.runtime.run(x, np.ones(1, np.int32), model.runtime.zeros(1))
        assert y["features"].dtype == states[0].dtype == np.float32


def test_float16_without_its_package_is_said_in_one_line(
    version: Path, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises((BrokenModel, RuntimeUnavailable), match="pip install onnx"):
        loaded(version, precision="float16")
