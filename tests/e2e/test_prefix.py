"""Behind a real nginx that publishes the server under a path, as docs/how-to/deployment.md shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect
from websockets.typing import Origin

from tests.e2e.helpers import ask
from tests.nginx import PREFIX, published
from tests.server import Server, start_server


@pytest.fixture(scope="module")
def behind(repository: Path) -> Iterator[Server]:
    server = start_server("--models", str(repository), "--root-path", PREFIX, "--trusted-proxies", "127.0.0.1")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def nginx(behind: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL; the server is there under the prefix, and under `/` as deploy/nginx.conf has it."""
    with published(behind.url, tmp_path_factory.mktemp("nginx")) as url:
        yield url


def test_every_address_that_an_answer_names_leads_back_through_the_proxy(nginx: str) -> None:
    with httpx.Client() as client:
        base = nginx + PREFIX
        for method, path in (("POST", "/sessions"), ("PUT", "/sessions/mine"), ("POST", "/sessions/mine/fork")):
            body = {} if path.endswith("fork") else {"model": "lstm"}
            created = client.request(method, base + path, json=body)
            assert created.status_code == 201, created.text
            found = client.get(httpx.URL(nginx).join(created.headers["location"]))
            assert found.json()["session"] == created.json()["session"]
        redirected = client.get(f"{base}/docs/")
        assert redirected.headers["location"] == f"{base}/docs"
        page = client.get(redirected.headers["location"])
        for address in re.findall(r"(?:href|src)=\"(.*?)\"|url: '(.*?)'", page.text):
            assert client.get(page.url.join("".join(address))).status_code == 200, address
        assert "http" not in "".join("".join(one) for one in re.findall(r"(?:href|src)=\"(.*?)\"", page.text))
        document = client.get(f"{base}/openapi.json").json()
        assert document["servers"] == [{"url": PREFIX}]
        predicted = client.post(f"{base}/predict", json={"model": "lstm", "sequences": [[[0.5] * 5]]})
        assert predicted.status_code == 200
        assert client.post(f"{base}/sessions/mine/step", json={"x": [0.5] * 5}).json()["position"] == 1
        assert client.get(f"{base}/v2/models/lstm").status_code == client.get(f"{base}/models/lstm").status_code == 200
        assert client.get(f"{base}/nothing").status_code == 404


def test_a_socket_opens_through_the_proxy_for_a_page_of_the_proxys_origin(nginx: str) -> None:
    with connect(nginx.replace("http", "ws") + PREFIX + "/stream", origin=Origin(nginx)) as stream:
        assert ask(stream, op="open", model="lstm")["op"] == "open"


def test_the_scheme_is_what_a_trusted_proxy_forwards(behind: Server) -> None:
    headers = {"host": "public.example", "x-forwarded-proto": "https"}
    assert httpx.get(f"{behind.url}/docs/", headers=headers).headers["location"] == (
        f"https://public.example{PREFIX}/docs"
    )
    transport = httpx.HTTPTransport(local_address="127.0.0.2")  # not a trusted one
    with httpx.Client(transport=transport) as client:
        location = client.get(f"{behind.url}/docs/", headers=headers).headers["location"]
    assert location == f"http://public.example{PREFIX}/docs"


def test_the_shipped_configuration_publishes_nothing_for_operators(nginx: str) -> None:
    with httpx.Client(follow_redirects=True) as client:
        for base in (nginx, nginx + PREFIX):
            for path in ("/metrics", "//metrics", "/%6detrics", "/./metrics", "/x/../metrics", "/metrics/"):
                assert client.get(base + path).status_code == 404, path
            assert client.post(f"{base}/models/reload").status_code == 404
