"""What bounds connections: their number, how long each may wait, and each client's share of the event loop."""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import resource
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from time import perf_counter
from types import coroutine
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

from cellserve.service.access.peer_address import Address, host_identity
from cellserve.service.api.client_identity import TrustedProxies
from cellserve.service.observability.counters import Counts
from cellserve.service.settings import Settings

MAX_HEAD_BYTES = 64 * 1024  # of a request's head, and of its trailers
MAX_HEADERS = 100
MAX_TARGET_BYTES = 8 * 1024

TURN_SECONDS = 0.01  # of one client in one iteration of the event loop
_NOTABLE_SECONDS = 0.001  # less than that may count in a later turn: to begin one costs time too
TASK_SECONDS = 0.002  # what a request that gets a task is counted as until it runs, later

# Connections beyond the limit, which get to ask for the server's health.
_SPARE, _SPARE_PER_CLIENT = 64, 4
# Open files beside connections: models, keys, stores, listeners.
_OTHER_FILES = 192
_OPERATIONS_CONNECTIONS = 64

_STEP_BYTES = 64 * 1024  # what must have been sent or read for a time limit to start anew
_SWEEP_SECONDS = 1.0
_SWEPT = 256  # connections in one iteration of the event loop
_STOP_SECONDS = 2.0
_LINGER_SECONDS = 2.0

log = logging.getLogger("cellserve")


class Phase(enum.Enum):
    """What a connection waits for from its client."""

    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"  # to be read
    IDLE = "idle"
    LINGERING = "lingering"  # for its end, after a refusal
    NOTHING = "nothing"  # it is the server's turn


class Progress(NamedTuple):
    """How far a connection is."""

    phase: Phase
    of: object = None  # a request or message: another one is progress
    bytes: int = 0


class Place(enum.Enum):
    """How a connection was admitted."""

    ORDINARY = enum.auto()
    PROXY = enum.auto()  # counted among all, not among a client's
    SPARE = enum.auto()  # beyond a limit: it may ask for the server's health, nothing else
    NONE = enum.auto()


class Connection(Protocol):
    """What the limits need of a connection."""

    sender: Client
    place: Place
    seen: tuple[Progress, float] | None  # the progress that started its time limit, and when

    def go_on(self) -> None:
        """Reads on in what it has received, in its client's next turn."""

    def progress(self) -> Progress:
        """Returns how far it is."""

    def give_up(self, phase: Phase) -> None:
        """Ends it after its time limit."""


class Client:
    """The connections of one client, which share its turns: one in each iteration of the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.connections = self.spares = 0
        self.spent = 0.0  # seconds of this turn
        self.task_seconds = 0.0  # that its tasks took since this turn began: part of the next one
        self._waiting: deque[Connection] = deque()
        self._is_scheduled = False

    def is_in_turn(self) -> bool:
        """Whether what arrives may be read at once; otherwise the connection has to `wait`."""
        if self.spent + self.task_seconds >= _NOTABLE_SECONDS and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._take_turn)
        return self.spent < TURN_SECONDS and not self._waiting

    @coroutine
    def metered(self, awaitable: Awaitable[None]) -> Generator[Any, Any, None]:
        """Awaits what one of its tasks does, and counts the time for which it holds up the event loop."""
        running = awaitable.__await__()
        resume: Callable[[Any], Any] = running.send
        given: Any = None
        while True:
            began = perf_counter()
            try:
                awaited = resume(given)
            except StopIteration:
                return
            finally:
                given = None  # an exception refers to this frame
                self.task_seconds += perf_counter() - began
            try:
                resume, given = running.send, (yield awaited)
            except BaseException as error:
                resume, given = running.throw, error

    def wait(self, connection: Connection) -> None:
        """Lets a connection go on in a later turn, after those that wait already."""
        self._waiting.append(connection)
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        """Begins a turn: `call_soon` is what tells iterations apart, for the loop's time moves within one as well."""
        self.spent, self.task_seconds = self.task_seconds, 0.0
        try:
            for _ in range(len(self._waiting)):
                if self.spent >= TURN_SECONDS:
                    break
                self._waiting.popleft().go_on()
        finally:
            self._is_scheduled = bool(self._waiting)
            if self._is_scheduled:
                self._loop.call_soon(self._take_turn)


