"""The decisions of a handler about its message: raise one of these, or return it.

Raised, it rolls the handler's writes back, and is then carried out by itself. Returned, it is
carried out in the transaction of the handler's writes, and commits with them.
"""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

from . import validation
from .errors import Copyable
from .types import Seconds

__all__ = ["DeadLetter", "Decision", "Discard", "RetryIn", "Snooze"]


class Decision(Copyable, Exception):
    """Base of the decisions that a handler may raise or return."""


class _Delayed(Decision):
    _text: ClassVar[str]

    def __init__(self, delay: Seconds) -> None:
        self.delay: timedelta = validation.validate_duration(delay)
        super().__init__(f"{self._text} {self.delay.total_seconds():g} s")


class RetryIn(_Delayed):
    """Try again after a while. The attempt counts; after the last attempt the message is dead.

    Args:
        delay: Seconds, or a timedelta.
    """

    _text = "again in"


class Snooze(_Delayed):
    """Postpone the message without counting this attempt.

    Args:
        delay: Seconds, or a timedelta.
    """

    _text = "not for"


class Discard(Decision):
    """Give the message up on purpose: it is kept in the archive as ``discarded``.

    Args:
        reason: Kept with it.
    """

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        super().__init__(reason or "discarded")


class DeadLetter(Decision):
    """Make it a dead letter now, even if attempts are left.

    Args:
        reason: Kept with it.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)
