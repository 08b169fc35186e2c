"""The runtime: what calls handlers with messages, and settles what they decided.

`threads.Consumer` and `tasks.AsyncConsumer` are two ways of calling handlers over one runtime:

==============  =================================================================================
``handlers``    the handlers and their settings; ``injection`` reads what each wants, ``payloads``
                makes it
``policy``      what to lease, when, and what to start next; ``verdicts``: what is to become of a
                message. Both pure
``book``        the leases held, and when each is to be renewed
``desk``        the thread that leases and settles; ``keeper``: the one that renews, beats and
                tidies up; ``line``: their connections; ``troubles``: which errors pass
``runtime``     one run, from its checks to its last settlement; ``starting``: its start, which
                can be given up; ``registering``: its row in the register of workers
==============  =================================================================================
"""

from __future__ import annotations

__all__: list[str] = []
