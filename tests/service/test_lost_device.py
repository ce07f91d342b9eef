"""A GPU that is gone: its steps fail as such, the process says so in one line and is not ready."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cellserve.service.context import ServiceContext
from cellserve.service.engine.engine import Engine
from cellserve.service.errors import DeviceLost
from cellserve.service.runtime import onnx_model
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.sessions.stores.memory import MemoryStore
from cellserve.service.sessions.writer import SessionWriter
from cellserve.service.settings import Settings
from tests import foreign
from tests.kinds import KINDS, write_repository
from tests.service.fake_cuda import FakeCuda, fake_cuda
from tests.service.helpers import LOST, truth

__all__ = ["fake_cuda"]

GONE = Exception("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 719: unspecified launch failure ; GPU=0 ; hostname=h")
OTHER = Exception("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: x")


def test_a_step_on_a_lost_device_moves_nothing_and_says_what_happened(
    make: Callable[..., tuple[Engine, MemoryStore, SessionWriter]],
) -> None:
    engine, store, writer = make(max_batch=4)
    good = np.ones((1, 2), np.float32)

    async def steps() -> None:
        sessions = [store.create_now(engine, None)[0] for _ in range(3)]
        for session in sessions:
            await writer.submit(session, good, True)
        bad = [np.full((1, 2), LOST, np.float32), good, good]
        failed = await asyncio.gather(
            *(writer.submit(session, x, True) for session, x in zip(sessions, bad, strict=True)), return_exceptions=True
        )
        assert all(isinstance(each, DeviceLost) for each in failed), failed
        assert [session.position for session in sessions] == [1, 1, 1]
        assert all(engine.arena.read(session.slot)["s"].tobytes() == truth(good)[-1].tobytes() for session in sessions)

    asyncio.run(steps())


def test_an_error_of_cuda_is_a_lost_device_only_if_cuda_does_not_answer_any_more(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content = foreign.described(*KINDS["frames"])
    one, another = Runtime(content), Runtime(content)
    monkeypatch.setattr(onnx_model, "cuda_answers", lambda: True)
    assert not one.has_lost_device(GONE)
    monkeypatch.setattr(onnx_model, "cuda_answers", lambda: False)
    assert not one.has_lost_device(OTHER)
    with caplog.at_level(logging.ERROR, "cellserve"):
        assert one.has_lost_device(GONE) and another.has_lost_device(GONE)
        assert one.has_lost_device(OTHER), "it is gone for good"
    (line,) = caplog.messages
    assert "CUDA failure 719: unspecified launch failure" in line and "\n" not in line


def test_a_process_that_has_lost_its_device_is_not_ready(tmp_path: Path) -> None:
    service = ServiceContext(Settings(models=write_repository(tmp_path), provider="cpu", reload_seconds=0))
    try:
        assert not service.ready
        service.started = True
        assert service.ready
        next(iter(service.versions.loaded.values())).model.runtime.lost_device = True
        assert not service.ready
    finally:
        asyncio.run(service.close())
