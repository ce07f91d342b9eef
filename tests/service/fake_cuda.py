"""A provider that calls itself CUDA and computes on the CPU: what is asked of CUDA, without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnxruntime as ort
import pytest

from cellserve.service.runtime import onnx_model
from cellserve.service.runtime.providers import CPU, CUDA, DEVICES


class FakeCuda:
    """Notes the options of the sessions that are opened on it."""

    def __init__(self) -> None:
        self.options: list[dict[str, str]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        noted = self.options

        class Session(ort.InferenceSession):  # type: ignore[misc]  # it ships no types
            def __init__(
                self,
                source: Any,
                settings: Any,
                *,
                providers: Sequence[str],
                provider_options: Sequence[dict[str, str]],
            ) -> None:
                self.asked = list(providers)
                noted.extend(of for name, of in zip(providers, provider_options, strict=True) if name == CUDA)
                super().__init__(source, settings, providers=[CPU])

            def get_providers(self) -> list[str]:
                return self.asked

        def providers(requested: str, tf32: bool = False) -> list[str]:
            return [CPU] if requested == "cpu" else [CUDA, CPU]

        monkeypatch.setattr(onnx_model, "providers", providers)
        monkeypatch.setitem(DEVICES, CUDA, "cpu")
        monkeypatch.setattr(ort, "InferenceSession", Session)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Every model runs on the fake provider, unless the CPU is asked for."""
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake
