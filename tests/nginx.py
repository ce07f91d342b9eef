"""A real nginx that publishes a server under a path, as docs/how-to/deployment.md shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.helpers import ROOT, free_port, until

PREFIX = "/cellserve"


@contextmanager
def published(server_url: str, folder: Path) -> Iterator[str]:
    """Runs nginx, and yields its URL: the server is there under PREFIX, and under `/` as deploy/nginx.conf has it."""
    port = free_port()
    (location,) = re.findall(r"^```nginx\n(.*?)^```", (ROOT / "docs/how-to/deployment.md").read_text(), re.M | re.S)
    text = (ROOT / "deploy/nginx.conf").read_text().replace("/tmp/nginx", str(folder / "nginx"))
    text = re.sub(r"replica-\d:8000", server_url.removeprefix("http://"), text)
    text = text.replace("listen 8080", f"listen 127.0.0.1:{port}").replace("location / {", f"{location}location / {{")
    (folder / "nginx.conf").write_text(text)
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    nginx = subprocess.Popen([program, "-p", folder, "-c", folder / "nginx.conf", "-g", "daemon off;"])
    url = f"http://127.0.0.1:{port}"
    until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
    yield url
    nginx.terminate()
    nginx.wait()
