"""The benchmark of users: its load generator, its figures, its curve and its advice, without a server of ours."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellserve.benchmark import advice, curve, report, svg
from cellserve.benchmark.arguments import parse
from cellserve.benchmark.connection import Connection
from cellserve.benchmark.drive import Figures, Generators
from cellserve.benchmark.inputs import Input
from cellserve.benchmark.measure import Measured, Spec
from cellserve.benchmark.plan import Body, Client, Plan, Tally
from cellserve.benchmark.server_use import Scrape, ServerUse
from cellserve.benchmark.target import BenchFailed, Target, content

ERROR = b'{"status":503,"detail":"the queue is full"}'
ANSWERS = (
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 503 Busy\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(ERROR), ERROR),
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n10;x=y\r\n0123456789abcdef\r\n0\r\nA: b\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
)


def framed(opcode: int, payload: bytes) -> bytes:
    """A server's frame, which has no mask."""
    size = len(payload)
    return bytes([0x80 | opcode]) + (bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2)) + payload


FRAMES = (
    b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\n\r\n",
    framed(1, b'{"op":"open","handle":0}'),
    framed(9, b"alive?"),
    framed(1, b'{"op":"step","y":' + 120 * b"1" + b"}"),
    framed(1, b'{"op":"error","problem":{"status":422,"detail":"wrong"}}'),
    framed(1, b'{"op":"error","row":1,"problem":{"status":503,"detail":"busy"}}'),
    framed(2, np.array([0x81, 0, 2, 1, 0, 0, 0, 0, 0, 503], "<u4").tobytes()),
)


