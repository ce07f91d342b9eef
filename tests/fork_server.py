"""Runs the command `cellserve` for a quarter of its CPU time: in copies of a process that has imported everything.

Imports take 1.5 of the 2 seconds of CPU time in which a server starts, and the tests start hundreds. Each copy is a
process in a session of its own, which runs `python -m cellserve.cli` from its first line to the end of its interpreter;
only the modules are there already.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any


class Forked:
    """A process that runs the command: the part of `subprocess.Popen` that tests use.

    Args:
        output: The read end of the pipe that it writes to.
        status: The read end of a pipe with its process id, then its exit status.
    """

    def __init__(self, output: int, status: int) -> None:
        self.stdout = os.fdopen(output)
        self._status = os.fdopen(status)
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._end(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._end(timeout) is None:
            raise subprocess.TimeoutExpired("cellserve", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Returns what it writes until its end, nothing if called again; if it takes longer, it is killed."""
        if self.stdout.closed:
            return "", None
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        with self.stdout:
            rest = self.stdout.read()
        self.wait()
        timer.cancel()
        return rest, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _end(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            with self._status:
                self.returncode = int(self._status.read())
        return self.returncode


def run(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Runs `cellserve` to its end, as `subprocess.run` does."""
    with tempfile.TemporaryFile("w+") as errors:
        process = fork(*arguments, environment=environment, errors=errors.fileno())
        output, _ = process.communicate(timeout)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, process.wait(), output, errors.read())


def fork(*arguments: str, environment: Mapping[str, str] | None = None, errors: int | None = None) -> Forked:
    """Starts `cellserve`.

    Args:
        arguments: Its arguments.
        environment: Variables beside this process's own. Those that an interpreter or a library of others reads at its
            start come too late.
        errors: A file for its stderr; otherwise it goes where its stdout goes.
    """
    (output, their_output), (status, their_status) = os.pipe(), os.pipe()
    request = {"arguments": arguments, "environment": {**os.environ, **(environment or {})}, "folder": os.getcwd()}
    files = [their_output, their_output if errors is None else errors, their_status]
    socket.send_fds(_control(), [json.dumps(request).encode()], files)
    os.close(their_output)
    os.close(their_status)
    return Forked(output, status)


@functools.cache
def _control() -> socket.socket:
    """A connection to the process that is copied, which ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
        )
    atexit.register(process.wait)
    atexit.register(ours.close)  # the last that is registered is called first
    return ours


def _main(control: socket.socket) -> None:
    """Makes a copy for each request; returns when the tests have ended, and in every copy when its command has."""
    import cellserve.benchmark.command
    import cellserve.service.app
    import cellserve.service.cli.key
    import cellserve.service.cli.orderly_server
    import cellserve.service.cli.serve  # noqa: F401
    from cellserve.service.api.connections import bounded_websocket, fast_path_http  # noqa: F401

    gc.freeze()  # no copy looks through what was imported, or has pages of its own of it
    while True:
        request, files, _, _ = socket.recv_fds(control, 1 << 20, 3)
        if not request:
            return
        if os.fork() == 0:
            control.close()
            return _start_and_tell(json.loads(request), *files)
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _start_and_tell(request: dict[str, Any], output: int, errors: int, status: int) -> None:
    """Starts the command in a copy, tells its process id, waits for it, and tells its exit status."""
    command = os.fork()
    if command == 0:
        os.close(status)
        return _run(request, output, errors)
    os.close(output)
    os.close(errors)
    os.write(status, b"%d\n" % command)
    ended = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    os.write(status, b"%d" % ended)
    os._exit(0)


def _run(request: dict[str, Any], output: int, errors: int) -> None:
    """Does what `python -m cellserve.cli` does, in a session, a folder and an environment of its own."""
    import runpy
    import secrets

    from cellserve.service.observability import request_context

    os.setsid()
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.close(output)
    os.close(errors)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv[1:] = request["arguments"]
    request_context._PROCESS = secrets.token_hex(8)  # drawn on import: no two servers number their requests alike
    runpy.run_module("cellserve.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
