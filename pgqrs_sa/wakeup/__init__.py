"""Wake-ups: how a consumer that waits learns that a message has arrived.

| module | |
|---|---|
| `local` | within one process, when the transaction of the enqueue commits |
| `notify` | the channel of ``NOTIFY``, and the worker's row that asks producers for it |
| `listener` | the thread that listens, and reconnects |
| `drivers` | the connection that listens, for psycopg and asyncpg |
"""

__all__: list[str] = []
