"""A hook of MkDocs: pages link to files in `deploy/`, which the site has too."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\]\(\.\./\.\./(deploy/[\w./-]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of `deploy/`."""
    for file in _tracked("deploy"):
        files.append(File.generated(config, file, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Makes links to them lead to the copies in the site; a folder's to its first file."""
    return _LINK.sub(lambda link: f"](../{_tracked(link[1])[0]})", markdown)


def _tracked(path: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", path], cwd=ROOT, check=True, capture_output=True, text=True)
    return listed.stdout.split()
