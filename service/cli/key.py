"""The command `cellserve key`: draws an API key for an owner, and notes its hash in the file that the service reads."""

from __future__ import annotations

import argparse
import hashlib
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """\
example:
  cellserve key alice --file keys.txt
  cellserve serve --api-keys-file keys.txt

The key is printed once; the file holds only its hash. To take a key away, delete its line: a running server notices.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a new key and appends its line to the file; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="cellserve key",
        description="Draws an API key for an owner and appends its hash to a file of keys.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("owner", help="whose sessions the key opens: letters, digits, '.', '_' and '-', 64 at most")
    parser.add_argument("--file", type=Path, required=True, help="the file to append to; it is made if need be")
    given = parser.parse_args(argv)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given.owner):
        parser.error(f"owner: {given.owner!r} has other characters than letters, digits, '.', '_' and '-', or over 64")
    key = secrets.token_urlsafe(32)
    try:
        with given.file.open("a") as lines:
            lines.write(f"{given.owner}:{hashlib.sha256(key.encode()).hexdigest()}\n")
        given.file.chmod(0o600)
    except OSError as error:
        print(f"cellserve key: {error}", file=sys.stderr)
        return 1
    print(key)
    return 0
