"""Judge what several workers say that they did to one queue, each with the time it took.

A worker knows only that an operation happened somewhere between its start and its end, so each rule
speaks of what is certain: it finds fault only where no order of the operations would be right. All
times are the database's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Event", "Tables", "faults"]

ENDINGS = ("archive", "release", "fail", "delete")
"""What ends a lease when its holder does it; ``expire`` ends any lease."""


@dataclass(frozen=True)
class Event:
    """One operation on one message.

    Attributes:
        op: ``enqueue``, ``lease``, ``extend``, ``archive``, ``release``, ``fail``, ``delete`` or
            ``expire``.
        id: The message.
        token: The lease, as its fencing token says which; 0 for an enqueue.
        worker: Who did it.
        start: Before it was begun, in seconds.
        end: After it was committed.
        ok: Whether it did anything; False for what was refused with `LeaseLost`.
        until: When a lease ends, of ``lease`` and ``extend``.
    """

    op: str
    id: int
    token: int
    worker: str
    start: float
    end: float
    ok: bool = True
    until: float | None = None


@dataclass(frozen=True)
class Tables:
    """What is in the tables in the end: ids of messages, once for each row."""

    live: Sequence[int]
    archived: Sequence[int]
    effects: Sequence[int]


def faults(events: Iterable[Event], tables: Tables) -> list[str]:
    """Return what the events cannot have done if the promises are kept; nothing if they are."""
    done = [event for event in events if event.ok]
    by_message: dict[int, list[Event]] = defaultdict(list)
    for delivery in done:
        by_message[delivery.id].append(delivery)
    found = [fault for id_ in by_message for fault in _message(id_, by_message[id_])]
    return found + _accounts(done, tables)


def _message(id_: int, events: Sequence[Event]) -> list[str]:
    leases = sorted((event for event in events if event.op == "lease"), key=lambda item: item.token)
    found = []
    for token, times in Counter(lease.token for lease in leases).items():
        if times > 1:
            found.append(f"message {id_}: lease {token} was given {times} times")
    by_token: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        by_token[event.token].append(event)
    for lease in leases:
        found += _lease(lease, by_token[lease.token])
    leased = {(lease.token, lease.worker) for lease in leases}
    for event in events:
        if (
            event.op not in ("enqueue", "lease", "expire")
            and (event.token, event.worker) not in leased
        ):
            found.append(
                f"message {id_}: {event.worker} did {event.op} without having lease {event.token}"
            )
    for before, after in pairwise(leases):
        found += _succession(before, after, by_token[before.token])
    return found


def _lease(lease: Event, events: Sequence[Event]) -> list[str]:
    """The rules of one lease."""
    name = f"message {lease.id}: lease {lease.token}"
    endings = [event for event in events if event.op in ENDINGS]
    found = [
        f"{name} was ended by {ending.op} before it began"
        for ending in endings
        if ending.end < lease.start
    ]
    if len(endings) > 1:
        found.append(f"{name} was ended {len(endings)} times: {', '.join(e.op for e in endings)}")
    found += [
        f"{name} was extended after it had been ended"
        for event in events
        if event.op == "extend" and any(other.end < event.start for other in endings)
    ]
    return found


def _succession(before: Event, after: Event, events: Sequence[Event]) -> list[str]:
    """The rules between a lease and the next one of the same message."""
    name = f"message {before.id}: lease {before.token}"
    found = []
    if after.end < before.start:
        found.append(f"{name} was given after lease {after.token}")
    if after.end < (end := _earliest_end(before, events, after.end)):
        found.append(f"{name} ran until {end:.6f}, lease {after.token} came by {after.end:.6f}")
    found += [
        f"{name}: {event.op} by its former holder succeeded, lease {after.token} was given before"
        for event in events
        if event.op in (*ENDINGS, "extend") and event.start > after.end
    ]
    return found


def _earliest_end(lease: Event, events: Sequence[Event], seen_by: float) -> float:
    """The first moment at which a lease may have been over.

    Args:
        lease: The lease.
        events: What was done under its token.
        seen_by: Extensions that may have come after this are not counted.
    """
    extended = [event for event in events if event.op == "extend" and event.end <= seen_by]
    # Extensions may also bring the end nearer, and which was the last is not always certain.
    last = [
        delivery
        for delivery in extended
        if not any(other.start > delivery.end for other in extended)
    ]
    ends = [item.until for item in last or [lease] if item.until is not None]
    ends += [event.start for event in events if event.op in (*ENDINGS, "expire")]
    # An extension in flight may have come after all, and before those that are certain.
    flying = (
        event for event in events if event.op == "extend" and event.start <= seen_by < event.end
    )
    return min([*ends, *(item.until for item in flying if item.until is not None)])


def _accounts(done: Sequence[Event], tables: Tables) -> list[str]:
    """What was acknowledged exists, once."""
    found = []
    enqueued = Counter(delivery.id for delivery in done if delivery.op == "enqueue")
    acknowledged = Counter(delivery.id for delivery in done if delivery.op == "archive")
    deleted = Counter(delivery.id for delivery in done if delivery.op == "delete")
    for what, counts in (
        ("was enqueued", enqueued),
        ("was acknowledged", acknowledged),
        ("was deleted", deleted),
        ("had an effect", Counter(tables.effects)),
        ("is in the archive", Counter(tables.archived)),
        ("is live", Counter(tables.live)),
    ):
        found += [f"message {id_} {what} {n} times" for id_, n in counts.items() if n > 1]
    for id_ in {*acknowledged} ^ {*tables.effects}:
        found.append(
            f"message {id_} was acknowledged without an effect"
            if id_ in acknowledged
            else f"message {id_} had an effect without an acknowledgement"
        )
    for id_ in {*acknowledged} ^ {*tables.archived}:
        found.append(
            f"message {id_} was acknowledged and is not in the archive"
            if id_ in acknowledged
            else f"message {id_} is in the archive and was not acknowledged"
        )
    places = Counter([*tables.live, *{*tables.archived}, *deleted])
    found += [f"message {id_} is in {places[id_]} places" for id_ in enqueued if places[id_] != 1]
    found += [f"message {id_} exists, and was never enqueued" for id_ in places.keys() - enqueued]
    return found
