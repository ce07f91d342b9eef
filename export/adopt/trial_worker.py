"""The process that opens and runs foreign graphs first: ONNX Runtime may crash on them, and takes its process along.

It reads requests `(graph, outputs, [inputs])` from standard input and writes reports to standard output, both pickled:
`opened`, then `ran` with a list of outputs for each run; or `failed` with the message. It imports nothing of ours, so
that it starts fast.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any, BinaryIO

import onnxruntime as ort

_FATAL = 4  # ONNX Runtime's highest severity: it logs nothing else


def open_session(content: bytes) -> Any:
    """Opens a graph with plain ONNX Runtime."""
    settings = ort.SessionOptions()
    settings.log_severity_level = _FATAL
    settings.intra_op_num_threads = 1
    return ort.InferenceSession(content, settings, providers=["CPUExecutionProvider"])


def serve(requests: BinaryIO, reports: BinaryIO) -> None:
    """Answers requests until there are no more."""

    def report(*what: Any) -> None:
        pickle.dump(what, reports)
        reports.flush()

    while True:
        try:
            content, outputs, runs = pickle.load(requests)
        except EOFError:
            return
        try:
            session = open_session(content)
            report("opened")
            report("ran", [session.run(outputs, feeds) for feeds in runs])
        except Exception as error:
            report("failed", str(error))


if __name__ == "__main__":
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with the reports
    serve(sys.stdin.buffer, out)
