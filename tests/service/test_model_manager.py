"""The model manager against a plain model of what it promises: whatever happens, in any order."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cellserve.models.signature import MODEL_NAME
from cellserve.service.errors import Problem, RepositoryUnusable
from cellserve.service.model_repository.model import VersionKey
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.sessions.session import Session
from tests.budgets import examples
from tests.service.helpers import Served
from tests.versions import add_version, copy_of, scaled

X = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
NUMBERS = st.integers(1, 4)


class Rollouts(RuleBasedStateMachine):
    """One model's versions, each of contents that are told apart by their outputs; `broken` cannot be opened."""

    contents: dict[str, bytes]
    truths: dict[str, np.ndarray]
    digests: dict[str, str]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "models").mkdir()
        add_version(self.folder / "models", "rnn", 1, self.contents["a"])
        self.served = Served(self.folder / "models")
        self.there = {1: "a"}
        self.loaded = {1: "a"}
        self.newest = 1
        self.sessions: list[tuple[Session, str, int]] = []

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(version=NUMBERS, content=st.sampled_from(["a", "b", "c", "broken"]))
    def put(self, version: int, content: str) -> None:
        """Files are put there, in place of others where there are any."""
        self.take_away(version)
        add_version(self.folder / "models", "rnn", version, self.contents[content])
        self.there[version] = content

    @rule(version=NUMBERS)
    def take_away(self, version: int) -> None:
        shutil.rmtree(self.folder / "models" / "rnn" / str(version), ignore_errors=True)
        self.there.pop(version, None)

    @rule()
    def reload(self) -> None:
        try:
            self.served.reload()
        except RepositoryUnusable:
            assert not self.there
            return
        for version in sorted(self.there, reverse=True):
            content, loaded = self.there[version], self.loaded.get(version)
            if content == loaded or (loaded is not None and version == self.newest):
                self.newest = version
                return
            if loaded is None and content != "broken":
                self.loaded[version], self.newest = content, version
                return

    @rule()
    def sweep(self) -> None:
        self.served.sweep()
        kept = {self.newest, *(session.model.version for session, _, _ in self.sessions)}
        self.loaded = {version: content for version, content in self.loaded.items() if version in kept}

    @precondition(lambda self: len(self.sessions) < 8)
    @rule()
    def create(self) -> None:
        session, _ = self.served.store.create_now(self.served.versions.resolve("rnn"), None)
        self.sessions.append((session, self.loaded[self.newest], 0))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), steps=st.integers(1, 4))
    def step(self, data: st.DataObject, steps: int) -> None:
        place = data.draw(st.integers(0, len(self.sessions) - 1))
        session, content, position = self.sessions[place]
        rows = slice(position, position + steps)
        if rows.stop <= len(X):
            y = asyncio.run(self.served.writer.submit(session, X[rows], True)).y
            assert y.tobytes() == self.truths[content][rows].tobytes()
            self.sessions[place] = session, content, rows.stop

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        session, *_ = self.sessions.pop(data.draw(st.integers(0, len(self.sessions) - 1)))
        asyncio.run(self.served.store.delete("", session.id))

    @rule(version=NUMBERS)
    def predict_on(self, version: int) -> None:
        """Whole sequences on a version that is asked for by its number, loaded where it has to be."""
        try:
            engine = asyncio.run(self.served.versions.get(f"rnn:{version}"))
        except Problem as problem:
            assert problem.status in (404, 503)
            return
        assert engine.model.version == version
        content = self.loaded.setdefault(version, self.there.get(version, ""))
        self.served.now += 100  # it was asked for long ago
        assert self.predicted(engine).tobytes() == self.truths[content].tobytes()

    def predicted(self, engine: Any) -> np.ndarray:
        async def predict() -> np.ndarray:
            slots = engine.arena.allocate_many(1)
            y = await engine.submit(slots, X[None], True).awaited
            engine.arena.release(slots)
            return np.asarray(y[0])

        return asyncio.run(predict())

    @invariant()
    def holds_what_it_should(self) -> None:
        versions = self.served.versions
        assert {key.version for key in versions.loaded} == set(self.loaded)
        assert versions.newest["rnn"] is versions.loaded[versions.newest["rnn"].model.key]
        assert versions.newest["rnn"].model.version == self.newest
        for version, content in self.loaded.items():
            assert versions.loaded[VersionKey("rnn", version)].model.digest == self.digests[content]


@pytest.mark.hypothesis
def test_versions_come_and_go_in_any_order(repository: Path, tmp_path: Path) -> None:
    models = copy_of(repository, tmp_path, "rnn")
    first = models / "rnn/1" / MODEL_NAME
    Rollouts.contents = {name: scaled(first, 1 + place / 8) for place, name in enumerate("abc")} | {"broken": b"no"}
    Rollouts.digests = {name: hashlib.sha256(content).hexdigest() for name, content in Rollouts.contents.items()}
    Rollouts.truths = {}
    for name in "abc":
        runtime = Runtime(Rollouts.contents[name])
        Rollouts.truths[name] = runtime.run(X[None], np.array([len(X)], np.int32), runtime.zeros(1))[0][0]
    run_state_machine_as_test(Rollouts, settings=settings(max_examples=examples(20, 200), stateful_step_count=30))
