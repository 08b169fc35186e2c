"""The runtime: what calls handlers with messages, and settles what they decided.

`threads.Consumer` and `tasks.AsyncConsumer` are two ways of calling handlers over one runtime:

===============  ================================================================================
``handlers``     the handlers and their options; ``signature`` reads what each wants, ``payloads``
                 makes it
``scheduler``    what to lease, when, and what to start next; ``disposition``: what becomes of a
                 message. Both pure
``leases``       the leases held, and when each is to be renewed
``dispatcher``   leases and settles; ``leader``: which thread does that; ``renewer``: renews, sends
                 the heartbeat and does the maintenance; ``connection``: their connections;
                 ``retrying``: which errors pass
``runtime``      one run, from its checks to its last settlement; ``startup``: its start, which can
                 be aborted; ``registration``: its row in the register of workers
===============  ================================================================================
"""

from __future__ import annotations

__all__: list[str] = []
