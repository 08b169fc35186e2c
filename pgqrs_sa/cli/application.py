"""An application's consumer or queues, named by ``module:attribute``, and the counts of a run."""

from __future__ import annotations

import inspect
import os
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from ..consumer.events import Event, Hooks
from ..extras import missing_extra
from ..types import Outcome, WorkerInfo
from .failures import USAGE, Failed

if TYPE_CHECKING:
    from ..consumer.tasks import AsyncConsumer
    from ..consumer.threads import Consumer
    from ..declared import DeclaredQueue

__all__ = ["Counter", "load", "load_queues"]

_AS = "write module:attribute, as app.jobs:consumer"
_AS_QUEUES = "declare queues with DeclaredQueue(name), and name one, or a list or MetaData of them"
_TRACE = "-vv shows where"
_MOST = 10  # names in an error


def load(target: str) -> Consumer | AsyncConsumer:
    """Import a consumer.

    Args:
        target: A module, a colon, and an attribute of it, or an attribute of that. A function is
            called, and returns the consumer. Modules of the current folder are found too.

    Raises:
        Failed: with exit code 2 when the path is wrong, which says what was found; with 1 when the
            application raised.
    """
    module, value = _resolved(target, "consumer")
    return _made(module, target, value)


def load_queues(target: str) -> tuple[DeclaredQueue, ...]:
    """Import declared queues.

    Args:
        target: As for `load`. It names a `DeclaredQueue`, a list of them, a MetaData, a declarative
            base, a consumer, or a function that returns one of these.

    Raises:
        Failed: as `load`; or with exit code 2 when the target declares no queue.
    """
    from ..consumer.base import BaseConsumer  # noqa: PLC0415 - SQLAlchemy takes a while
    from ..declared import declared_in  # noqa: PLC0415
    from ..errors import InvalidArgument  # noqa: PLC0415

    _, value = _resolved(target, "declared queues")
    value = _called(target, value)[1]
    source: Any = getattr(value, "metadata", value)  # of a declarative base
    if isinstance(value, BaseConsumer):
        source = value.declared_queues
    if isinstance(source, (str, bytes)):  # not shown: it may be a URL with a password
        raise Failed(f"{target} is a string, and declares no queue", hint=_AS_QUEUES, code=USAGE)
    try:
        declared = declared_in(source, target)
    except InvalidArgument as error:
        raise Failed(str(error), hint=_AS_QUEUES, code=USAGE) from error
    if not declared:
        raise Failed(f"{target} declares no queue", hint=_AS_QUEUES, code=USAGE)
    return declared


def _resolved(target: str, wanted: str) -> tuple[ModuleType, Any]:
    """Import a module; return it, and the attribute that the target names."""
    name, _, path = target.partition(":")
    if not all(part.isidentifier() for part in name.split(".")):
        raise Failed(f"{name!r} is no name of a module", hint=_AS, code=USAGE)
    module = _module(name)
    if not path:
        found = f": {_found_in(module)}" if wanted == "consumer" else ""
        raise Failed(f"{target!r} names no {wanted}{found}", hint=_AS, code=USAGE)
    value: Any = module
    walked = name
    for part in path.split("."):
        if not hasattr(value, part):
            raise _no_attribute(module, value, walked, part)
        value = getattr(value, part)
        walked += f"{'.' if ':' in walked else ':'}{part}"
    return module, value


def _module(name: str) -> ModuleType:
    here = os.getcwd()  # noqa: PTH109 - sys.path has strings
    if not {here, ""} & set(sys.path):
        sys.path.insert(0, here)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise _no_module(error.name) from error
        raise _broken(f"importing {name}", error) from error
    except Exception as error:
        raise _broken(f"importing {name}", error) from error


def _broken(what: str, error: Exception) -> Failed:
    said = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
    hint = missing_extra(error) if isinstance(error, ImportError) else None
    return Failed(f"{what} failed: {said}", hint=hint or _TRACE)


