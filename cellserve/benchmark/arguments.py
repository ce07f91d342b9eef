"""The arguments of `cellserve bench`."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cellserve.benchmark.surfaces import Steps

KEY_VARIABLE = "CELLSERVE_API_KEY"

EXAMPLE = """\
example:
  cellserve bench vowels
  cellserve bench vowels --sessions 64,512 --surfaces http,frames -- --threads 2
  cellserve bench vowels --url http://127.0.0.1:8000 --rate 500,1000,2000 --svg curve.svg
  cellserve bench my_model --url http://triton:8000 --protocol v2 --json -

Without --url it starts a server by itself, with the flags of `cellserve serve` that follow `--`, and tries settings
that may serve better. docs/how-to/benchmark.md says how to read the figures.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments; `serve` has the flags after `--`."""
    ours, separator, serve = _split(argv)
    parser = argparse.ArgumentParser(
        prog="cellserve bench",
        description="Measures how fast a server serves a model of yours: steps/s and latencies by load.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="NAME", help="the model, NAME or NAME:VERSION")
    add("--url", help="URL of a running server (default: start one)")
    add("--models", type=Path,
        help="the model repository of the server to start (CELLSERVE_MODELS; default: artifacts)")  # fmt: skip
    add("--key", default=os.environ.get(KEY_VARIABLE) or None, help=f"API key (default: that in {KEY_VARIABLE})")
    add("--protocol", choices=("cellserve", "v2"), default="cellserve",
        help="v2: the Open Inference Protocol, of any server (default: cellserve)")  # fmt: skip
    add("--surfaces", type=_names, metavar="A,B",
        help="http, websocket, frames (binary), predict, predict-safetensors; with v2: sequences, stateless "
        "(default: all that fit the model, without predict-safetensors)")  # fmt: skip
    add("--sessions", type=_counts, metavar="A,B",
        help="sessions, or clients of predict, one load after the other (default: 1,8,64,256; --rate: 64)")  # fmt: skip
    add("--rate", type=_rates, metavar="A,B",
        help="requests per second of an open loop (default: a closed loop, each request after an answer)")  # fmt: skip
    add("--steps", type=_steps, default=Steps(50, 50), metavar="N",
        help="time steps of a whole sequence, or a range such as 7-200 (default: 50)")  # fmt: skip
    add("--shape", type=_shape, action="append", default=[], metavar="NAME:1,50,16",
        help="with v2: shape of an input whose metadata leave sizes open")  # fmt: skip
    add("--seconds", type=_seconds, default=2.0, metavar="S", help="measured time of each load (default: 2)")
    add("--warm-up", type=_pause, default=0.5, metavar="S", help="load before that, not counted (default: 0.5)")
    add("--processes", type=_count, default=1, metavar="N", help="load generators, each on a core (default: 1)")
    add("--metrics-url", metavar="URL", help="where the server's metrics are (default: /metrics of --url)")
    add("--no-try", action="store_true", help="do not start further servers to try settings")
    add("--json", metavar="FILE", help="write all figures as JSON; - is stdout")
    add("--svg", metavar="FILE", type=Path, help="draw the throughput-latency curve")
    given = parser.parse_args(ours)
    given.serve = serve
    if given.url and (separator or given.models):
        parser.error(f"{'--models' if given.models else '-- '}: only for a server that is started: leave out --url")
    if given.rate and given.sessions and len(given.sessions) > 1:
        parser.error("--sessions: with --rate give one number: the sessions that share each rate")
    if given.shape and given.protocol != "v2":
        parser.error("--shape: only with --protocol v2: Cellserve's models say their shapes")
    given.sessions = given.sessions or ([64] if given.rate else [1, 8, 64, 256])
    return given


def _split(argv: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    listed = list(argv)
    if "--" not in listed:
        return listed, False, []
    at = listed.index("--")
    return listed[:at], True, listed[at + 1 :]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _counts(text: str) -> list[int]:
    return [_count(one) for one in text.split(",")]


def _count(text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1,000,000")
    return int(text)


def _rates(text: str) -> list[float]:
    return [_seconds(one) for one in text.split(",")]


def _seconds(text: str) -> float:
    value = _pause(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not greater than 0")
    return value


def _pause(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 2 or 0.5")
    return float(text)


def _steps(text: str) -> Steps:
    low, separator, high = text.partition("-")
    steps = Steps(_count(low), _count(high if separator else low))
    if steps.low > steps.high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range: give the smaller number first")
    return steps


def _shape(text: str) -> tuple[str, list[int]]:
    name, _, sizes = text.rpartition(":")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:SIZES, such as x:1,50,16")
    return name, _counts(sizes)
