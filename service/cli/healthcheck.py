"""The container's health check: asks `/readyz` of the server that is the container's first process.

It runs every few seconds beside the server, so it imports little.
"""

from __future__ import annotations

import argparse
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

_ANYWHERE = ("0.0.0.0", "::", "")


def main() -> int:
    """Returns 0 if the server is ready, otherwise 1 after a line that says why."""
    first = Path("/proc/1/cmdline").read_bytes().decode(errors="replace").split("\0")
    url = ready_url(first, os.environ)
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except (OSError, urllib.error.URLError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1
    return 0


def ready_url(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Returns the URL of `/readyz`, from the server's flags and variables.

    Args:
        command: The command of the server, whatever its first words are.
        environment: The variables that the server has too.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--host", default=environment.get("CELLSERVE_HOST", ""))
    parser.add_argument("--port", default=environment.get("CELLSERVE_PORT", "8000"))
    given, _ = parser.parse_known_args([word for word in command if word != "--"])  # an init's: its command follows
    host = "127.0.0.1" if given.host in _ANYWHERE else given.host
    return f"http://{f'[{host}]' if ':' in host else host}:{given.port}/readyz"


if __name__ == "__main__":
    sys.exit(main())
