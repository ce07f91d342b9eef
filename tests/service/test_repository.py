"""The repository and the versions that are loaded from it: what serves, what is refused and why, what is let go."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from cellserve.export.publish import repository_writer
from cellserve.models.signature import MANIFEST_NAME, METADATA_KEY, MODEL_NAME, STEP_NAME
from cellserve.service.errors import Problem, RepositoryUnusable, ServerFull, UnknownModel, VersionLoading
from cellserve.service.model_repository.errors import BrokenModel, Stopping
from cellserve.service.model_repository.model import VersionKey
from cellserve.service.sessions.session import Session
from tests.service.helpers import Served
from tests.service.model_files import with_external_data
from tests.versions import add_version, changed, copy_of, crashing, remove_version, scaled

KEY = VersionKey("rnn", 2)


@pytest.fixture
def models(repository: Path, tmp_path: Path) -> Path:
    return copy_of(repository, tmp_path, "rnn")


def metadata_of(text: str) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        next(entry for entry in proto.metadata_props if entry.key == METADATA_KEY).value = text

    return change


def telling(change: Callable[[dict[str, Any]], object]) -> Callable[[onnx.ModelProto], None]:
    """Changes what the file says about its model."""

    def tell(proto: onnx.ModelProto) -> None:
        [entry] = [entry for entry in proto.metadata_props if entry.key == METADATA_KEY]
        document = json.loads(entry.value)
        change(document)
        entry.value = json.dumps(document)

    return tell


rolling_out = telling(lambda document: document.update(rollout="logits"))


def labelled(count: int) -> Callable[[onnx.ModelProto], None]:
    return telling(lambda document: document.update(labels=[str(number) for number in range(count)]))


def declaring(**what: Any) -> Callable[[onnx.ModelProto], None]:
    return telling(lambda document: document["signature"].update(what))


def with_state(**what: Any) -> Callable[[onnx.ModelProto], None]:
    return telling(lambda document: document["signature"]["states"][0].update(what))


with_state_twice = telling(lambda document: document["signature"]["states"].append(document["signature"]["states"][0]))


def renamed_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].name = "other"
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = "other" if name == "x" else name


def custom(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Steal", [], ["stolen"], domain="custom.ops"))
    proto.opset_import.append(helper.make_opsetid("custom.ops", 1))


def unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("NoSuchThing", [], ["nothing"]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda model: b"not a model", "not an ONNX file"),
        (lambda model: b"", "metadata"),
        (lambda model: model.read_bytes()[:-50], "not an ONNX file"),
        (lambda model: changed(model, metadata_of("{")), "metadata is damaged"),
        (lambda model: changed(model, metadata_of("{}")), "name"),
        (lambda model: changed(model, metadata_of("[" * 100_000)), "metadata is damaged"),
        (lambda model: changed(model, metadata_of(r'{"name": "\ud800"}')), "metadata is damaged"),
        (lambda model: changed(model, labelled(1)), "it has 1 labels, but the output has the shape [3]"),
        (lambda model: changed(model, labelled(0)), "it has 0 labels, but the output has the shape [3]"),
        (lambda model: changed(model, declaring(min_steps=-5)), "signature.min_steps"),
        (lambda model: changed(model, declaring(batch=0)), "signature.batch"),
        (lambda model: changed(model, with_state(shape=[1] * 100)), "signature.states.0.shape"),
        (lambda model: changed(model, with_state(shape=[2**40])), "signature.states.0.shape.0"),
        (lambda model: changed(model, with_state(batch_axis=-1)), "signature.states.0.batch_axis"),
        (lambda model: changed(model, with_state_twice), "two of its tensors have the same name"),
        (lambda model: changed(model, rolling_out), "it declares rollout 'logits'"),
        (lambda model: changed(model, renamed_input), "signature"),
        (lambda model: changed(model, custom), "custom.ops.Steal"),
        (lambda model: changed(model, unknown_operator), "NoSuchThing"),
        (lambda model: with_external_data("../../etc/passwd"), "another file"),
        (lambda model: with_external_data("/etc/passwd"), "another file"),
        (lambda model: b"x" * 1_000_001, "max-model-bytes"),
    ],
)
def test_a_model_file_that_cannot_be_served_is_refused_and_the_version_before_it_serves(
    models: Path, content: Callable[[Path], bytes], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(models, max_bytes=1_000_000)
    add_version(models, "rnn", 2, content(models / "rnn/1" / MODEL_NAME))
    for _ in range(3):
        served.reload()
    assert served.serving() == {"rnn": 1}
    assert served.states() == {1: "serving", 2: "refused"}
    assert reason in served.state(2).reason
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(told) == 1 and reason in told[0] and "\n" not in told[0]
    # The same at the start.
    assert Served(models, max_bytes=1_000_000).serving() == {"rnn": 1}
    with pytest.raises(UnknownModel, match="refused"):
        served.versions.resolve("rnn:2")


def replaced_by_a_pipe(folder: Path) -> None:
    (folder / MODEL_NAME).unlink()
    os.mkfifo(folder / MODEL_NAME)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / MANIFEST_NAME).unlink(), "is still being copied"),
        (lambda folder: (folder / MANIFEST_NAME).write_text("{"), "is not {"),
        (lambda folder: (folder / MANIFEST_NAME).write_text('{"files": 3}'), "is not {"),
        (lambda folder: (folder / MANIFEST_NAME).write_text('{"files": {}}'), "does not list"),
        (lambda folder: (folder / MANIFEST_NAME).write_bytes(b"\xff\xfe\xfa"), "is not {"),
        (lambda folder: (folder / MODEL_NAME).unlink(), "is still being copied"),
        (replaced_by_a_pipe, "is not a file"),
        (lambda folder: (folder / MODEL_NAME).write_bytes(b"\0" + (folder / MODEL_NAME).read_bytes()), "not match"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_until_its_files_change(
    models: Path, damage: Callable[[Path], object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(models)
    digest = add_version(models, "rnn", 2)
    whole = models.parent / "whole"
    shutil.copytree(models / "rnn/2", whole)
    damage(models / "rnn/2")
    for _ in range(3):
        served.reload()
    assert served.serving() == {"rnn": 1}
    assert reason in served.state(2).reason
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1
    for file in (MODEL_NAME, MANIFEST_NAME):
        (models / "rnn/2" / file).unlink(missing_ok=True)
        shutil.copy(whole / file, models / "rnn/2" / file)
    served.reload()
    assert served.serving() == {"rnn": 2}
    assert served.versions.newest["rnn"].model.digest == digest


def test_a_repository_without_a_sound_model_cannot_be_served(models: Path) -> None:
    (models / "rnn/1" / MODEL_NAME).write_bytes(b"")
    with pytest.raises(BrokenModel, match="no model in"):
        Served(models)
    shutil.rmtree(models / "rnn")
    with pytest.raises(BrokenModel, match="there is no model"):
        Served(models)


def test_what_is_not_named_as_a_version_is_passed_over(models: Path) -> None:
    for name in ("rnn/.draft-1", "rnn/0", "rnn/02", "rnn/latest", "rnn/٣", "lost+found/1", "a:2/1"):
        shutil.copytree(models / "rnn/1", models / name)
    (models / "notes").write_text("")
    (models / "rnn/3").write_text("")
    assert Served(models).states() == {1: "serving"}
    assert set(Served(models).versions.states()) == {"rnn"}


def test_a_link_to_itself_does_not_keep_other_versions_from_being_served(models: Path) -> None:
    served = Served(models)
    add_version(models, "rnn", 2)
    (models / "rnn/3").symlink_to("3")
    (models / "itself").symlink_to("itself")
    served.reload()
    assert served.states() == {1: "loaded", 2: "serving", 3: "refused"}


def test_a_folder_that_is_away_changes_nothing(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = Served(models)
    models.rename(models.parent / "away")
    for _ in range(2):
        with pytest.raises(RepositoryUnusable):
            served.reload()
    assert served.serving() == {"rnn": 1}
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1
    models.mkdir()
    with pytest.raises(RepositoryUnusable):
        served.reload()
    models.rmdir()
    (models.parent / "away").rename(models)
    served.reload()
    assert served.states() == {1: "serving"}


def test_a_new_version_serves_what_is_new_and_an_old_one_is_unloaded_with_its_last_session(models: Path) -> None:
    served = Served(models)
    old = served.versions.newest["rnn"]
    session, _ = served.store.create_now(old, None)
    add_version(models, "rnn", 2)
    served.reload()
    assert served.serving() == {"rnn": 2}
    assert served.states() == {2: "serving", 1: "draining"}
    x = np.ones((3, 5), np.float32)
    before = asyncio.run(served.writer.submit(session, x, True)).y
    new, _ = served.store.create_now(served.versions.resolve("rnn"), None)
    assert not np.array_equal(before, asyncio.run(served.writer.submit(new, x, True)).y)
    served.sweep()
    assert served.states() == {2: "serving", 1: "draining"}
    asyncio.run(served.store.delete("", session.id))
    served.sweep()
    assert served.states() == {2: "serving", 1: "available"}


def test_a_version_of_another_signature_serves_with_a_warning_that_says_what_differs(
    models: Path, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(models)
    add_version(models, "rnn", 2)
    served.reload()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    add_version(models, "rnn", 3, (repository / "lstm/1" / MODEL_NAME).read_bytes())
    served.reload()
    assert served.serving()["rnn"] == 3
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "rnn version 3 has a different signature from 2" in warning
    assert "states " in warning and "inputs " not in warning


def test_an_unloaded_version_is_freed_at_once_though_something_refers_to_it_still(models: Path) -> None:
    served = Served(models)
    gc.collect()
    gc.freeze()  # as the server does: cycles of what was loaded at its start are never collected
    gc.disable()
    try:
        engine = served.versions.newest["rnn"]
        runtime = weakref.ref(engine.model.runtime._session)
        session, _ = served.store.create_now(engine, None)
        asyncio.run(served.writer.submit(session, np.ones((3, 5), np.float32), True))
        states = weakref.ref(engine.arena._arrays[0])
        freed = weakref.ref(engine)
        del engine
        add_version(models, "rnn", 2)
        served.reload()
        asyncio.run(served.store.delete("", session.id))
        served.sweep()
        # A socket may hold its sessions for days after their end.
        assert (runtime(), states()) == (None, None)
        assert session.engine.arena.capacity == 0
        del session
        assert freed() is None
    finally:
        gc.enable()
        gc.unfreeze()


def test_an_old_version_waits_for_the_sequences_that_it_has_begun(models: Path) -> None:
    served = Served(models)
    engine = served.versions.newest["rnn"]
    slots = engine.arena.allocate_many(1)
    assert slots is not None
    add_version(models, "rnn", 2)
    served.reload()
    served.sweep()
    assert served.states() == {2: "serving", 1: "loaded"}
    engine.arena.release(slots)
    served.versions.sweep()
    slots = engine.arena.allocate_many(1)  # by one who had looked the engine up just before
    assert slots is not None
    served.sweep()
    assert engine.model.runtime._session is not None
    engine.arena.release(slots)
    served.sweep()
    assert engine.model.runtime._session is None


def test_taking_the_newest_version_away_is_going_back_to_the_one_before_it(models: Path) -> None:
    add_version(models, "rnn", 2)
    served = Served(models)
    assert served.states() == {2: "serving", 1: "available"}
    session, _ = served.store.create_now(served.versions.newest["rnn"], None)
    remove_version(models, "rnn", 2)
    served.reload()
    assert served.serving() == {"rnn": 1}
    assert served.states() == {2: "draining", 1: "serving"}
    asyncio.run(served.writer.submit(session, np.ones((3, 5), np.float32), True))
    with pytest.raises(UnknownModel):
        served.versions.resolve("rnn:2")
    asyncio.run(served.store.delete("", session.id))
    served.sweep()
    assert served.states() == {1: "serving"}


def test_a_broken_version_never_takes_the_place_of_a_good_one(models: Path) -> None:
    add_version(models, "rnn", 2)
    served = Served(models)
    (models / "rnn/1" / MODEL_NAME).write_bytes(b"broken")
    remove_version(models, "rnn", 2)
    served.reload()
    assert served.serving() == {"rnn": 2}
    assert served.states() == {2: "serving", 1: "refused"}


def test_a_model_whose_folder_is_taken_away_serves_its_sessions_only(repository: Path, tmp_path: Path) -> None:
    models = copy_of(repository, tmp_path, "rnn", "lstm")
    served = Served(models)
    session, _ = served.store.create_now(served.versions.newest["lstm"], None)
    shutil.rmtree(models / "lstm")
    served.reload()
    assert served.serving() == {"rnn": 1}
    assert served.states("lstm") == {1: "draining"}
    with pytest.raises(UnknownModel):
        served.versions.resolve("lstm")
    assert served.versions.resolve(None).model.name == "rnn"
    asyncio.run(served.store.delete("", session.id))
    served.sweep()
    assert set(served.versions.states()) == {"rnn"}


def test_a_version_that_is_changed_while_it_is_loaded_stays_as_it_was(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(models)
    digest = served.versions.newest["rnn"].model.digest
    session, _ = served.store.create_now(served.versions.newest["rnn"], None)
    other = scaled(models / "rnn/1" / MODEL_NAME, 2)
    kept = models.parent / "kept"
    shutil.copytree(models / "rnn/1", kept)
    shutil.rmtree(models / "rnn/1")
    add_version(models, "rnn", 1, other)
    for _ in range(3):
        served.reload()
    assert served.versions.resolve("rnn:1").model.digest == served.versions.resolve("rnn").model.digest == digest
    assert served.states() == {1: "serving"}
    assert "a version must never change" in served.state(1).reason
    (error,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert "rnn/1 stays as it was loaded: " in error
    # Touched, but the same: nothing is wrong with that.
    shutil.rmtree(models / "rnn/1")
    shutil.copytree(kept, models / "rnn/1", copy_function=shutil.copyfile)
    served.reload()
    assert served.state(1).reason == ""
    # What was put in its place serves when it is there no more.
    shutil.rmtree(models / "rnn/1")
    new = add_version(models, "rnn", 1, other)
    add_version(models, "rnn", 2)
    served.reload()
    asyncio.run(served.store.delete("", session.id))
    served.now = 100
    served.sweep()
    remove_version(models, "rnn", 2)
    served.reload()
    assert served.versions.newest["rnn"].model.digest == new


def test_a_version_taken_back_does_not_serve_again_under_other_files(models: Path) -> None:
    add_version(models, "rnn", 2)
    served = Served(models)
    session, _ = served.store.create_now(served.versions.newest["rnn"], None)
    remove_version(models, "rnn", 2)
    served.reload()
    digest = add_version(models, "rnn", 2, scaled(models / "rnn/1" / MODEL_NAME, 3))
    served.reload()
    assert served.serving() == {"rnn": 1}
    asyncio.run(served.store.delete("", session.id))
    served.sweep()
    served.reload()
    assert served.versions.newest["rnn"].model.digest == digest


def test_a_version_is_loaded_when_it_is_asked_for_and_let_go_when_it_is_not(models: Path) -> None:
    add_version(models, "rnn", 2)
    add_version(models, "rnn", 3)
    served = Served(models, max_old=1)

    async def asked() -> None:
        with pytest.raises(VersionLoading) as loading:
            served.versions.resolve("rnn:2")
        await served.versions.loading(loading.value.key)
        assert served.versions.resolve("rnn:2").model.version == 2
        one, other = await asyncio.gather(served.versions.get("rnn:2"), served.versions.get("rnn:2"))
        assert one is other
        with pytest.raises(ServerFull, match="rnn:1"):
            await served.versions.get("rnn:1")
        for name in ("rnn:9", "rnn:02", "rnn:", ":2", "rnn:2:2", "other:1", "rnn:" + "9" * 400):
            with pytest.raises(UnknownModel):
                await served.versions.get(name)

    asyncio.run(asked())
    assert served.states() == {3: "serving", 2: "loaded", 1: "available"}
    served.now = 30
    served.sweep()
    assert served.states()[2] == "loaded"
    served.now = 100
    served.sweep()
    assert served.states()[2] == "available"
    assert asyncio.run(served.versions.get("rnn:1")).model.version == 1


def test_a_version_is_found_by_its_digest_and_by_its_name_where_several_have_it(models: Path) -> None:
    served = Served(models)
    digest = served.versions.newest["rnn"].model.digest
    shutil.copytree(models / "rnn/1", models / "rnn/3")  # going back by a copy
    second = add_version(models, "rnn", 2)
    served.reload()
    found = [
        asyncio.run(served.versions.engine_for_digest(VersionKey("rnn", version), of))
        for version, of in ((1, digest), (3, digest), (7, digest), (2, second), (2, "0" * 64))
    ]
    assert [engine and engine.model.version for engine in found] == [1, 3, 1, 2, None]


def test_a_refused_version_is_looked_at_again_where_that_is_asked_for(models: Path) -> None:
    served = Served(models)
    add_version(models, "rnn", 2)
    served.versions.repository.scan()
    served.versions.repository.refuse(KEY, "there was no memory for it")
    served.reload()
    assert served.serving() == {"rnn": 1}
    served.reload(again=True)
    assert served.serving() == {"rnn": 2}


def test_pages_of_sessions_go_on_where_they_were_though_versions_come_and_go(models: Path) -> None:
    served = Served(models)
    store = served.store
    first = [store.create_now(served.versions.newest["rnn"], None)[0] for _ in range(3)]
    add_version(models, "rnn", 2)
    served.reload()
    second = [store.create_now(served.versions.newest["rnn"], None)[0] for _ in range(3)]

    async def pages() -> list[str]:
        told, after = await store.page("", (0, 0), 4)
        for session in first:
            await store.delete("", session.id)
        served.sweep()
        add_version(models, "rnn", 3)
        await served.versions.reload()
        third.append(store.create_now(served.versions.newest["rnn"], None)[0])
        seen = [one.id for one in told]
        while after is not None:
            told, after = await store.page("", after, 1)
            seen += [one.id for one in told]
        return seen

    third: list[Session] = []
    seen = asyncio.run(pages())
    assert seen == [session.id for session in (*first, *second, *third)]


def test_sessions_of_several_versions_are_stepped_together_and_each_on_its_own(models: Path) -> None:
    served = Served(models)
    old = [served.store.create_now(served.versions.newest["rnn"], None)[0] for _ in range(2)]
    add_version(models, "rnn", 2)
    served.reload()
    new = [served.store.create_now(served.versions.newest["rnn"], None)[0] for _ in range(2)]
    sessions = [old[0], new[0], new[1], old[1]]
    x = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)

    async def stepped() -> None:
        whole = [
            (await served.writer.submit(served.store.create_now(session.engine, None)[0], rows, True)).y
            for session, rows in zip(sessions, x, strict=True)
        ]
        await served.store.delete("", old[1].id)
        slots = np.array([session.slot for session in sessions])
        together = await served.writer.submit_versions(sessions, slots, x)
        assert {row: problem.status for row, problem in together.problems.items()} == {3: 410}
        assert together.positions.tolist()[:3] == [6, 6, 6]
        for row in range(3):
            assert together.y[row].tobytes() == whole[row].tobytes()

    asyncio.run(stepped())


def test_sessions_of_an_unloaded_version_are_answered_that_they_are_gone(models: Path) -> None:
    served = Served(models)
    session, _ = served.store.create_now(served.versions.newest["rnn"], None)
    add_version(models, "rnn", 2)
    served.reload()
    asyncio.run(served.store.delete("", session.id))
    served.sweep()
    x = np.ones((1, 1, 5), np.float32)

    async def asked() -> None:
        with pytest.raises(Problem) as step:
            await served.writer.submit(session, x[0], True)
        with pytest.raises(Problem) as reset:
            await served.writer.set_state(session, None)
        with pytest.raises(Problem) as fork:
            await served.store.fork(session, None, b"")
        many = await served.writer.submit_many([session], session.slots, x)
        assert [one.value.status for one in (step, reset, fork)] == [410] * 3
        assert many.problems[0].status == 410

    asyncio.run(asked())


def test_the_manifest_names_what_is_read(models: Path) -> None:
    """A graph for single steps is opened only where the manifest vouches for it."""
    manifest = models / "rnn/1" / MANIFEST_NAME
    files = json.loads(manifest.read_text())["files"]
    manifest.write_text(json.dumps({"files": {MODEL_NAME: files[MODEL_NAME], "../../secret": "0"}}))
    assert Served(models).versions.newest["rnn"].model.runtime._step is None


def test_a_version_that_crashes_onnx_runtime_is_refused_and_the_one_before_it_serves(models: Path) -> None:
    served = Served(models, tried_first=True)
    add_version(models, "rnn", 2, crashing(models / "rnn/1" / MODEL_NAME))
    served.reload()
    assert served.serving() == {"rnn": 1}
    assert served.state(2).reason == "ONNX Runtime crashed (SIGFPE) in a process that tried to open it"
    add_version(models, "rnn", 3)
    served.reload()
    assert served.serving() == {"rnn": 3}


def test_a_graph_for_single_steps_that_crashes_beside_a_known_model_is_refused(models: Path) -> None:
    served = Served(models, tried_first=True)
    model = (models / "rnn/1" / MODEL_NAME).read_bytes()
    step = crashing(models / "rnn/1" / MODEL_NAME)
    repository_writer.write(models, "rnn", 2, {MODEL_NAME: model, STEP_NAME: step})
    served.reload()
    assert "crashed (SIGFPE)" in served.state(2).reason and served.serving() == {"rnn": 1}


@pytest.mark.parametrize("name", ["rnn", "other"])
def test_files_that_are_replaced_after_the_scan_are_not_opened(models: Path, name: str) -> None:
    """Neither those of a version that looked like one that was open before, nor those that a process has tried."""
    served = Served(models, tried_first=True)
    repository, key = served.versions.repository, VersionKey(name, 2)
    good = models / "rnn/1" / MODEL_NAME
    add_version(models, name, 2, good.read_bytes())
    repository.scan()
    shutil.rmtree(models / name / "2")
    add_version(models, name, 2, crashing(good))
    with pytest.raises(BrokenModel, match="does not match"):
        repository.open(key, started=True)
    repository.scan()
    with pytest.raises(BrokenModel, match="SIGFPE"):
        repository.open(key, started=True)


def test_a_version_that_is_tried_does_not_keep_a_server_from_stopping(models: Path) -> None:
    served = Served(models, tried_first=True)
    served.versions.close()
    add_version(models, "rnn", 2)
    with pytest.raises(Stopping):
        served.versions.repository.scan()
        served.versions.repository.open(KEY, started=True)
    assert not served.versions.repository.versions[KEY].refused


def linked_file(home: Path, outside: Path) -> None:
    shutil.copytree(home / "1", home / "2")
    (home / "2" / MODEL_NAME).rename(outside / "model.onnx")
    (home / "2" / MODEL_NAME).symlink_to(outside / "model.onnx")


def linked_folder(home: Path, outside: Path) -> None:
    shutil.copytree(home / "1", outside / "2")
    (home / "2").symlink_to(outside / "2")


def linked_to_itself(home: Path, outside: Path) -> None:
    (home / "2").mkdir()
    for name in (MANIFEST_NAME, MODEL_NAME):
        (home / "2" / name).symlink_to(name)


@pytest.mark.parametrize("link", [linked_file, linked_folder, linked_to_itself])
def test_links_that_lead_out_of_the_repository_are_refused(
    models: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    served = Served(models)
    (tmp_path / "outside").mkdir()
    link(models / "rnn", tmp_path / "outside")
    served.reload()
    assert served.serving() == {"rnn": 1}
    assert "link" in served.state(2).reason and str(tmp_path) not in served.state(2).reason


def test_links_within_the_repository_are_followed(models: Path) -> None:
    served = Served(models)
    add_version(models, "rnn", 2)
    (models / "rnn" / "2").rename(models / "rnn" / "as-copied")
    (models / "rnn" / "2").symlink_to("as-copied")
    served.reload()
    assert served.serving() == {"rnn": 2}
