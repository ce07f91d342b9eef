"""What workers share: a folder that the next start removes if its server was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from cellserve.service.cli.workers import shared_folder

HOLD = """
import sys
from pathlib import Path
from cellserve.service.cli.workers import shared_folder
with shared_folder(Path(sys.argv[1])) as folder:
    (folder / "counter.db").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


def start(base: Path) -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-c", HOLD, str(base)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_the_next_start_removes_what_a_killed_server_has_left_and_nothing_else(tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    (tmp_path / "cellserve-workers-link").symlink_to(others)
    (tmp_path / "cellserve-workers-file").touch()
    killed, left = start(tmp_path)
    running, kept = start(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert (left / "counter.db").exists()
    with shared_folder(tmp_path) as own:
        assert sorted(tmp_path.glob("cellserve-workers-*")) == sorted(
            [own, kept, tmp_path / "cellserve-workers-link", tmp_path / "cellserve-workers-file"]
        )
        assert os.listdir(kept) == ["counter.db"]
    assert not own.exists()
    running.communicate("")
    assert not kept.exists()
    assert others.exists()


def test_a_worker_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    variables = {"MODELS": str(tmp_path), "STORE": f"lmdb:{tmp_path / 'store'}", "WORKERS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", "from cellserve.service.cli.workers import build; build()"],
        env=os.environ | {f"CELLSERVE_{name}": value for name, value in variables.items()},
        capture_output=True,
        text=True,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert f"a worker does not start: there is no model to serve in {tmp_path}" in line
