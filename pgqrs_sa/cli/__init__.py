"""The command line, ``pgqrs``; ``python -m pgqrs_sa`` is the same. It needs the extra ``cli``.

The commands are described in ``docs/reference/cli.md`` and by ``pgqrs --help``. The group can be
mounted in a host's own click program, for example Flask's::

    import pgqrs_sa.cli

    app.cli.add_command(pgqrs_sa.cli.group)         # flask pgqrs queue list

=================  ==============================================================================
`app`              the base classes of commands and groups, the `App` that they get, and its `Log`
`root`             the group ``pgqrs`` itself: which command is in which module
`output`           table, json, ndjson and csv; ``--watch``
`connection`       the engine of a command, and hints for a failed connection
`application`      ``module:attribute``, as the consumer of an application
`failures`         errors to exit codes and one line
`params`           durations, times, payloads; global options, and those that several commands
                   share; the question before anything is destroyed, and work in chunks
`views`            values to rows with stable keys
`queries`          criteria for what the commands ask of the service
=================  ==============================================================================

Nothing here imports SQLAlchemy, Alembic or rich before a command needs it: ``--help`` and shell
completion answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .root import group

__all__ = ["group", "main"]

MISSING = "error: the command line needs click and rich\nhint: pip install 'pgqrs-sa[cli]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    Args:
        arguments: Without the program's name; default: those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(given)
    except KeyboardInterrupt:  # during an import, where nothing else catches it
        print("error: interrupted", file=sys.stderr)  # noqa: T201
        return 130


def _main(arguments: list[str]) -> int:
    if find_spec("click") is None:
        return _without_click(arguments)
    from .app import run  # noqa: PLC0415 - it needs the extra `cli`
    from .root import group  # noqa: PLC0415

    return run(group, arguments)


def _without_click(arguments: Sequence[str]) -> int:
    """Run the demo, which does not need click; for other commands print what to install."""
    if arguments == ["demo"]:
        from ..demo import run  # noqa: PLC0415 - it needs the extra `embedded`

        return run()
    print(MISSING, file=sys.stderr)  # noqa: T201
    return 2


def __getattr__(name: str) -> Any:
    if name == "group":
        from .root import group  # noqa: PLC0415 - it needs the extra `cli`

        return group
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
