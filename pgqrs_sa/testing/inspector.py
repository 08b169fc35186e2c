"""The helpers of this package, bound to one session."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ..codecs import Codec
from ..models import Models
from ..types import MessageInfo, Seconds
from .clock import advance
from .draining import Drained, drain
from .enqueued import all_enqueued, assert_enqueued, refute_enqueued
from .matching import Wanted
from .sessions import SessionLike

if TYPE_CHECKING:
    from typing import Unpack

    from ..consumer.tasks import AsyncConsumer
    from ..consumer.threads import Consumer
    from .sessions import AsyncSessionLike

__all__ = ["AsyncInspector", "Inspector"]


class Inspector:
    """Looks into the queues, and works on them, in the session of a test.

    Args:
        session: The test's session.
        models: A host's own classes; the ready-made ones unless given.
        codec: Turns payloads into JSON text and back; strict standard JSON unless given.
    """

    def __init__(
        self, session: SessionLike, *, models: Models | None = None, codec: Codec | None = None
    ) -> None:
        self.session = session
        self._models = models
        self._codec = codec

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

    def drain(
        self,
        consumer: Consumer,
        *,
        queues: Collection[str] | None = None,
        scheduled: bool = False,
        max_messages: int = 1000,
        raise_errors: bool = True,
    ) -> Drained:
        """See `pgqrs_sa.testing.drain`."""
        __tracebackhide__ = True
        return drain(
            self.session,
            consumer,
            queues=queues,
            scheduled=scheduled,
            max_messages=max_messages,
            raise_errors=raise_errors,
        )

    def advance(self, by: Seconds, queue: str | None = None) -> int:
        """See `pgqrs_sa.testing.advance`."""
        return advance(self.session, by, queue, models=self._models)


class AsyncInspector:
    """`Inspector` for an ``AsyncSession``, awaited, with the same parameters."""

    def __init__(
        self, session: AsyncSessionLike, *, models: Models | None = None, codec: Codec | None = None
    ) -> None:
        self.session = session
        self._models = models
        self._codec = codec

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

    async def drain(
        self,
        consumer: AsyncConsumer,
        *,
        queues: Collection[str] | None = None,
        scheduled: bool = False,
        max_messages: int = 1000,
        raise_errors: bool = True,
    ) -> Drained:
        """See `pgqrs_sa.testing.drain`."""
        __tracebackhide__ = True
        return await drain(
            self.session,
            consumer,
            queues=queues,
            scheduled=scheduled,
            max_messages=max_messages,
            raise_errors=raise_errors,
        )

    async def advance(self, by: Seconds, queue: str | None = None) -> int:
        """See `pgqrs_sa.testing.advance`."""
        return await advance(self.session, by, queue, models=self._models)
