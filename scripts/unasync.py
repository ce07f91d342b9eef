"""Generates `cellserve/_sync` from `cellserve/_async`: `python scripts/unasync.py`, with `--check` only compares.

The habit is httpcore's (https://github.com/encode/httpcore/blob/master/scripts/unasync.py).
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TARGET = ROOT / "cellserve/_async", ROOT / "cellserve/_sync"
BY_HAND = ("__init__.py", "concurrency.py", "socket.py")  # what threads do otherwise than tasks
RULES = [
    (r"\(await ([\w.]+\((?:[^()]|\([^()]*\))*\))\)\.", r"\1."),
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\b__a(enter|exit|iter|next)__\b", r"__\1__"),
    (r"\ba(close|read|iter_bytes|next)\b", r"\1"),
    (r"\b(Abstract|Stop)?Async([A-Z])", lambda match: (match[1] or "") + match[2]),
    (r"\bcellserve\._async\b", "cellserve._sync"),
    (r"\bthe tasks of one event loop\b", "threads, which may share it"),
    (r"\bTasks\b", "Threads"),
]


def generate(source: Path) -> str:
    """Returns the synchronous form of a file, formatted."""
    text = source.read_text()
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)  # type: ignore[arg-type]
    text = f"# Generated from _async/{source.name} by scripts/unasync.py: edit that file.\n{text}"
    for command in (["check", "--quiet", "--select", "I,UP028", "--fix", "--unsafe-fixes"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(TARGET / source.name), "-"]
        text = subprocess.run(ruff, input=text, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return text


def main(check: bool) -> int:
    """Writes the files, or compares them; returns the exit status."""
    outdated = []
    for source in sorted(SOURCE.glob("*.py")):
        if source.name in BY_HAND:
            continue
        text, target = generate(source), TARGET / source.name
        if target.exists() and target.read_text() == text:
            continue
        outdated.append(target.name)
        if not check:
            target.write_text(text)
    if check and outdated:
        print(f"cellserve/_sync: {', '.join(outdated)} out of date: python scripts/unasync.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