class ConnectionTable:
    """The connections of one listener.

    Args:
        settings: The limits.
        counts: Refusals are counted there.
        is_operations: Whether the listener is that of the operations port, which has a limit of its own.
    """

    def __init__(self, settings: Settings, counts: Counts, is_operations: bool = False) -> None:
        self.counts = counts
        self._proxies = TrustedProxies(settings.trusted_proxies)
        self.most = _OPERATIONS_CONNECTIONS if is_operations else affordable_connections(settings)
        self._most_per_client = settings.max_connections_per_client
        self._seconds = {
            Phase.HEAD: settings.head_seconds,
            Phase.BODY: settings.body_seconds,
            Phase.ANSWER: settings.answer_seconds,
            Phase.IDLE: settings.idle_seconds,
            Phase.LINGERING: _LINGER_SECONDS,
            Phase.NOTHING: math.inf,
        }
        self._is_stopping = False
        self._clients: WeakValueDictionary[str, Client] = WeakValueDictionary()
        self._connections: set[Connection] = set()
        self._spares = 0
        self._sweeps = False

    def client(self, address: Address) -> Client:
        """Returns the client at an address."""
        name = host_identity(address[0]) if address else ""
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = Client()
        return client

    def enter(self, connection: Connection, peer: Address) -> None:
        """Counts a connection, tells it its client and its place, and watches its time limits from now on."""
        client = connection.sender = self.client(peer)
        is_proxy = peer in self._proxies
        if len(self._connections) - self._spares < self.most and (
            is_proxy or client.connections < self._most_per_client
        ):
            connection.place = Place.PROXY if is_proxy else Place.ORDINARY
            client.connections += 1
        elif self._spares < _SPARE and (is_proxy or client.spares < _SPARE_PER_CLIENT):
            connection.place = Place.SPARE
            self._spares += 1
            client.spares += 1
        else:
            connection.place = Place.NONE
            return
        self._connections.add(connection)
        if not self._sweeps:
            self._sweeps = True
            self._sweep_later()

    def leave(self, connection: Connection, client: Client) -> None:
        """Forgets a connection.

        Args:
            connection: The connection.
            client: That of its peer; a trusted proxy's connection has had others since it entered.
        """
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        if connection.place is Place.SPARE:
            self._spares -= 1
            client.spares -= 1
        else:
            client.connections -= 1

    def stop(self) -> None:
        """Shortens all time limits: a stopping server waits for no one who keeps it waiting."""
        if not self._is_stopping:
            self._is_stopping = True
            self._seconds = {phase: min(limit, _STOP_SECONDS) for phase, limit in self._seconds.items()}
            self._seconds[Phase.NOTHING] = math.inf

    def _sweep_later(self) -> None:
        shortest = min(self._seconds.values())
        asyncio.get_running_loop().call_later(min(_SWEEP_SECONDS, shortest / 4), self._sweep, [])

    def _sweep(self, due: list[Connection]) -> None:
        """Ends connections whose time is up, `_SWEPT` in each iteration of the event loop."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = due or list(self._connections)
        for connection in due[:_SWEPT]:
            if connection in self._connections:
                self._check(connection, now)
        if len(due) > _SWEPT:
            loop.call_soon(self._sweep, due[_SWEPT:])
        elif self._connections:
            self._sweep_later()
        else:
            self._sweeps = False

    def _check(self, connection: Connection, now: float) -> None:
        progress = connection.progress()
        seen, since = connection.seen or (None, now)
        if (
            seen is None
            or progress.phase is not seen.phase
            or progress.of is not seen.of
            or progress.bytes >= seen.bytes + _STEP_BYTES
        ):
            connection.seen = progress, now
        elif now - since > self._seconds[progress.phase]:
            connection.give_up(progress.phase)


def reset(transport: asyncio.Transport) -> None:
    """Drops a connection with what is still to be sent; when it is only closed, the kernel goes on sending that."""
    end = transport.get_extra_info("socket")
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def affordable_connections(settings: Settings) -> int:
    """Returns how many connections a port may have, so that files, stores and health checks keep descriptors."""
    wanted = settings.max_connections
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return wanted
    left = max(files - _SPARE - _OPERATIONS_CONNECTIONS - _OTHER_FILES, files // 4)
    if settings.grpc_port is not None:
        left //= 2
    if left < wanted:
        log.warning("at most %d connections: the limit of open files (ulimit -n) is %d", left, files)
    return min(wanted, left)


def raise_file_limit() -> None:
    """Lets this process open as many files as it may: the soft limit is often 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS refuses more than its own maximum
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
