"""``python -m pgqrs_sa demo``."""

from __future__ import annotations

import sys

USAGE = "usage: python -m pgqrs_sa demo"


def main(arguments: list[str]) -> int:
    """Run the demo; return the exit code."""
    if arguments != ["demo"]:
        print(USAGE, file=sys.stderr)  # noqa: T201
        return 2
    from .demo import run  # noqa: PLC0415 - it needs the extra `embedded`

    return run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
