"""The names of pgqrs 0.5, on this package: ``from pgqrs_sa import pgqrs``.

Programs written for pgqrs run with only their import changed::

    from pgqrs_sa import pgqrs

    admin = pgqrs.Admin("postgresql://localhost/mydb")
    await admin.install()
    await admin.create_queue("reminders")
    producer = pgqrs.Producer(admin, "reminders", "scheduler", 3000)
    await producer.enqueue_delayed({"type": "reminder"}, delay_seconds=3600)

Every call is a transaction of its own, on connections of its own. To enqueue and settle in the
transaction that writes your rows, which is what this package is for, use `pgqrs_sa.QueueService`;
``docs/how-to/pgqrs-to-own-session.md`` names the equivalent of everything here.

Needs the extras ``asyncio`` and a driver, and ``alembic`` for `Admin.install`.
"""

# ruff: noqa: E402 - the extra is checked before the imports that need it

from __future__ import annotations

from .. import extras

extras.require("pgqrs_sa.pgqrs")

from ..settings import Validation
from . import errors, types
from .admin import Admin
from .config import Config
from .consumer import Consumer
from .errors import *  # noqa: F403 - the names in its __all__
from .producer import Producer, RateLimitStatus
from .tables import Archive, Messages, Queues, Workers
from .types import *  # noqa: F403

__all__ = [
    "Admin",
    "Archive",
    "Config",
    "Consumer",
    "Messages",
    "Producer",
    "Queues",
    "RateLimitStatus",
    "Validation",
    "Workers",
]
__all__ += errors.__all__
__all__ += types.__all__
