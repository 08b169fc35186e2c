"""The consumers: they call handlers with messages, and settle what the handlers decided.

`threads.Consumer` and `tasks.AsyncConsumer` are two ways of calling handlers over one runtime:

===============  ================================================================================
``handlers``     the handlers and their options; ``signature``: what each is called with
``sessions``     what makes the sessions of calls; ``call_transactions``: what a handler, or another
                 thread, may do with the transaction of a call
``scheduler``    what to lease, and when; ``disposition``: what becomes of a message. Both pure
``leases``       the leases held, and when each is to be renewed
``state``        what the threads of a run share, and who writes it
``dispatcher``   leases and settles; ``leader``: which thread does that
``renewer``      renews leases and ends calls that take too long, in a thread of its own, which
                 also sends the heartbeat and does the housekeeping
``connection``   the connections of both; ``store``: what they do in the database; ``retrying``:
                 which errors pass
``runtime``      one run, from its checks to its last settlement
===============  ================================================================================
"""

from __future__ import annotations

__all__: list[str] = []
