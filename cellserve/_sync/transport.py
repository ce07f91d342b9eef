# Generated from _async/transport.py by scripts/unasync.py: edit that file.
"""HTTP with retries, and what all sessions of a client share."""

from __future__ import annotations

from typing import Any

import httpx

from cellserve._sync.concurrency import SessionLocks, sleep
from cellserve._sync.event_stream import EventStream
from cellserve._sync.socket import Socket
from cellserve.errors import AnswerTooLarge, CellserveError, ConnectionLost, NeverReached
from cellserve.protocol.http import HttpRequest, HttpResponse, path_of
from cellserve.protocol.session import SessionRecord
from cellserve.retry import Backoff, Retry, Timeout
from cellserve.signatures import Signature, SignatureCache

MAX_ANSWER_BYTES = 256 * 2**20  # four times what a server with its default settings sends

_NEVER = "the server was never reached: does it run, and is this its URL?"


class Transport:
    """Connections to one server, with the signatures read from it and the locks of its sessions.

    Args:
        url: URL of the server.
        api_key: Key to send, if any.
        timeout: How long one attempt may take.
        retry: How a request without an answer is repeated.
        max_answer_bytes: The largest answer that is read.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        timeout: Timeout,
        retry: Retry,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        scheme = httpx.URL(url).scheme
        if scheme not in ("http", "https") or not httpx.URL(url).host:
            raise ValueError(f"url: {url!r} is not the URL of a server: give one like http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self.timeout = timeout
        self.retry = retry
        self._max_answer_bytes = max_answer_bytes
        self.reached = False  # whether there has ever been a connection to the server
        self.signatures = SignatureCache()
        self.locks = SessionLocks()
        self._http = httpx.Client(
            base_url=self.url,
            headers=self.headers,
            verify=scheme == "https",  # the certificates take 50 ms to load
            # No limit on waiting for a connection of the pool: the requests that hold them have limits of their own.
            timeout=httpx.Timeout(timeout.answer, connect=timeout.connect, pool=None),
        )

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def send(self, request: HttpRequest, retry: Retry | None = None) -> HttpResponse:
        """Sends a request, repeating it until it is answered.

        Raises:
            Problem: The server answered with a problem.
            RetriesExhausted: There was no answer.
        """
        backoff = Backoff(retry or self.retry)
        while True:
            try:
                return self.send_once(request).raise_for_problem()
            except CellserveError as error:
                delay = backoff.delay_after(error)
            sleep(delay)

    def send_once(self, request: HttpRequest) -> HttpResponse:
        """Sends a request and returns the response, whatever its status; raises ConnectionLost, AnswerTooLarge."""
        try:
            response = self._http.send(self._build(request), stream=True)
            self.reached = True
            return self._read(response)
        except httpx.TransportError as error:
            raise self._lost(error) from error

    def open_events(self, request: HttpRequest) -> EventStream | HttpResponse:
        """Sends a request once; returns the response if its status is not a success.

        Raises:
            ConnectionLost: There was no answer.
            AnswerTooLarge: It is larger than `max_answer_bytes`.
        """
        try:
            response = self._http.send(self._build(request), stream=True)
            self.reached = True
            if response.status_code < 300:
                return EventStream(response, self._max_answer_bytes)
            return self._read(response)
        except httpx.TransportError as error:
            raise self._lost(error) from error

    def open_socket(self) -> Socket:
        """Opens a WebSocket; raises ConnectionLost, or the Problem that the server answered with."""
        try:
            socket = Socket.open(self.url, self.headers, self.timeout, self._max_answer_bytes)
        except ConnectionLost as error:
            cause = error.__cause__
            if self.reached or not isinstance(cause, OSError) or isinstance(cause, ConnectionResetError):
                raise
            raise NeverReached(f"{error}; {_NEVER}") from cause
        self.reached = True
        return socket

    def describe(self, model: str) -> dict[str, Any]:
        """Returns the answer to `GET /models/{name}`."""
        response = self.send(HttpRequest("GET", path_of("models", model)))
        return response.json()

    def signature(self, model: str, version: int | None = None) -> Signature:
        """Returns the signature of a version; without one, of the version in the name, or else of the newest."""
        name = model if version is None else f"{model}:{version}"
        known = self.signatures.get(name)
        if known is None:
            known = Signature.read(self.describe(name))
            self.signatures.remember(name, known)
        return known

    def open(self, session: SessionRecord) -> None:
        """Creates a session, or reads its position, unless that has been done."""
        if session.position is not None:
            return
        name = session.model
        session.update(self.send(session.open_request()).json())
        if name is not None and session.version is not None:
            self.signatures.forget_if_outdated(name, session.version)

    def _read(self, response: httpx.Response) -> HttpResponse:
        """Returns a response with its body, and lets its connection go; raises AnswerTooLarge."""
        parts, size = [], 0
        try:
            for part in response.iter_bytes():
                size += len(part)
                if size > self._max_answer_bytes:
                    raise AnswerTooLarge(self._max_answer_bytes)
                parts.append(part)
        finally:
            response.close()
        return HttpResponse(response.status_code, response.headers, b"".join(parts))

    def _build(self, request: HttpRequest) -> httpx.Request:
        headers = {"content-type": request.media_type} if request.media_type else {}
        return self._http.build_request(
            request.method,
            request.path,
            params=request.params,
            content=request.content,
            headers=headers | dict(request.headers),
        )

    def _lost(self, error: httpx.TransportError) -> Exception:
        """Returns what to raise when there was no answer."""
        if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
            return ValueError(f"the request cannot be sent: {error}")  # a key with a line break in it, say
        told = f"{self.url}: {str(error) or type(error).__name__}"
        if self.reached or not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ConnectionLost(told)
        return NeverReached(f"{told}; {_NEVER}")
