"""The decoding process: calls the functions it is sent, until the server closes the connection.

Run as `python -m cellserve.service.validation.decoder_child FD`, the number of a connected socket. A request is two
lengths, a pickled function with its arguments, and the body, its last argument. An answer is two numbers, the length of
the pickled result and how many large arrays it has, then their sizes, the result, and the arrays.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cellserve.service.errors import Problem

HEAD = struct.Struct("<qq")

_NICE = 10
_IDLE_SECONDS = 60.0
_MOST_MEMORY = 256 * 1024 * 1024  # bytes: having needed more, it ends, which gives all of it back
_LARGE_ARRAY = 64 * 1024  # bytes: smaller arrays are pickled with the result


def main() -> None:
    """Serves requests."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end of the server is the end of this process, not before
    os.nice(_NICE)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process than the server
    gc.disable()  # parsed JSON has no cycles
    connection = socket.socket(fileno=int(sys.argv[1]))
    stream = connection.makefile("rwb")
    while _peak_bytes() < _MOST_MEMORY:
        connection.settimeout(_IDLE_SECONDS)
        try:
            head = stream.read(HEAD.size)
        except TimeoutError:
            return
        if len(head) < HEAD.size:
            return
        connection.settimeout(None)
        request, body = (stream.read(length) for length in HEAD.unpack(head))
        answer, arrays = _answered(request, body)
        del request, body
        sizes = np.array([array.nbytes for array in arrays], np.int64)
        stream.write(HEAD.pack(len(answer), len(arrays)) + sizes.tobytes() + answer)
        for array in arrays:
            stream.write(array)
        stream.flush()
        del answer, arrays


def _peak_bytes() -> int:
    """Returns the largest resident memory so far; 0 where it is not known."""
    try:
        # Not by getrusage: its figure begins with that of the process which started this one.
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    except (OSError, ValueError, IndexError):
        return 0


def _answered(request: bytes, body: bytes) -> tuple[bytes, list[memoryview]]:
    """Returns whether the call succeeded with its result or exception, pickled, and the large arrays of it."""
    arrays: list[memoryview] = []

    def keep_apart(buffer: pickle.PickleBuffer) -> bool:
        content = buffer.raw()
        is_large = content.nbytes >= _LARGE_ARRAY
        if is_large:
            arrays.append(content)
        return not is_large

    function, arguments = pickle.loads(request)
    result: tuple[bool, Any]
    try:
        result = True, function(*arguments, body)
    except Problem as problem:
        result = False, problem.with_traceback(None)
    except Exception:
        result = False, RuntimeError(traceback.format_exc())
    return pickle.dumps(result, 5, buffer_callback=keep_apart), arrays


if __name__ == "__main__":
    main()
