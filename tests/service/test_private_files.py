"""Files with states or keys: who may read them, and what a link in their place does."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from cellserve.service.access.private_files import append_private, create_private


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def umask() -> object:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("opened", [create_private, append_private])
def test_only_the_owner_reads_them_even_if_others_could_before(
    tmp_path: Path, opened: Callable[[Path], IO[bytes]]
) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.touch(0o666)
    for path in (new, old):
        with opened(path) as file:
            file.write(b"secret")
        assert (mode(path), path.read_bytes()) == (0o600, b"secret")


def test_a_link_is_replaced_or_refused_but_never_followed(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("whole")
    link.symlink_to(victim)
    with pytest.raises(OSError):
        append_private(link)
    with create_private(link) as file:
        file.write(b"secret")
    assert victim.read_text() == "whole" and not link.is_symlink()


def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):
        append_private(tmp_path / "pipe")
