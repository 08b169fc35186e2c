"""Queues declared in code, with their settings.

Declare them next to the models. A consumer creates those that are missing when it starts, and so
does ``service.queues.sync`` when an application starts::

    from pgqrs_sa import DeclaredQueue, declare_queues

    RECEIPTS = DeclaredQueue("receipts", lease=60, max_read_ct=3)
    declare_queues(Base.metadata, RECEIPTS)

    with Session(engine) as session, session.begin():
        QueueService(session).queues.sync(Base.metadata)

`declare_queues` keeps them in ``MetaData.info``, where the Alembic plugin finds them. For all else,
a plain list of them works too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, TypeAlias

from sqlalchemy import MetaData

from . import validation
from .errors import InvalidArgument, safe_repr
from .types import Keep, Seconds

__all__ = ["DeclaredQueue", "QueueSource", "declare_queues", "declared_in", "joined"]

_INFO = "pgqrs_queues"
_DEFAULT_LEASE = 30.0  # seconds, as in the table


@dataclass(frozen=True, slots=True)
class DeclaredQueue:
    """A queue and its settings, as an application declares them.

    A setting that is None gets the table's default when the queue is created, and is not compared
    with the database afterwards.

    Attributes:
        name: 1 to 128 of ``A-Z a-z 0-9 . _ : / -``, starting with a letter or a digit.
        lease: Seconds, or a timedelta, that a lease lasts; the table's default is 30 s.
        max_read_ct: Attempts before a message is dead; the table's default is 5.
        keep: Which settled messages go to the archive; the table's default is ``all``.
        retention: Seconds, or a timedelta, that settled messages are kept; by default for ever.
        failed_retention: The same for those that are dead, cancelled or discarded; by default for
            as long as the others.
        max_payload_bytes: The largest payload, as UTF-8 JSON; the table's default is 1 MiB.

    Raises:
        InvalidArgument: the name or a setting is not valid.
        DelayError: ``lease`` or a retention is no such duration.
    """

    name: str
    lease: Seconds | None = None
    max_read_ct: int | None = None
    keep: Keep | None = None
    retention: Seconds | None = None
    failed_retention: Seconds | None = None
    max_payload_bytes: int | None = None

    def __post_init__(self) -> None:
        validation.validate_queue_name(self.name)
        self.settings()

    def settings(self) -> Mapping[str, float | str]:
        """Return the declared settings by their columns, durations in seconds."""
        values = {each.name: getattr(self, each.name) for each in fields(self)[1:]}
        return validation.validate_queue_settings(
            {k: v for k, v in values.items() if v is not None}
        )

    @property
    def lease_at_creation(self) -> timedelta:
        """How long a lease lasts once the queue is created."""
        return timedelta(seconds=float(self.settings().get("lease_seconds", _DEFAULT_LEASE)))


QueueSource: TypeAlias = DeclaredQueue | Iterable[DeclaredQueue] | MetaData
"""A declared queue, several, or the MetaData that `declare_queues` has attached them to."""


def declare_queues(metadata: MetaData, *queues: DeclaredQueue) -> None:
    """Attach queues to a MetaData, for `Queues.sync`, consumers and the Alembic plugin.

    Args:
        metadata: The application's, as ``Base.metadata``.
        queues: The queues. Declaring an equal one again changes nothing.

    Raises:
        InvalidArgument: a queue of this name is declared with other settings.
    """
    if not isinstance(metadata, MetaData):
        raise InvalidArgument(f"metadata must be a MetaData, not {safe_repr(metadata)}")
    metadata.info[_INFO] = joined(metadata.info.get(_INFO, ()), queues)


def declared_in(source: QueueSource, name: str = "queues") -> tuple[DeclaredQueue, ...]:
    """Return the declared queues of a source in the order of their names.

    All processes create queues in this order, so that they do not deadlock.

    Args:
        source: See `QueueSource`.
        name: What to call it in an error.
    """
    given: Any = source
    if isinstance(given, MetaData):
        given = given.info.get(_INFO, ())
    elif isinstance(given, DeclaredQueue):
        given = (given,)
    listed: list[Any] = validation.as_list(given, name)
    for index, queue in enumerate(listed):
        if not isinstance(queue, DeclaredQueue):
            raise InvalidArgument(
                f"{name}[{index}] must be a DeclaredQueue, not {safe_repr(queue)}"
            )
    return joined((), listed)


def joined(
    queues: Iterable[DeclaredQueue], more: Iterable[DeclaredQueue]
) -> tuple[DeclaredQueue, ...]:
    """Return queues of two sources by name, each once.

    Raises:
        InvalidArgument: two of one name differ.
    """
    by_name: dict[str, DeclaredQueue] = {}
    for queue in (*queues, *more):
        known = by_name.setdefault(queue.name, queue)
        if known.settings() != queue.settings():
            raise InvalidArgument(
                f"the queue {queue.name!r} is declared twice, as {known} and as {queue}: "
                "declare it once"
            )
    return tuple(by_name[name] for name in sorted(by_name))
