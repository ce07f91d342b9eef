"""The server under load: where it is, and requests to it as bytes."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cellserve.errors import problem_of_body

if TYPE_CHECKING:
    import httpx

_SECONDS = 30  # for an answer to a question that is not part of a load


class BenchFailed(Exception):
    """What ends the benchmark, in one line."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answers, with its address resolved.

    Attributes:
        url: URL of the server, without a slash at its end.
        host: Its address as a number.
        port: Its port.
        tls_name: The name that its certificate must have; None for plain HTTP.
        key: API key to send, if any.
    """

    url: str
    host: str
    port: int
    tls_name: str | None
    key: str | None

    @classmethod
    def at(cls, url: str, key: str | None) -> Target:
        """Returns the server at a URL; raises BenchFailed if nothing listens there."""
        wrong = BenchFailed(f"--url: {url!r} is not the URL of a server: give one like http://127.0.0.1:8000")
        try:
            parsed = urlsplit(url)
            port = parsed.port or (443 if parsed.scheme == "https" else 80)
        except ValueError:
            raise wrong from None
        if parsed.scheme not in ("http", "https") or not parsed.hostname:
            raise wrong
        try:
            with socket.create_connection((parsed.hostname, port), timeout=5) as connection:
                address = connection.getpeername()[0]
        except OSError as error:
            raise BenchFailed(f"nothing answers at {url}: {error.strerror or error}: is the server running?") from None
        return cls(url.rstrip("/"), address, port, parsed.hostname if parsed.scheme == "https" else None, key)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request: the key, if there is one."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        """Returns the head of an HTTP request, without the empty line at its end."""
        url = urlsplit(self.url)
        lines = [f"{method} {url.path.rstrip('/')}{path} HTTP/1.1", f"Host: {url.netloc.rpartition('@')[2]}"]
        lines += [f"{name}: {value}" for name, value in {**self.headers, **headers}.items()]
        return "".join(f"{line}\r\n" for line in lines).encode()

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Returns an HTTP request, with a JSON body if there is one."""
        kind = {"Content-Type": "application/json"} if body else {}
        return self.head(method, path, kind) + content(body)

    def ask(self, path: str) -> httpx.Response:
        """Returns the answer to a GET request, whatever its status; raises BenchFailed if there is none."""
        import httpx  # here and not above, so that the generators, which do not ask, start sooner

        url = path if "://" in path else self.url + path
        try:
            # As the generators have it: the system's certificates, and no proxy.
            trusted = ssl.create_default_context() if self.tls_name else True
            return httpx.get(url, headers=self.headers, timeout=_SECONDS, trust_env=False, verify=trusted)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BenchFailed(f"{url}: {str(error) or type(error).__name__}") from None

    def model_config(self, path: str) -> dict[str, Any]:
        """Returns what Triton's extension of the Open Inference Protocol tells of a model; nothing where it is missing.

        Args:
            path: Path of the model's metadata.
        """
        answer = self.ask(f"{path}/config")
        try:
            return dict(answer.json()) if answer.status_code == 200 else {}
        except (ValueError, TypeError):
            return {}

    def ask_json(self, path: str) -> Any:
        """Returns the JSON document at a path; raises BenchFailed if the answer is an error or not JSON."""
        answer = self.ask(path)
        if answer.status_code == 401:
            raise BenchFailed(f"{self.url}: 401: the server requires a key that it knows: give one with --key")
        if answer.status_code >= 300:
            raise BenchFailed(f"{self.url}{path}: {reason(answer.status_code, answer.content)}")
        try:
            return answer.json()
        except ValueError:
            raise BenchFailed(f"{self.url}{path}: the answer is not JSON: is this the URL of the server?") from None


def content(body: bytes) -> bytes:
    """Returns the end of an HTTP request: its length, an empty line and its body."""
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def reason(status: int, body: bytes) -> str:
    """Returns a status with what an error's body says, as one short line."""
    problem = problem_of_body(status, body)
    told = problem.detail or str(problem.extensions.get("error", "")) or problem.title  # "error": as `/v2` has it
    return f"{status}: {' '.join(told.split())}"[:300]
