"""The file of keys, as it changes under a server that runs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cellserve.service.auth import BadKeysFile, Keys
from cellserve.service.errors import Unauthorized


def line(owner: str, key: str) -> str:
    return f"{owner}:{hashlib.sha256(key.encode()).hexdigest()}\n"


def opens(keys: Keys, key: str) -> bool:
    try:
        return keys.owner(f"Bearer {key}".encode()) != ""
    except Unauthorized:
        return False


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(line("alice", "a") + line("bob", "b"))
    return file


def test_a_bad_line_refuses_the_start_and_is_named(file: Path) -> None:
    file.write_text(line("alice", "a") + "nonsense\n")
    with pytest.raises(BadKeysFile, match="line 2: not owner:sha256"):
        Keys(file)


@pytest.mark.parametrize("bad", [b"nonsense\n", b"\xff\xfe\n"])
def test_a_bad_line_that_comes_later_keeps_no_revoked_key_alive_and_is_told_once(
    file: Path, bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys(file)
    assert opens(keys, "a") and opens(keys, "b")
    file.write_bytes(bad + line("carol", "c").encode() + line("bob", "b").encode())
    for _ in range(3):
        keys.reload_if_changed()
    assert [opens(keys, key) for key in "abc"] == [False, True, True]
    assert len(caplog.messages) == 1 and "line 1: not owner:sha256" in caplog.messages[0]
    file.write_bytes(bad * 2 + line("bob", "b").encode())
    for _ in range(3):
        keys.reload_if_changed()
    assert [opens(keys, key) for key in "abc"] == [False, True, False]
    assert len(caplog.messages) == 3


def test_a_file_that_is_gone_changes_no_key_and_is_told_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = Keys(file)
    file.unlink()
    for _ in range(3):
        keys.reload_if_changed()
    assert opens(keys, "a") and opens(keys, "b")
    assert len(caplog.messages) == 1 and "the keys stay as they were" in caplog.messages[0]
    file.write_text(line("bob", "b"))
    keys.reload_if_changed()
    assert not opens(keys, "a") and opens(keys, "b")
    file.unlink()
    keys.reload_if_changed()
    assert len(caplog.messages) == 2


def test_an_emptied_file_revokes_all(file: Path) -> None:
    keys = Keys(file)
    file.write_text("")
    keys.reload_if_changed()
    assert not opens(keys, "a") and not opens(keys, "b")
