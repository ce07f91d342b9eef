"""`python -m cellserve.export`, which is `cellserve export`."""

from __future__ import annotations

import sys

from cellserve.export.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
