"""The decisions about a message: those of its handler, and of its `Retry` when the handler failed.

A handler raises a decision, or returns it. Raised, it rolls the handler's writes back, and is then
carried out by itself. Returned, it is carried out in the transaction of the handler's writes, and
commits with them. Pure: no clock, no I/O.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, ClassVar, Literal, TypeAlias

from . import validation
from .errors import Copyable, InvalidArgument, safe_repr
from .types import Delivery, Seconds

__all__ = [
    "DEFAULT_BACKOFF",
    "Backoff",
    "DeadLetter",
    "Decide",
    "Decision",
    "Discard",
    "Retry",
    "RetryIn",
    "Snooze",
]


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


Decide: TypeAlias = Callable[[Any, Delivery], Decision | None]
"""A function that returns a decision for an exception and its delivery."""


_LONGEST = 100 * 365 * 86_400.0  # a hundred years, in seconds


def _finite(value: object) -> bool:
    # An integer may be larger than any float.
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with a cap and jitter.

    The wait before attempt ``n + 1`` is ``base * factor ** (n - 1)`` seconds, at most ``cap``. A
    random change of up to ``jitter`` times the wait, in either direction, spreads messages that
    failed together (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Attributes:
        base: The wait after the first failed attempt, in seconds.
        factor: The factor by which each further attempt multiplies the wait.
        cap: The longest wait, in seconds, before jitter.
        jitter: The random part of a wait, from 0 (none) to 1.
    """

    base: float = 10.0
    factor: float = 2.0
    cap: float = 3600.0
    jitter: float = 0.1

    def __post_init__(self) -> None:
        numbers = (self.base, self.factor, self.cap, self.jitter)
        if (
            not all(map(_finite, numbers))
            or not 0 <= self.base <= _LONGEST
            or not 0 <= self.cap <= _LONGEST
            or self.factor < 1
            or not 0 <= self.jitter <= 1
        ):
            raise InvalidArgument(
                f"{self} is not a backoff: base and cap are 0 to {_LONGEST:.0f} seconds, factor "
                "is 1 or more, jitter 0 to 1, and all of them finite"
            )

    def delay(self, attempt: int) -> timedelta:
        """Return the wait after ``attempt`` attempts have failed (the first is 1)."""
        wait = min(self.cap, self._growing(max(attempt, 1) - 1))
        spread = self.jitter * (2 * random.random() - 1)  # noqa: S311 - not a secret
        return timedelta(seconds=wait * (1 + spread))

    def _growing(self, steps: int) -> float:
        if self.base == 0:
            return 0.0
        try:
            return self.base * math.pow(self.factor, steps)
        except OverflowError:
            return math.inf


DEFAULT_BACKOFF = Backoff()
"""10 s, 20 s, 40 s ... up to an hour, each with a jitter of a tenth."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How to retry a message whose handler raised.

    Attributes:
        max_attempts: The number of attempts before a message is dead. Default: the queue's
            ``max_read_ct``. A message that was enqueued with its own limit keeps that.
        backoff: How the wait grows: ``constant``, ``linear`` or ``exponential`` (doubling).
        base: The wait after the first failed attempt, in seconds.
        cap: The longest wait, in seconds, before jitter.
        jitter: The random part of a wait, in either direction, from 0 (none) to 1.
        on: Decisions by type of exception; the nearest base class applies. A decision is an
            instance (``DeadLetter("no such user")``), or a function that takes the exception and
            the delivery, and returns a decision, or None for the backoff. For an exception group,
            the decision for its first member applies, if each member has one. A key that is a
            class of groups takes precedence.
    """

    max_attempts: int | None = None
    backoff: Literal["constant", "linear", "exponential"] = "exponential"
    base: float = 10.0
    cap: float = 3600.0
    jitter: float = 0.1
    on: Mapping[type[BaseException], Decision | Decide] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backoff not in ("constant", "linear", "exponential"):
            raise InvalidArgument(
                f"backoff must be 'constant', 'linear' or 'exponential', not {self.backoff!r}"
            )
        if self.max_attempts is not None:
            validation.validate_limit(self.max_attempts, "max_attempts")
        if not isinstance(self.on, Mapping):
            raise InvalidArgument(
                f"on must be a dict of decisions by exception class, not {safe_repr(self.on)}"
            )
        for kind, decision in self.on.items():
            if not (isinstance(kind, type) and issubclass(kind, BaseException)):
                raise InvalidArgument(f"on must have exception classes as keys, not {kind!r}")
            if not (isinstance(decision, Decision) or _decides(decision)):
                raise InvalidArgument(
                    f"on[{kind.__name__}] must be RetryIn, Snooze, Discard or DeadLetter, or a "
                    f"function that returns one, not {decision!r}"
                )
        self._growth()

    def delay(self, attempt: int) -> timedelta:
        """Return the wait after ``attempt`` attempts have failed (the first is 1)."""
        growth = self._growth()
        if self.backoff == "linear":
            # The jitter of a constant wait, applied to a wait that grows with the attempts.
            growth = replace(growth, base=min(self.cap, self.base * max(attempt, 1)))
        return growth.delay(attempt)

    def decide(self, error: BaseException, delivery: Delivery) -> Decision:
        """Return the decision for an error: the error itself, that of ``on``, or the backoff."""
        return self._decision(error, delivery) or RetryIn(self.delay(delivery.read_ct))

    def _decision(self, error: BaseException, delivery: Delivery) -> Decision | None:
        if isinstance(error, Decision):
            return error
        if isinstance(error, BaseExceptionGroup) and not self._has_groups(error):
            members = [self._decision(member, delivery) for member in error.exceptions]
            return None if None in members else members[0]
        for kind in type(error).__mro__:
            if (found := self.on.get(kind)) is not None:
                return found if isinstance(found, Decision) else found(error, delivery)
        return None

    def _has_groups(self, error: BaseException) -> bool:
        """Return whether ``on`` has a key that is a class of groups of this error."""
        return any(
            issubclass(kind, BaseExceptionGroup) for kind in type(error).__mro__ if kind in self.on
        )

    def _growth(self) -> Backoff:
        factor = 2.0 if self.backoff == "exponential" else 1.0
        return Backoff(self.base, factor, self.cap, self.jitter)


def _decides(value: object) -> bool:
    # A class of decisions is callable, too, but would get the exception as its delay.
    return callable(value) and not isinstance(value, type)
