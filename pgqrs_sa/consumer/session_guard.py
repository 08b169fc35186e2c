"""A handler's transaction, which is not the handler's to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import NoReturn

from sqlalchemy.orm import Session

from ..errors import TransactionRefused
from .handlers import Handler

__all__ = ["forbid_commit"]


@contextmanager
def forbid_commit(session: Session, handler: Handler) -> Iterator[None]:
    """Refuse the commit, rollback and close of a session while its handler is called.

    A commit would keep what the handler wrote although the message is not settled, and the next
    attempt would write it again. It is refused before it happens. A handler with
    ``acknowledge="first"`` or ``"manual"`` may do so: no end of a message commits with its writes.

    Args:
        session: The handler's; of an ``AsyncSession`` its ``sync_session``.
        handler: Which.
    """
    if handler.acknowledge != "commit":
        yield
        return
    # In place of the methods of this object: listeners of events cost several times as much for
    # each message, and there is none before a rollback.
    refusals = _refusals(handler.name)
    vars(session).update(refusals)
    try:
        yield
    finally:
        for name in refusals:
            vars(session).pop(name, None)


@cache
def _refusals(handler: str) -> dict[str, Callable[[], NoReturn]]:
    return {name: partial(_refuse, name, handler) for name in ("commit", "rollback", "close")}


def _refuse(method: str, handler: str) -> NoReturn:
    raise TransactionRefused(method, handler)