class Wire(asyncio.Transport):
    """Keeps what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def write(self, data: Any) -> None:
        self.sent.append(data)

    def abort(self) -> None: ...


class Counts:
    """What a connection tells of its answers."""

    def __init__(self) -> None:
        self.bodies, self.sending = [Body(b"x", 4)], True
        self.steps: list[float] = []
        self.errors: Counter[str] = Counter()
        self.samples: list[str] = []
        self.connection: Connection
        self.wire = Wire()

    def led(self) -> None:
        self.connection.send()

    def count(self, since: float, now: float, steps: float) -> None:
        self.steps.append(steps)

    def fail(self, since: float, kind: str, sample: str, rows: int = 1) -> None:
        self.errors[kind] += rows
        self.samples.append(sample)

    def lead_failed(self, why: str) -> None:
        raise AssertionError(why)

    def lost(self, connection: Connection) -> None: ...


def received(stream: bytes, cuts: set[int], leads: int) -> Counts:
    counts = Counts()
    connection = counts.connection = Connection(counts, Client(leads=(b"lead",) * leads), 0, open_loop=False)
    connection.connection_made(counts.wire)
    edges = [0, *sorted(cuts), len(stream)]
    for begin, end in pairwise(edges):
        connection.data_received(stream[begin:end])
    return counts


@given(st.sets(st.integers(1, len(b"".join(ANSWERS)) - 1)))
def test_answers_are_the_same_wherever_the_network_cuts_them(cuts: set[int]) -> None:
    counts = received(b"".join(ANSWERS), cuts, 0)
    assert counts.steps == [4, 4, 4, 4]
    assert counts.errors == {"503": 1}
    assert counts.samples == ["503: the queue is full"]


@given(st.sets(st.integers(1, len(b"".join(FRAMES)) - 1)))
def test_frames_are_the_same_wherever_the_network_cuts_them(cuts: set[int]) -> None:
    counts = received(b"".join(FRAMES), cuts, 2)
    assert counts.steps == [4, 2]  # a frame of two rows, one of which failed
    assert counts.errors == {"422": 1, "503": 1}
    assert b"\x8a\x86\0\0\0\0alive?" in counts.wire.sent  # a server ends a socket that does not answer its pings
    assert counts.samples == ["422: wrong", "503: busy", ""]


def test_an_answer_that_is_no_http_is_counted_as_such() -> None:
    assert received(b"SSH-2.0-OpenSSH_9.2\r\n\r\n", set(), 0).errors == {"unreadable": 1}


@contextmanager
def slow_once(seconds: float) -> Iterator[Target]:
    """A server that makes its first request wait so long."""
    ready, over = threading.Event(), threading.Event()
    ports = []

    async def serve() -> None:
        first = True

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal first
            while await reader.readline():
                await reader.readuntil(b"\r\n\r\n")
                if first:
                    first = False
                    await asyncio.sleep(seconds)
                writer.write(ANSWERS[-1])
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            ports.append(server.sockets[0].getsockname()[1])
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    ready.wait()
    try:
        yield Target.at(f"http://127.0.0.1:{ports[0]}", None)
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stall_counts_for_every_request_that_was_due_meanwhile(processes: int) -> None:
    with slow_once(1) as target:
        clients = [Client(prefix=target.head("GET", "/", {}))] * processes
        plan = Plan(target, clients, [Body(content(b""), 1)], seconds=1.5, warm_up=0, rate=100 * processes)
        with Generators(plan, processes) as generators:
            generators.wait_until_ready()
            figures = generators.run()
    # The first one is due at once: those due in the second that follows wait for its rest, half of them 0.5 s or more.
    assert figures.answers == 150 * processes
    assert figures.p95_ms > 500
    assert not figures.errors


def test_a_closed_loop_waits_for_its_answers() -> None:
    with slow_once(1) as target:
        plan = Plan(target, [Client(prefix=target.head("GET", "/", {}))], [Body(content(b""), 1)], 1.5, 0)
        with Generators(plan, 1) as generators:
            generators.wait_until_ready()
            figures = generators.run()
    assert figures.p95_ms < figures.max_ms  # the stall is one request of many
    assert figures.max_ms > 900


def test_the_figures_are_of_all_generators_together() -> None:
    latencies = [number / 1000 for number in range(1, 101)]
    tallies = [
        Tally(array("d", part), 50, 500, (200, 300), Counter({"503": 2}), {"503": "busy"}, 2, 2.5, busy, 0.05)
        for part, busy in ((latencies[::2], 0.3), (latencies[1::2], 0.4))
    ]
    figures = Figures.of(tallies)
    assert (figures.p50_ms, figures.p95_ms, figures.p99_ms, figures.max_ms) == (50, 95, 99, 100)
    assert (figures.answers, figures.steps_per_s, figures.requests_per_s) == (100, 500, 50)
    assert (figures.errors, figures.samples) == ({"503": 4}, {"503": "busy"})
    assert (figures.drift, figures.busy) == (1.5, 0.4)


def test_figures_without_an_answer_are_not_numbers() -> None:
    figures = Figures.of([Tally(errors=Counter({"no connection": 3}), seconds=1)])
    assert math.isnan(figures.p50_ms)
    loads = [Measured(Spec("http", 1, None), figures, None)]
    assert json.loads(json.dumps(report.document(loads), allow_nan=False))[0]["p99_ms"] is None
    assert curve.in_text(loads) == []
    ElementTree.fromstring(svg.in_svg(loads, "none"))


def test_inputs_are_drawn_within_the_signature() -> None:
    rng = np.random.default_rng(0)
    ids = Input.read({"name": "ids", "dtype": "int32", "shape": [], "bounds": [3, 6]}).draw(rng, 200)
    assert ids.dtype == np.int32
    assert (ids.min(), ids.max()) == (3, 6)
    x = Input.read({"name": "x", "dtype": "float32", "shape": [2, 3], "bounds": None}).draw(rng, 5)
    assert x.shape == (5, 2, 3)
    assert max(len(f"{abs(value)}") for value in x.ravel()) <= 6


METRICS = """\
process_cpu_seconds_total {cpu}
cellserve_tick_rows_bucket{{le="1.0",model="m",version="2"}} 7
cellserve_tick_rows_count{{model="m",version="2"}} {ticks}
cellserve_tick_rows_sum{{model="m",version="2"}} {rows}
cellserve_tick_rows_sum{{model="m",version="1"}} 1e6
cellserve_stage_duration_seconds_count{{model="m",stage="run",version="2"}} {ticks}
cellserve_stage_duration_seconds_sum{{model="m",stage="run",version="2"}} {run}
cellserve_stage_duration_seconds_count{{model="m",stage="queue",version="2"}} {rows}
cellserve_stage_duration_seconds_sum{{model="m",stage="queue",version="2"}} {queue}
cellserve_steps_total{{model="m",version="2"}} {rows}
cellserve_padding_steps_total{{model="m",version="2"}} 0
"""


def test_what_the_server_did_is_read_from_its_metrics() -> None:
    before = Scrape(METRICS.format(cpu=1, ticks=0, rows=0, run=0, queue=0), "m", "2")
    after = Scrape(METRICS.format(cpu=3, ticks=100, rows=1600, run=1, queue=3.2), "m", "2")
    assert before.until(after, 4) == ServerUse(cores=0.5, running=0.25, run_ms=10, rows=16, queue_ms=2, padding=0)
    assert before.until(before, 4) is None
    assert not Scrape("nv_inference_request_success 1\n", "m", "2").is_cellserve


def load(surface: str = "http", sessions: int = 64, steps_per_s: float = 1000, **use: float) -> Measured:
    tally = Tally(array("d", [0.01]), 1, steps_per_s, (1, 1), seconds=1, busy=0.2)
    told = {"cores": 0.5, "running": 0.1, "run_ms": 0.1, "rows": 16, "queue_ms": 0, "padding": 0, **use}
    return Measured(Spec(surface, sessions, None), Figures.of([tally]), ServerUse(**told))


FACTS = advice.Facts({"exact": True, "provider": "CPUExecutionProvider"}, 256, 4, (), False)


@pytest.mark.parametrize(
    ("measured", "more", "said", "flags"),
    [
        ([load(sessions=512, rows=250)], {}, "the mean batch is 250, --max-batch is 256", ("--max-batch", "1024")),
        ([load(sessions=256, rows=250)], {}, "it was not the limit: give more --sessions", ()),
        ([load(run_ms=40, rows=64)], {}, "--max-batch 32 would halve that", ()),
        ([load(cores=1, running=0.8, run_ms=2)], {}, "the model ran 80% of the time, 2 ms a run", ("--threads", "4")),
        ([load(cores=1, running=0.8, run_ms=2)], {"cores": None}, "if its machine has cores", ("--threads", "2")),
        ([load(cores=1, running=0.8, run_ms=0.1)], {}, "too short for --threads to help", ()),
        ([load(cores=1, running=0.2)], {}, "binary frames of WS /stream cost less", ()),
        ([load(cores=1, running=0.2), load("frames", 64, 5000)], {}, "here 5.0 times as many steps/s", ()),
        ([load("predict", cores=1, running=0.2)], {}, "safetensors cost less", ()),
        ([load(cores=1)], {}, "bound by one core (100% used): --workers with a shared --store", ()),
        ([load(cores=1)], {"shared_store": True}, "bound by one core (100% used)", ("--workers", "2")),
        ([load(rows=1)], {"described": {"exact": False, "exactness": "rows mix"}}, "not proved exact (rows mix)", ()),
    ],
)
def test_advice_follows_from_what_was_seen(
    measured: list[Measured], more: dict[str, Any], said: str, flags: tuple[str, ...]
) -> None:
    names = {name: getattr(FACTS, name) for name in FACTS.__slots__}
    found = advice.advise(measured, advice.Facts(**{**names, **more}), "")
    (one,) = [one for one in found if said in str(one)]
    assert one.flags == flags
    assert not flags or one.spec == measured[0].spec


def test_on_one_core_no_setting_that_needs_more_is_advised() -> None:
    alone = advice.Facts(FACTS.described, 256, 1, (), True)
    found = advice.advise([load(cores=1, running=0.8, run_ms=2)], alone, "")
    assert not [one for one in found if one.flags]


def test_a_trial_is_judged_by_both_of_its_measurements() -> None:
    slow, fast = [load(steps_per_s=rate) for rate in (900, 1000)], [load(steps_per_s=rate) for rate in (1500, 1600)]
    flags = ("--threads", "2")
    assert advice.judge(flags, slow, fast).startswith("tried --threads 2: better (950 to 1,550 steps/s, 1.63 times;")
    assert advice.judge(flags, fast, slow).startswith("tried --threads 2: worse")
    assert advice.judge(flags, [slow[0], fast[1]], fast).startswith("tried --threads 2: no clear difference")


LOADS = [load(surface, sessions, 100 * sessions**power) for surface, power in (("http", 0.5), ("frames", 1))
         for sessions in (1, 8, 64)]  # fmt: skip


def test_the_curve_in_text_is_plain_and_labels_every_load() -> None:
    lines = curve.in_text(LOADS)
    text = "\n".join(lines)
    assert text.isascii()
    assert max(map(len, lines)) <= 80
    for label in ("h1", "h8", "h64", "f1", "f8", "f64"):
        assert re.search(rf"(?<![a-z\d]){label}(?!\d)|(?<!\d){label[1:]}{label[0]}", text), label
    assert "p99 latency, ms" in text and "steps/s" in text
    assert lines[-1] == "h http, f frames; the number: sessions"


def test_the_curve_in_svg_has_axes_with_units_and_labelled_points_in_light_and_dark() -> None:
    drawn = svg.in_svg(LOADS, "a <b> & c")
    root = ElementTree.fromstring(drawn)
    name = "{http://www.w3.org/2000/svg}"
    assert root[0].text == "a <b> & c: steps/s and p99 latency, ms"
    points = [one.text for one in root.iter(f"{name}text") if one.get("class") == "point"]
    assert points == ["1", "8", "64"] * 2
    assert len(list(root.iter(f"{name}polyline"))) == 2
    assert "prefers-color-scheme: dark" in drawn
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for one in root.iter(f"{name}circle"):
        assert 0 < float(one.attrib["cx"]) < width and 0 < float(one.attrib["cy"]) < height


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--sessions", "1,x"], "'x' is not a number from 1"),
        (["--sessions", "0"], "'0' is not a number from 1"),
        (["--rate", "0"], "'0' is not greater than 0"),
        (["--rate", "5", "--sessions", "1,2"], "with --rate give one number"),
        (["--seconds", "long"], "'long' is not a number such as 2"),
        (["--steps", "9-3"], "'9-3' is not a range"),
        (["--shape", "1,2"], "'1,2' is not NAME:SIZES"),
        (["--shape", "x:1,2"], "only with --protocol v2"),
        (["--url", "http://there", "--models", "here"], "only for a server that is started"),
        (["--url", "http://there", "--", "--threads", "2"], "only for a server that is started"),
    ],
)
def test_a_wrong_flag_is_reported(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse(["mine", *argv])
    assert error.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_what_follows_two_dashes_is_for_the_server() -> None:
    given = parse(["mine", "--steps", "7-200", "--", "--threads", "2"])
    assert (given.model, given.steps, given.serve) == ("mine", (7, 200), ["--threads", "2"])
    assert given.sessions == [1, 8, 64, 256]
    assert parse(["mine", "--rate", "10"]).sessions == [64]


@pytest.mark.parametrize("url", ["nonsense", "ftp://x", "http://", "http://x:y", "http://127.0.0.1:1"])
def test_a_url_where_no_server_is_is_reported(url: str) -> None:
    with pytest.raises(BenchFailed, match=re.escape(url)):
        Target.at(url, None)
