"""The command `cellserve key`: generates an API key, and appends its hash to the file that the service reads."""

from __future__ import annotations

import argparse
import hashlib
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from cellserve.service.access.private_files import append_private

EPILOG = """\
example:
  cellserve key alice --file keys.txt
  cellserve serve --api-keys-file keys.txt

The key is printed once; the file holds only its hash. To revoke a key, delete its line: a running server notices.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a new key and appends its line to the file; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="cellserve key",
        description="Generates an API key for an owner and appends its hash to a file of keys.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("owner", help="the owner of the key's sessions: 1 to 64 letters, digits, '.', '_' and '-'")
    parser.add_argument("--file", type=Path, required=True, help="the file to append to; created if missing")
    given = parser.parse_args(argv)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given.owner):
        parser.error(f"owner: {given.owner!r} must be 1 to 64 letters, digits, '.', '_' and '-'")
    key = f"cs_{secrets.token_urlsafe(32)}"  # a first '-' would make an option of it on command lines
    try:
        with append_private(given.file) as lines:
            lines.write(f"{given.owner}:{hashlib.sha256(key.encode()).hexdigest()}\n".encode())
    except OSError as error:
        print(f"cellserve key: {error}", file=sys.stderr)
        return 1
    print(key)
    return 0
