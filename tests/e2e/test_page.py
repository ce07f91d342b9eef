"""The page's files: their types, caching, and the headers that keep the page to its server."""

from __future__ import annotations

import re

import httpx

from tests.helpers import ROOT
from tests.server import Serve

TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def test_each_file_of_the_page_has_its_type_its_etag_and_a_strict_policy(client: httpx.Client) -> None:
    files = {path.name for path in (ROOT / "service/ui").iterdir()} - {"index.html"}
    paths = {"": "text/html", **{f"ui/{name}": TYPES[name.rpartition(".")[2]] for name in files}}
    for path, media_type in paths.items():
        answer = client.get(f"/{path}")
        assert answer.headers["content-type"] == f"{media_type}; charset=utf-8"
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';") and "unsafe" not in policy
        etag = answer.headers["etag"]
        again = client.get(f"/{path}", headers={"if-none-match": f'"other", W/{etag}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert client.head(f"/{path}").headers["content-length"] == str(len(answer.content))
        assert client.post(f"/{path}").status_code == 405
    assert client.get("/ui/").status_code == client.get("/ui/..%2fapp.py").status_code == 404


def test_no_page_of_another_site_shows_the_page_of_the_api_in_a_frame(client: httpx.Client) -> None:
    headers = client.get("/docs").headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert policy["default-src"] == "'self'" and headers["x-content-type-options"] == "nosniff"


def test_the_page_names_no_other_host_and_has_no_inline_script_or_style(client: httpx.Client) -> None:
    page = client.get("/").text
    assert all(not address.startswith(("/", "http")) for address in re.findall(r'(?:href|src)="([^"]*)"', page))
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", page)


def test_without_the_page_its_paths_are_unknown(serve: Serve, repository: object) -> None:
    with serve("--models", str(repository), "--no-page").client() as client:
        assert client.get("/").status_code == client.get("/ui/app.js").status_code == 404
        assert client.get("/models").status_code == 200
