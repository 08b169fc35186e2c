"""``python -m pgqrs_sa``: the command line, the same as ``pgqrs``."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
