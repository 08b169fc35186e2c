"""Helpers for the tests of an application: check its queues, and call its handlers.

Every helper works in the given session, in its transaction, and never commits. A test whose
transaction is rolled back at the end leaves nothing behind, however many handlers ran in it.
The database does the work; nothing is faked::

    def test_an_order_sends_a_receipt(session):
        place_order(session, 7)
        assert_enqueued(session, "receipts", payload__contains={"order": 7}, delay=0)
        drained = drain(session, consumer)
        assert drained.archived == 1
        assert session.get_one(Order, 7).receipts_sent == 1

With an ``AsyncSession`` the same functions are awaited. They do not need pytest; the plugin
`pgqrs_sa.pytest_plugin` offers them as a fixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from ..codecs import Codec
from ..models import Models
from ..types import MessageInfo, Seconds
from .clock import advance
from .draining import Drained, DrainOptions, drain, work_one
from .enqueued import Wanted, all_enqueued, assert_enqueued, refute_enqueued
from .sessions import SessionLike, raise_on_commit

if TYPE_CHECKING:
    from typing import Unpack

    from ..consumer.tasks import AsyncConsumer
    from ..consumer.threads import Consumer
    from .sessions import AsyncSessionLike  # noqa: F401 - in a string below

__all__ = [
    "AsyncInspector",
    "Drained",
    "Inspector",
    "Wanted",
    "advance",
    "all_enqueued",
    "assert_enqueued",
    "drain",
    "raise_on_commit",
    "refute_enqueued",
    "work_one",
]

_S = TypeVar("_S")


class _Bound(Generic[_S]):
    def __init__(
        self, session: _S, *, models: Models | None = None, codec: Codec | None = None
    ) -> None:
        self.session = session
        self._models = models
        self._codec = codec


class Inspector(_Bound[SessionLike]):
    """The helpers of this package, in the session of a test.

    Args:
        session: The test's session.
        models: A host's own classes; default: the ready-made classes.
        codec: Converts payloads to JSON text and back; default: strict standard JSON.
    """

    def assert_enqueued(
        self, queue: str, *, count: int | None = None, **wanted: Unpack[Wanted]
    ) -> list[MessageInfo]:
        """See `pgqrs_sa.testing.assert_enqueued`."""
        __tracebackhide__ = True
        return assert_enqueued(
            self.session, queue, count=count, models=self._models, codec=self._codec, **wanted
        )

    def refute_enqueued(self, queue: str, **wanted: Unpack[Wanted]) -> None:
        """See `pgqrs_sa.testing.refute_enqueued`."""
        __tracebackhide__ = True
        refute_enqueued(self.session, queue, models=self._models, codec=self._codec, **wanted)

    def all_enqueued(self, queue: str | None = None) -> list[MessageInfo]:
        """See `pgqrs_sa.testing.all_enqueued`."""
        return all_enqueued(self.session, queue, models=self._models, codec=self._codec)

    def drain(self, consumer: Consumer, **options: Unpack[DrainOptions]) -> Drained:
        """See `pgqrs_sa.testing.drain`."""
        __tracebackhide__ = True
        return drain(self.session, consumer, **options)

    def advance(self, by: Seconds, queue: str | None = None) -> int:
        """See `pgqrs_sa.testing.advance`."""
        return advance(self.session, by, queue, models=self._models)


class AsyncInspector(_Bound["AsyncSessionLike"]):
    """`Inspector` for an ``AsyncSession``, awaited, with the same parameters."""

    async def assert_enqueued(
        self, queue: str, *, count: int | None = None, **wanted: Unpack[Wanted]
    ) -> list[MessageInfo]:
        """See `pgqrs_sa.testing.assert_enqueued`."""
        __tracebackhide__ = True
        return await assert_enqueued(
            self.session, queue, count=count, models=self._models, codec=self._codec, **wanted
        )

    async def refute_enqueued(self, queue: str, **wanted: Unpack[Wanted]) -> None:
        """See `pgqrs_sa.testing.refute_enqueued`."""
        __tracebackhide__ = True
        await refute_enqueued(self.session, queue, models=self._models, codec=self._codec, **wanted)

    async def all_enqueued(self, queue: str | None = None) -> list[MessageInfo]:
        """See `pgqrs_sa.testing.all_enqueued`."""
        return await all_enqueued(self.session, queue, models=self._models, codec=self._codec)

    async def drain(self, consumer: AsyncConsumer, **options: Unpack[DrainOptions]) -> Drained:
        """See `pgqrs_sa.testing.drain`."""
        __tracebackhide__ = True
        return await drain(self.session, consumer, **options)

    async def advance(self, by: Seconds, queue: str | None = None) -> int:
        """See `pgqrs_sa.testing.advance`."""
        return await advance(self.session, by, queue, models=self._models)
