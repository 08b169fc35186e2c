"""What a service offers besides enqueue, dequeue and settle, grouped by what it is about.

Reach these through a `QueueService`: ``service.queues``, ``service.messages``,
``service.archived``, ``service.workers``. Like the service, they work in the caller's transaction.
"""

from __future__ import annotations

from .archive import Archived
from .messages import Messages
from .queues import Queues
from .workers import Workers

__all__ = ["Archived", "Messages", "Queues", "Workers"]
