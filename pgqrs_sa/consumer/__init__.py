"""The consumers: they call handlers with messages, and settle what the handlers decided.

`threads.Consumer` and `tasks.AsyncConsumer` are two ways of calling handlers over one runtime:

===============  ================================================================================
``handlers``     the handlers and their options; ``signature`` reads what each wants, ``payloads``
                 makes it
``scheduler``    what to lease, when, and what to start next; ``disposition``: what becomes of a
                 message. Both pure
``leases``       the leases held, and when each is to be renewed
``state``        what the threads of a run share, and who writes it
``dispatcher``   leases and settles; ``leader``: which thread does that; ``settlements``: each by
                 its disposition
``renewer``      renews leases and ends calls that take too long, in a thread of its own, where
                 ``maintenance`` sends the heartbeat and does the housekeeping
``connection``   the connections of both; ``store``: their statements; ``retrying``: which errors
                 pass
``runtime``      one run, from its checks to its last settlement; ``startup``: its start, which can
                 be aborted
===============  ================================================================================
"""

from __future__ import annotations

__all__: list[str] = []
