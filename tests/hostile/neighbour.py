"""A well-behaved client in a process of its own: it steps one session until its input ends, then says how it fared.

Run as `python -m tests.hostile.neighbour URL MODEL STEP [HEADERS]`, the last two as JSON.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time
from typing import Any
from urllib.parse import urlsplit

ADDRESS = "127.0.0.9"  # another client than the attackers, who come from 127.0.0.1 or say otherwise
PAUSE_SECONDS = 0.005


def main(url: str, model: str, step: str, headers: str = "{}") -> None:
    """Steps until standard input is closed; prints the steps, the slowest one's milliseconds, and what went wrong."""
    address = urlsplit(url)
    client = http.client.HTTPConnection(address.hostname or "", address.port, source_address=(ADDRESS, 0))

    def post(path: str, body: Any) -> Any:
        client.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **json.loads(headers)})
        answer = client.getresponse()
        content = answer.read()
        if answer.status not in (200, 201):
            wrong.append(f"{path}: {answer.status} {content[:300]!r}")
        return json.loads(content)

    wrong: list[str] = []
    session = post("/sessions", {"model": model})["session"]
    answers, slowest, ended = [], 0.0, False
    print("started", flush=True)
    while not ended:  # one step at least
        began = time.perf_counter()
        answers.append(post(f"/sessions/{session}/step", {"x": json.loads(step)}).get("y"))
        slowest = max(slowest, time.perf_counter() - began)
        ended = bool(select.select([sys.stdin], [], [], PAUSE_SECONDS)[0])
    body = {"model": model, "sequences": [[json.loads(step)] * len(answers)], "outputs": "all"}
    [undisturbed] = post("/predict", body)["outputs"]
    if undisturbed != answers:
        wrong.append("the outputs are not those of the same steps in one run")
    print(json.dumps({"steps": len(answers), "slowest_ms": slowest * 1000, "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
