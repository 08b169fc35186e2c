"""A process that was forked in a handler, and has come back from it."""

from __future__ import annotations

import logging
import os

__all__ = ["end_child"]

log = logging.getLogger("pgqrs_sa.consumer")


def end_child(parent: int, error: BaseException | None = None) -> None:
    """End this process, unless it is the one that has called the handler.

    A child of a fork has the thread of the handler, and no other: nobody would settle or lease
    there. It must not go on to a commit or a rollback either, which would be sent over the
    connection of its parent.

    Args:
        parent: The number of the process that has called the handler.
        error: What the handler raised. The exit code is that of a ``SystemExit``, otherwise 1.
    """
    if os.getpid() == parent:
        return
    code: object = 1
    if isinstance(error, SystemExit):
        code = 0 if error.code is None else error.code
    if code != 0:
        log.critical(
            "process %d was forked in a handler of process %d, and came back from it: it ends "
            "here, since the consumer is the parent's. Call os._exit() in the child",
            os.getpid(),
            parent,
            exc_info=error,
        )
    os._exit(code if isinstance(code, int) else 1)
