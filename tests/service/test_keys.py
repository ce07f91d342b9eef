"""The file of keys, as it changes under a server that runs."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from cellserve.service.access.keys import BadKeysFile, Keys
from cellserve.service.errors import TooManyWrongKeys, Unauthorized


def line(owner: str, key: str) -> str:
    return f"{owner}:{hashlib.sha256(key.encode()).hexdigest()}\n"


def opens(keys: Keys, key: str, host: str = "10.0.0.1") -> bool:
    try:
        return keys.owner(f"Bearer {key}".encode(), host) != ""
    except (Unauthorized, TooManyWrongKeys):
        return False


def reload(keys: Keys) -> None:
    """Looks at the file twice: a change may not be complete at the first look."""
    keys.reload_if_changed()
    keys.reload_if_changed()


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
def test_a_bad_line_that_comes_later_keeps_no_revoked_key_alive_and_is_reported_once(
    file: Path, bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys(file)
    assert opens(keys, "a") and opens(keys, "b")
    file.write_bytes(bad + line("carol", "c").encode() + line("bob", "b").encode())
    for _ in range(3):
        reload(keys)
    assert [opens(keys, key) for key in "abc"] == [False, True, True]
    assert len(caplog.messages) == 1 and "line 1: not owner:sha256" in caplog.messages[0]
    file.write_bytes(bad * 2 + line("bob", "b").encode())
    for _ in range(3):
        reload(keys)
    assert [opens(keys, key) for key in "abc"] == [False, True, False]
    assert len(caplog.messages) == 3


def test_a_file_that_is_gone_changes_no_key_and_is_reported_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = Keys(file)
    file.unlink()
    for _ in range(3):
        reload(keys)
    assert opens(keys, "a") and opens(keys, "b")
    assert len(caplog.messages) == 1 and "the keys stay as they were" in caplog.messages[0]
    file.write_text(line("bob", "b"))
    reload(keys)
    assert not opens(keys, "a") and opens(keys, "b")
    file.unlink()
    reload(keys)
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("what", ["a pipe", "a device", "a folder", "too large"])
def test_what_is_no_file_of_keys_changes_no_key(file: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    keys = Keys(file)
    file.unlink()
    if what == "a pipe":
        os.mkfifo(file)
    elif what == "a device":
        file.symlink_to("/dev/zero")
    elif what == "a folder":
        file.mkdir()
    else:
        file.touch()
        os.truncate(file, 2**40)
    reload(keys)
    assert opens(keys, "a") and opens(keys, "b")
    assert len(caplog.messages) == 1 and "the keys stay as they were" in caplog.messages[0]


def test_of_many_bad_lines_a_few_are_named(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = Keys(file)
    file.write_text("nonsense\n" * 100_000 + line("alice", "a"))
    reload(keys)
    assert opens(keys, "a") and not opens(keys, "b")
    assert len(caplog.messages) == 21 and "99980 further lines" in caplog.messages[-1]


def test_an_emptied_file_revokes_all(file: Path) -> None:
    keys = Keys(file)
    file.write_text("")
    reload(keys)
    assert not opens(keys, "a") and not opens(keys, "b")


def test_a_file_that_is_emptied_and_filled_between_looks_revokes_no_key_of_it(file: Path) -> None:
    keys = Keys(file)
    for content in ("", line("alice", "a"), line("alice", "a") + line("bob", "b")):
        file.write_text(content)
        keys.reload_if_changed()
        assert opens(keys, "a") and opens(keys, "b")
    keys.reload_if_changed()
    assert opens(keys, "a") and opens(keys, "b")
    file.write_text(line("alice", "a"))
    reload(keys)
    assert opens(keys, "a") and not opens(keys, "b")


def test_wrong_keys_are_compared_ten_at_once_and_then_one_every_six_seconds(file: Path) -> None:
    now = [0.0]
    keys = Keys(file, lambda: now[0])
    for _ in range(10):
        with pytest.raises(Unauthorized):
            keys.owner(b"Bearer wrong", "10.0.0.1")
    for key in ("wrong", "a"):  # even the right guess
        with pytest.raises(TooManyWrongKeys) as refused:
            keys.owner(f"Bearer {key}".encode(), "10.0.0.1")
        assert (b"retry-after", b"6") in refused.value.headers()
    assert opens(keys, "a", "10.0.0.2")
    now[0] = 6.1
    with pytest.raises(Unauthorized):
        keys.owner(b"Bearer wrong", "10.0.0.1")
    with pytest.raises(TooManyWrongKeys):
        keys.owner(b"Bearer a", "10.0.0.1")
    now[0] = 12.2
    assert opens(keys, "a")


def test_wrong_keys_lock_nobody_out_who_used_a_right_one_from_there(file: Path) -> None:
    keys = Keys(file)
    assert opens(keys, "a")
    assert not any(opens(keys, f"wrong {number}") for number in range(20))
    assert opens(keys, "a") and not opens(keys, "b")
    assert keys.known(b"Bearer a", "10.0.0.1") == "alice"
    file.write_text(line("alice", "a") + line("carol", "c"))
    reload(keys)
    assert opens(keys, "a") and not opens(keys, "c")


def test_the_memory_of_wrong_keys_is_bounded_and_swept(file: Path) -> None:
    now = [0.0]
    keys = Keys(file, lambda: now[0])
    for number in range(10_000):
        assert not opens(keys, "wrong", f"10.1.{number // 256}.{number % 256}")
        assert opens(keys, "a", f"10.1.{number // 256}.{number % 256}")
    assert len(keys._wrong._forgotten_at) == len(keys._used) == 4096
    now[0] = 100.0
    reload(keys)
    assert not keys._wrong


def test_what_holds_a_key_ends_when_it_is_revoked_or_changes_hands(file: Path) -> None:
    keys = Keys(file)
    ended: list[str] = []
    with (
        keys.held(b"Bearer a", "alice", lambda problem: ended.append("a")) as rotated,
        keys.held(b"Bearer a", "alice", lambda problem: ended.append(problem.detail)),
        keys.held(b"Bearer b", "bob", lambda problem: ended.append("b")),
    ):
        file.write_text(line("alice", "new") + line("alice", "a") + line("bob", "b"))
        reload(keys)
        assert not keys.end_revoked(8)
        rotated.replace(b"Bearer new")
        file.write_text(line("alice", "new") + line("bob", "b"))
        reload(keys)
        assert not keys.end_revoked(8)
        assert ended == ["the key was revoked: send a valid one"]
        file.write_text(line("alice", "new") + line("carol", "b"))
        reload(keys)
        keys.end_revoked(8)
        assert ended[1:] == ["b"]
        with keys.held(b"Bearer a", "alice", lambda problem: ended.append("late")):
            assert ended[2:] == ["late"]
    assert not keys._held


def test_the_holders_of_a_revoked_key_end_a_few_at_a_time(file: Path) -> None:
    keys = Keys(file)
    ended: list[int] = []
    with ExitStack() as held:
        for number in range(20):
            held.enter_context(keys.held(b"Bearer a", "alice", partial(lambda number, _: ended.append(number), number)))
        file.write_text(line("bob", "b"))
        reload(keys)
        assert [keys.end_revoked(8), len(ended)] == [True, 8]
        assert [keys.end_revoked(8), len(ended)] == [True, 16]
        assert [keys.end_revoked(8), len(ended)] == [False, 20]
    assert sorted(ended) == list(range(20))
