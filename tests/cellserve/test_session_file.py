"""The file of an exported session: it keeps every bit, and what is not such a file is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cellserve.service.sessions.stores.records import StoredAnswer
from cellserve.sessions import session_file
from cellserve.sessions.errors import SessionFailed
from cellserve.sessions.session_file import SavedSession

STATES = {"h": np.array([1.5, -0.0, 1e-45], np.float32), "count": np.array([[2**40]]), "a": np.zeros((2, 0), np.int32)}
LAST = StoredAnswer(b"d" * 32, 4, 6, StoredAnswer.ANSWER, b"\x00\xff" * 9)
SESSION = SavedSession("s~1", "alice", "rnn", 3, "0a" * 32, 6, STATES, b"c" * 32, LAST)


def same(one: SavedSession, other: SavedSession) -> bool:
    states = [(name, state.dtype, state.shape, state.tobytes()) for name, state in one.states.items()]
    others = [(name, state.dtype, state.shape, state.tobytes()) for name, state in other.states.items()]
    return states == others and replace(one, states={}) == replace(other, states={})


@pytest.mark.parametrize(
    "session",
    [SESSION, replace(SESSION, owner="", last=None, creation_digest=b""), replace(SESSION, owner=None)],
)
def test_a_file_keeps_everything_and_others_cannot_read_it(tmp_path: Path, session: SavedSession) -> None:
    file = tmp_path / "new" / "one.safetensors"
    session.write(file)
    assert same(session_file.read(file), session)
    assert load_file(file).keys() == STATES.keys()  # as any other file of that kind
    assert (file.stat().st_mode & 0o077, file.parent.stat().st_mode & 0o077) == (0, 0)
    assert [one.name for one in file.parent.iterdir()] == ["one.safetensors"]


def test_the_longest_id_of_a_sequence_is_kept(tmp_path: Path) -> None:
    file, name = tmp_path / "one.safetensors", f"{'m' * 64}~{'s' * 128}"
    replace(SESSION, id=name).write(file)
    assert session_file.read(file).id == name


def test_a_file_replaces_no_other(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    file.write_text("mine")
    with pytest.raises(SessionFailed, match="exists already"):
        SESSION.write(file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cellserve_session": "2"}, "of a newer Cellserve"),
        ({"cellserve_session": None}, "is not an exported session"),
        ({"session": "a/b"}, "session"),
        ({"session": "a\x9bb"}, "session"),
        ({"session": "x" * 194}, "session"),
        ({"session": "\N{PARTY POPPER}" * 128}, "session"),
        ({"creation_digest": "abc"}, "creation_digest"),
        ({"owner": "../x"}, "owner"),
        ({"position": "-1"}, "position"),
        ({"digest": "abc"}, "digest"),
        ({"states": '["h"]'}, "not the states that it names"),
        ({"states": "["}, "is damaged"),
        ({"last_change": "!"}, "is damaged"),
        ({"last_change": "AAAA"}, "cut off"),
    ],
)
def test_what_is_not_the_file_of_a_session_is_refused(
    tmp_path: Path, change: dict[str, str | None], reason: str
) -> None:
    file = tmp_path / "one.safetensors"
    SESSION.write(file)
    metadata = session_metadata(file) | change
    save_file(STATES, file, {name: value for name, value in metadata.items() if value is not None})
    with pytest.raises(SessionFailed, match=reason) as error:
        session_file.read(file)
    assert "\n" not in str(error.value)


def session_metadata(file: Path) -> dict[str, str | None]:
    from safetensors import safe_open

    with safe_open(file, "numpy") as opened:
        return dict(opened.metadata())


def test_damaged_files_and_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    SESSION.write(file)
    whole, metadata = file.read_bytes(), session_metadata(file)
    for content in (b"", whole[:-1], b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(SessionFailed, match="is not an exported session"):
            session_file.read(file)
    save_file(STATES | {"h": np.array([np.nan], np.float32)}, file, {k: str(v) for k, v in metadata.items()})
    with pytest.raises(SessionFailed, match="not finite"):
        session_file.read(file)
    save_file(STATES | {"h": np.zeros(3)}, file, {k: str(v) for k, v in metadata.items()})
    with pytest.raises(SessionFailed, match="another type than float32"):
        session_file.read(file)
    with pytest.raises(SessionFailed, match="No such file"):
        session_file.read(tmp_path / "none")


def test_names_of_files_stay_below_their_folder_and_differ(tmp_path: Path) -> None:
    names = ["one", "alice/one", "../one", "./one", ".hidden", "ü" * 100, "ü" * 101, "a b", "x" * 500]
    names += ["/etc/passwd", "../../one", "a/../../../b", "../..", "a/b\0c/d", "y" * 500 + "/one", "\ud800"]
    files = [tmp_path / session_file.name_of(name) for name in names]
    assert len(set(files)) == len(names)
    for file in files:
        assert file.resolve().is_relative_to(tmp_path)
        assert len(file.name) <= 255
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert len(session_file.files_in(tmp_path)) == len(names)
