"""A handler's transaction, which is not the handler's to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from sqlalchemy.orm import Session

from ..errors import TransactionRefused
from .handlers import Handler

__all__ = ["kept_open"]

_ENDS = ("commit", "rollback", "close")


@contextmanager
def kept_open(session: Session, handler: Handler) -> Iterator[None]:
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
    # In place of the methods of this object: listeners of events cost ten times as much for each
    # message, and there is none before a rollback.
    for name in _ENDS:
        setattr(session, name, _refusal(name, handler.name))
    try:
        yield
    finally:
        for name in _ENDS:
            delattr(session, name)


def _refusal(method: str, handler: str) -> Callable[[], NoReturn]:
    def refuse() -> NoReturn:
        raise TransactionRefused(method, handler)

    return refuse
