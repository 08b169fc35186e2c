"""How long a failed message waits before its next attempt. Pure: no clock, no I/O."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from datetime import timedelta

from .errors import InvalidArgument

__all__ = ["DEFAULT_BACKOFF", "Backoff"]


_LONGEST = 100 * 365 * 86_400.0  # a hundred years, in seconds


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with a cap and jitter.

    The wait before attempt ``n + 1`` is ``base * factor ** (n - 1)`` seconds, at most ``cap``,
    moved by up to ``jitter`` of itself either way so that messages which failed together do not
    return together (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Attributes:
        base: Seconds after the first failed attempt.
        factor: What each further attempt multiplies the wait by.
        cap: The longest wait, in seconds, before jitter.
        jitter: From 0 (none) to 1.
    """

    base: float = 10.0
    factor: float = 2.0
    cap: float = 3600.0
    jitter: float = 0.1

    def __post_init__(self) -> None:
        known = all(map(math.isfinite, (self.base, self.factor, self.cap, self.jitter)))
        if (
            not known
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
        if self.base == 0 or self.factor == 1:
            return self.base
        try:
            return self.base * math.pow(self.factor, steps)
        except OverflowError:
            return math.inf


DEFAULT_BACKOFF = Backoff()
"""10 s, 20 s, 40 s ... up to an hour, each moved by up to a tenth."""
