"""docs/client.md matches the code: its examples run, in their order, against a real server."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from cellserve import errors
from tests.helpers import ROOT
from tests.kinds import write_repository
from tests.server import Serve

TEXT = (ROOT / "docs/client.md").read_text()


def test_the_pages_examples_run(examples: Path, tmp_path: Path, serve: Serve) -> None:
    models = write_repository(tmp_path / "models")
    for model in examples.iterdir():
        shutil.copytree(model, models / model.name)
    url = serve("--models", str(models)).url
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    assert len(blocks) > 4
    opened = []
    for block in blocks:
        exec(compile(block.replace("http://127.0.0.1:8000", url), "docs/client.md", "exec"), names)
        opened.append(names["client"])
    for client in opened:
        client.close()  # type: ignore[attr-defined]
    assert names["session"].position == 1  # type: ignore[attr-defined]


def test_the_exceptions_that_the_page_names_exist() -> None:
    named = re.findall(r"^\| (`\w+`.*?) \|", TEXT, re.M)
    names = [name for cell in named for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) > 10 and all(issubclass(getattr(errors, name), errors.CellserveError) for name in names)