def _no_module(missing: str) -> Failed:
    parent, _, last = missing.rpartition(".")
    where: Iterable[str] = [os.getcwd()]  # noqa: PTH109
    place = "the current folder, or installed"
    if parent:
        where, place = getattr(sys.modules[parent], "__path__", ()), parent
    there = sorted(module.name for module in pkgutil.iter_modules(where))
    message = f"there is no module {last!r} in {place}"
    if there:
        message += f"; there are: {_listed(there)}"
    return Failed(message, hint=_meant(f"{parent}.".lstrip("."), last, there), code=USAGE)


def _no_attribute(module: ModuleType, value: Any, walked: str, part: str) -> Failed:
    names = [name for name in dir(value) if not name.startswith("_")]
    hint = _meant(f"{walked}{'.' if ':' in walked else ':'}", part, names)
    return Failed(f"{walked} has no {part!r}: {_found_in(module)}", hint=hint, code=USAGE)


def _meant(before: str, given: str, names: list[str]) -> str:
    close = get_close_matches(given, names, n=1)
    return f"did you mean {before}{close[0]}?" if close else _AS


def _found_in(module: ModuleType) -> str:
    """Return which consumers a module has."""
    from ..consumer.base import BaseConsumer  # noqa: PLC0415 - SQLAlchemy takes a while

    known = [name for name, value in vars(module).items() if isinstance(value, BaseConsumer)]
    if not known:
        return f"{module.__name__} has no consumer"
    return f"{module.__name__} has {_listed(known)}"


def _made(module: ModuleType, target: str, value: Any) -> Consumer | AsyncConsumer:
    from ..consumer.base import BaseConsumer  # noqa: PLC0415 - SQLAlchemy takes a while

    what, value = _called(target, value)
    if isinstance(value, BaseConsumer):
        consumer: Any = value
        return cast("Consumer | AsyncConsumer", consumer)
    if inspect.isclass(value) or inspect.isroutine(value):
        kind = f"a {'class' if inspect.isclass(value) else 'coroutine function'}"
    else:
        kind = f"of type {type(value).__name__}"
    message = f"{target} {what} {kind}, and no consumer: {_found_in(module)}"
    raise Failed(message, hint=_AS, code=USAGE)


def _called(target: str, value: Any) -> tuple[str, Any]:
    """Return the verb for an error, and the result of a function or the value itself."""
    if not inspect.isroutine(value) or inspect.iscoroutinefunction(value):
        return "is", value
    try:
        return "returned", value()
    except Exception as error:
        raise _broken(f"calling {target}", error) from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more


_COUNTED = (
    Outcome.ARCHIVED,
    Outcome.DISCARDED,
    Outcome.RETRIED,
    Outcome.RELEASED,
    Outcome.DEAD,
    Outcome.LOST,
)


class Counter(Hooks):
    """Counts messages by outcome.

    Args:
        begun: Called once, when the consumer has registered and begins to lease.
    """

    def __init__(self, begun: Callable[[WorkerInfo], None]) -> None:
        self._begun = begun
        self._counts: dict[Outcome, int] = dict.fromkeys(_COUNTED, 0)
        self._lock = threading.Lock()
        self.worker: WorkerInfo | None = None

    def on_heartbeat(self, worker: WorkerInfo) -> None:
        """See `Hooks`."""
        first, self.worker = self.worker is None, worker
        if first:
            self._begun(worker)

    def _count(self, event: Event) -> None:
        with self._lock:
            self._counts[Outcome(event.outcome)] += 1

    on_success = on_retry = on_dead = on_lease_lost = _count

    def row(self) -> dict[str, Any]:
        """Return the counts and the worker."""
        worker = self.worker
        return {
            "worker": worker.id if worker else None,
            "queues": list(worker.queues) if worker else [],
            **self._named(),
        }

    def sentence(self) -> str:
        """Return the counts as a sentence."""
        counted = [f"{count} {name}" for name, count in self._named().items() if count]
        return ", ".join(counted) or "no message came"

    def _named(self) -> dict[str, int]:
        return {outcome.name.lower(): count for outcome, count in self._counts.items()}
