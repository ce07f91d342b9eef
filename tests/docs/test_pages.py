"""Every command and snippet of README and the docs works as it stands, and works again.

What stands here is what differs: see `NOT_RUN`, and `stand_ins/` for the commands that behave otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.reader import Reader
from tests.docs.snippets import Output, same, snippets
from tests.helpers import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
# These export, adopt or measure.
SLOW = {
    "adopt",
    "benchmark",
    "export",
    "several-inputs",
    "production",
    "from-triton",
    "from-tf-serving",
    "from-flask",
    "store",
}

# Lines of shell snippets that no test of this machine runs, and why.
NOT_RUN = {
    r"^python3 -m venv|^\. \.venv/bin/activate": "makes an environment, which whoever runs this test has",
    r"^docker ": "needs a container engine: `make container-test` runs the tutorial's, and the like of the others",
    r"^perf_analyzer ": "needs glibc 2.38; was run by hand",
    r"http://(triton|cellserve):8000": "needs other machines",
    r"python3 -m cellserve.cli serve --provider cuda|python -m bench --provider cuda": "needs a GPU",
    r"python -m bench --provider cpu": "takes minutes: `make test-long` rehearses the same code",
}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def reader(examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    (tmp_path / "cellserve").symlink_to(ROOT)
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    reader = Reader(folder, examples, NOT_RUN, os.environ.get("ENGINE"))
    yield reader
    reader.close()


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in SLOW], ids=name)
def test_a_page_can_be_followed(page: Path, reader: Reader) -> None:
    reader.read(page)


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_can_be_followed_twice(page: Path, reader: Reader) -> None:
    reader.read(page)
    reader.read(page)


@pytest.mark.container
def test_the_tutorial_can_be_followed_with_containers(reader: Reader) -> None:
    assert "ENGINE" in os.environ, "`make container-test` names an engine"
    reader.not_run = {pattern: reason for pattern, reason in NOT_RUN.items() if "container" not in reason}
    reader.read(ROOT / "docs/tutorial/production.md")


def test_each_reason_for_not_running_a_line_is_still_needed() -> None:
    lines = [line for page in PAGES for snippet in snippets(page) for line in snippet.text.splitlines()]
    assert not [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in lines)]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_no_page_installs_what_nobody_has_published(page: Path) -> None:
    assert not re.findall(r"pip install[^`\n]*(?<!/)\bcellserve\b", page.read_text())


def test_what_is_printed_must_be_what_a_page_shows() -> None:
    """Else the tests above could not fail."""
    shown = Output("json", '{"session":"56a4dbfe9d1e5634da2529fe3474ad9a","y":[77.05]}')
    assert same(shown, '{"session":"00000000000000000000000000000000","y":[77.1]}\n')
    assert not same(shown, '{"session":"00000000000000000000000000000000","y":[87.1]}')
    assert not same(shown, '{"session":"00000000000000000000000000000000","x":[77.05]}')
    assert same(Output("text", "adopted vad/1\n... us"), "reading\nadopted vad/2\nin 3 us")
    assert not same(Output("text", "adopted vad/1"), "adopted vad/1 in a way")
    assert same(Output("text", "us a run  1x1 83, 64x1 1938"), "us a run     1x1 403, 64x1 5804  \n")
    assert not same(Output("text", "us a run  1x1 83"), "us a run  1x2 83")
