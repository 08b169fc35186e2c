"""Who takes part, in the order of the tables."""

from __future__ import annotations

from .bare import Bare
from .base import Contender
from .baseline import Baseline
from .peer_chancy import Chancy
from .peer_pgmq import Pgmq, PgmqSqlalchemy, PgmqSqlalchemyChained
from .peer_pgqrs import Pgqrs
from .peer_pgqueuer import Pgqueuer
from .peer_procrastinate import Procrastinate
from .runtime import AsyncRuntimeAsyncpg, AsyncRuntimePsycopg, Runtime, RuntimeBatches
from .service import (
    Service,
    ServiceAsyncpg,
    ServiceAsyncPsycopg,
    ServiceChained,
    ServiceNotify,
)

__all__ = ["CONTENDERS", "Contender", "by_name"]

CONTENDERS: tuple[type[Contender], ...] = (
    Service,
    ServiceNotify,
    ServiceChained,
    ServiceAsyncPsycopg,
    ServiceAsyncpg,
    Runtime,
    RuntimeBatches,
    AsyncRuntimePsycopg,
    AsyncRuntimeAsyncpg,
    Bare,
    Baseline,
    Pgmq,
    PgmqSqlalchemy,
    PgmqSqlalchemyChained,
    Pgqrs,
    Procrastinate,
    Pgqueuer,
    Chancy,
)


def by_name(name: str) -> type[Contender]:
    """Return a contender, or raise KeyError with the names that there are."""
    known = {contender.name: contender for contender in CONTENDERS}
    if name not in known:
        raise KeyError(f"there is no contender {name!r}; there are: {', '.join(known)}")
    return known[name]
